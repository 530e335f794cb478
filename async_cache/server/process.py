"""Runs a server until a signal."""

import asyncio
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence

import msgspec

from async_cache.address import Address
from async_cache.cache import AsyncCache
from async_cache.config import CacheConfig, ServerConfig
from async_cache.server.server import Server

log = logging.getLogger(__name__)

_CLOSE_PART = 0.4  # of the time for a shutdown: for write-back, and as much for I/O that does not end


async def serve(
    cache_config: CacheConfig, server_config: ServerConfig, ready: Callable[[Sequence[Address]], None]
) -> None:
    """Serve a cache until SIGTERM or SIGINT; `ready` is told where, once clients can connect.

    The process ends, with exit code 1, where storage holds up the shutdown beyond `shutdown_timeout_seconds`.
    """
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    _allow_descriptors()
    timeout = server_config.shutdown_timeout_seconds
    close_timeout = min(cache_config.close_timeout_seconds, _CLOSE_PART * timeout)
    cache_config = msgspec.structs.replace(cache_config, close_timeout_seconds=close_timeout)
    async with AsyncCache(cache_config) as cache, Server(cache, server_config) as server:
        ready(server.addresses)
        await stopped.wait()
        log.info("shutting down")
        _end_after(timeout)


def _allow_descriptors() -> None:
    """Each connection takes two: as many as this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _end_after(seconds: float) -> None:
    """End the process if it is still there: also its threads, that no other way ends."""

    def end() -> None:
        sys.stderr.write("gave up waiting for storage\n")
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
