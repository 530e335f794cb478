"""The server as a process, which runs until a signal."""

import asyncio
import logging
import os
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

import msgspec

from async_cache.cache import AsyncCache
from async_cache.config import CacheConfig, ServerConfig
from async_cache.protocol.address import Address
from async_cache.server.listener import Listener
from async_cache.server.logs import tell
from async_cache.server.server import Server

log = logging.getLogger(__name__)

_CLOSE_PART = 0.4  # of the time for a shutdown: for write-back, and as much for I/O that does not end


async def serve(
    cache_config: CacheConfig, server_config: ServerConfig, ready: Callable[[Sequence[Address]], None]
) -> None:
    """Serve a cache until SIGTERM, SIGINT or SIGHUP; `ready` is called with the addresses, once clients can connect.

    A SIGHUP that was ignored when the process began, as by `nohup`, stays ignored. From the first signal on, others
    change nothing. The process ends, with exit code 1, if storage delays the shutdown beyond
    `shutdown_timeout_seconds`.
    """
    timeout = server_config.shutdown_timeout_seconds
    close_timeout = min(cache_config.close_timeout_seconds, _CLOSE_PART * timeout)
    cache_config = msgspec.structs.replace(cache_config, close_timeout_seconds=close_timeout)
    _allow_descriptors()
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

    # Not by the loop, which would let go of them as it closes: what comes then would kill the process.
    for number in _signals():
        signal.signal(number, signalled)
    async with AsyncExitStack() as stack:
        opening = asyncio.create_task(_open(stack, cache_config, server_config))
        try:
            server = await opening
        except asyncio.CancelledError:
            if stopped.is_set():
                return
            raise
        ready(server.addresses)
        await stopped.wait()


async def _open(stack: AsyncExitStack, cache_config: CacheConfig, server_config: ServerConfig) -> Server:
    for url in server_config.listen:
        # An address that is taken is known at once, and not only when the memory is there.
        Listener(Address.parse(url)).close()
    cache = await stack.enter_async_context(AsyncCache(cache_config))
    return await stack.enter_async_context(Server(cache, server_config))


def _signals() -> Sequence[signal.Signals]:
    """The signals that end a server."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT) if ignored else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _allow_descriptors() -> None:
    """Allow as many descriptors as this process may have: each connection takes two."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _end_after(seconds: float) -> None:
    """End the process if it is still there then: nothing else would end threads that are stuck in storage."""

    def end() -> None:
        tell("gave up waiting for storage\n")
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
