"""A server whose storage finds everything at once and never gives it: for the ping that 100 waits must not hold up."""

import argparse
import asyncio
import signal

import uvloop

from async_cache import AsyncCache, CacheConfig, ServerConfig
from async_cache.l2.backend import Backend
from async_cache.server import Server
from async_cache.values import BackendUsage


class Stuck(Backend):
    """Has everything; a load never ends."""

    name = "stuck"

    async def open(self):
        pass

    async def lookup(self, keys):
        return [True] * len(keys)

    def unpin(self, keys):
        pass

    async def load(self, keys, buffers):
        await asyncio.Event().wait()

    async def store(self, keys, buffers):
        return [True] * len(keys)

    async def delete(self, keys):
        return 0

    async def keys(self):
        for nothing in ():
            yield nothing

    def usage(self):
        return BackendUsage(0, 0)

    async def close(self):
        pass


async def main(url):
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    config = CacheConfig(l1_bytes=2**28, load_timeout_seconds=600, close_timeout_seconds=1)
    async with AsyncCache(config, [Stuck()]) as cache, Server(cache, ServerConfig(listen=[url])):
        await stopped.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", required=True)
    uvloop.run(main(parser.parse_args().listen))
