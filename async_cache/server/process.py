"""The server as a process, which runs until a signal."""

import asyncio
import ctypes
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec

from async_cache.cache import AsyncCache
from async_cache.config import CacheConfig, ServerConfig, http_address
from async_cache.errors import ConfigError
from async_cache.metrics import Watch
from async_cache.protocol.address import Address
from async_cache.server.access import tenant_of
from async_cache.server.garbage import collecting_briefly
from async_cache.server.http.serving import HTTPServer
from async_cache.server.listener import Listener, sockets_given
from async_cache.server.logs import tell
from async_cache.server.probe import Probe
from async_cache.server.reload import Reload, Source, reload_or_say_why
from async_cache.server.server import Server

log = logging.getLogger(__name__)

_HTTP_SOCKET = "http"  # the name of a socket that a service manager gives, in its FileDescriptorName=
_SWITCH_SECONDS = 0.0005  # so long the loop waits for a thread that runs Python, each time that it wakes
_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_LARGE_BYTES = 2**20
_CLOSE_PART = 0.4  # of the time for a shutdown: for write-back, and as much for I/O that does not end


async def serve(
    cache_config: CacheConfig,
    server_config: ServerConfig,
    ready: Callable[[Sequence[Address]], None],
    source: Source | None = None,
) -> None:
    """Serve a cache until SIGTERM, SIGINT or SIGHUP; `ready` is called with the addresses, once clients can connect.

    Where there is a `source` to read the settings from anew, a SIGHUP has that done, and ends nothing. One that was
    ignored when the process began, as by `nohup`, stays ignored. From the first signal on that ends it, others change
    nothing. The process ends, with exit code 1, if storage delays the shutdown beyond `shutdown_timeout_seconds`.
    """
    timeout = server_config.shutdown_timeout_seconds
    close_timeout = min(cache_config.close_timeout_seconds, _CLOSE_PART * timeout)
    bounded = msgspec.structs.replace(cache_config, close_timeout_seconds=close_timeout)
    _allow_descriptors()
    _give_back_large_buffers()
    sys.setswitchinterval(_SWITCH_SECONDS)
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()

    def stop() -> None:
        if stopped.is_set():
            return
        log.info("shutting down")
        stopped.set()
        opening.cancel()
        _end_after(timeout)

    def signalled(*_: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(stop)

    wanted = asyncio.Event()

    def reload_wanted(*_: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(wanted.set)

    # Not by the loop, which would let go of them as it closes: what comes then would kill the process.
    for number in _signals():
        signal.signal(number, reload_wanted if number == signal.SIGHUP and source is not None else signalled)
    async with AsyncExitStack() as stack:
        opening = asyncio.create_task(_open(stack, bounded, server_config))
        try:
            cache, server = await opening
        except asyncio.CancelledError:
            if stopped.is_set():
                return
            raise
        if source is not None:
            server.reload = Reload(source, cache, server, cache_config, server_config)
            await stack.enter_async_context(_reloads(server.reload, wanted))
        await stack.enter_async_context(collecting_briefly())
        ready(server.addresses)
        await stopped.wait()


@asynccontextmanager
async def _reloads(reload: Reload, wanted: asyncio.Event) -> AsyncIterator[None]:
    """Reload whenever that is wanted, within the block."""

    async def run() -> None:
        while True:
            await wanted.wait()
            wanted.clear()
            await reload_or_say_why(reload)

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def _open(
    stack: AsyncExitStack, cache_config: CacheConfig, server_config: ServerConfig
) -> tuple[AsyncCache, Server]:
    given = [(name, Listener.given(sock)) for name, sock in sockets_given()]
    to_serve = [listener for name, listener in given if name != _HTTP_SOCKET]
    _check_given(to_serve, server_config)
    for url in server_config.listen if not to_serve else ():
        # An address that is taken is known at once, and not only when the memory is there.
        Listener(Address.parse(url)).close()
    cache = await stack.enter_async_context(AsyncCache(cache_config))
    watch = Watch(cache.core, tenant_of)
    stack.push_async_callback(watch.close)
    server = Server(cache, server_config, to_serve)
    server.probe = Probe()
    stack.callback(server.probe.close)
    http = HTTPServer(server, watch)
    stack.push_async_callback(http.close)  # after the server, which it tells of meanwhile
    await stack.enter_async_context(server)
    watch.open()
    server.probe.open()
    to_answer = next((listener for name, listener in given if name == _HTTP_SOCKET), None)
    if to_answer is not None or server_config.http:
        http.open(to_answer or http_address(server_config.http))
    return cache, server


def _check_given(listeners: Sequence[Listener], config: ServerConfig) -> None:
    """Sockets that a service manager gives keep to the rule of those that the settings name. Raises ConfigError."""
    for listener in listeners:
        if not listener.address.is_local and not config.tenants:
            where = listener.address
            raise ConfigError(f"{where}, which was passed on, can be reached from other machines: it needs tenants")


def _signals() -> Sequence[signal.Signals]:
    """The signals that end a server."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT) if ignored else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _allow_descriptors() -> None:
    """Allow as many descriptors as this process may have: each connection takes two."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _give_back_large_buffers() -> None:
    """Have glibc give large buffers back when they are freed. By itself it keeps more, the larger they have been."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def _end_after(seconds: float) -> None:
    """End the process if it is still there then: nothing else would end threads that are stuck in storage."""

    def end() -> None:
        tell("gave up waiting for storage\n")
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
