"""Servers with odd backends, as a program: `python -m server.odd KIND serve ...`, which takes the flags of `serve`.

KIND: lookup, load or store, of which all calls wait for ever; stuck, of which each load and store is a thread that
nothing ends; or slow, which takes 2 ms for 16 bytes. A slow server stops (SIGSTOP) when it has only to exit still.
"""

import asyncio
import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable

from async_cache import AsyncCache, CacheConfig, cli
from async_cache.l2 import Backend
from async_cache.l2.urls.registry import from_url
from async_cache.server import process
from async_cache.testing.backends import GatedBackend, ThrottledBackend, WrappedBackend


class StuckBackend(WrappedBackend):
    """As on a dead disk: what was begun owns its buffers and its thread for ever."""

    async def before(self, verb, keys, buffers):
        while verb in ("load", "store"):
            thread = asyncio.ensure_future(asyncio.to_thread(threading.Event().wait))
            try:
                await asyncio.shield(thread)
            except asyncio.CancelledError:
                continue


KINDS: dict[str, Callable[[Backend], Backend]] = {
    "lookup": lambda inner: GatedBackend(inner, "lookup"),
    "load": lambda inner: GatedBackend(inner, "load"),
    "store": lambda inner: GatedBackend(inner, "store"),
    "stuck": StuckBackend,
    "slow": lambda inner: ThrottledBackend(inner, bytes_per_second=16 / 0.002),
}


def main() -> None:
    kind = sys.argv.pop(1)
    make = KINDS[kind]
    if kind == "slow":
        atexit.register(os.kill, os.getpid(), signal.SIGSTOP)

    def odd_cache(config: CacheConfig) -> AsyncCache:
        return AsyncCache(config, [make(from_url(url)) for url in config.l2])

    process.AsyncCache = odd_cache
    cli.main()


if __name__ == "__main__":
    main()
