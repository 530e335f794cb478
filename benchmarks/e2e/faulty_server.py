"""A server whose storage is slow, or fails in the middle of a load, in the place of a sound one.

python benchmarks/e2e/faulty_server.py SOCKET DIRECTORY [--l1-bytes N] [--latency S] [--fail-after N]
"""

import argparse
import asyncio
import logging
import signal

from async_cache import AsyncCache, BackendError, CacheConfig, ServerConfig
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.urls.registry import from_url
from async_cache.server import Server
from async_cache.testing.backends import WrappedBackend


class DyingBackend(WrappedBackend):
    """Loads that many objects; the rest of that call is gone, and what comes after it raises."""

    def __init__(self, inner, objects):
        super().__init__(inner)
        self._left = objects

    async def load(self, keys, buffers):
        alive, self._left = min(self._left, len(keys)), max(0, self._left - len(keys))
        if not alive:
            raise BackendError("the disk has died")
        outcomes = await super().load(keys[:alive], buffers[:alive])
        return outcomes + [LoadOutcome.GONE] * (len(keys) - alive)


class SlowBackend(WrappedBackend):
    """Loads take that long, however many there are at a time."""

    def __init__(self, inner, seconds):
        super().__init__(inner)
        self._seconds = seconds

    async def before(self, verb, keys, buffers):
        if verb == "load":
            await asyncio.sleep(self._seconds)


async def serve(options):
    backend = from_url(f"fs://{options.directory}?capacity=4GiB")
    if options.fail_after is not None:
        backend = DyingBackend(backend, options.fail_after)
    if options.latency:
        backend = SlowBackend(backend, options.latency)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with (
        AsyncCache(CacheConfig(l1_bytes=options.l1_bytes), backends=[backend]) as cache,
        Server(cache, ServerConfig(listen=[f"unix://{options.socket}"])),
    ):
        await stopped.wait()


def main():
    parser = argparse.ArgumentParser(description="A server with slow or failing storage.")
    parser.add_argument("socket")
    parser.add_argument("directory")
    parser.add_argument("--l1-bytes", type=int, default=2**30)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--fail-after", type=int)
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
