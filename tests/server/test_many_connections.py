"""A thousand connections at a time."""

import asyncio
import gc
import os
import resource
import sys

import pytest
from contract.support import fill, make_prompt, read_back
from soak import rounds

from async_cache import AsyncCache, CacheConfig, ServerConfig, connect
from async_cache.server import Server

from .programs import server, socket_in
from .support import given_back, wait_until

CONNECTIONS = 1000
CHUNKS = 4
PROMPT = make_prompt(CHUNKS)
MOST_BYTES = 64 * 1024
WARM_UP = 50


@pytest.fixture(autouse=True)
def descriptors():
    """A client has two, and a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def open_many(url, count):
    return await asyncio.gather(*(connect(url, connect_timeout_seconds=100).open() for _ in range(count)))


async def close_many(clients):
    await asyncio.gather(*(client.close() for client in clients))


@pytest.mark.parametrize("kind", [0, 1], ids=["unix", "tcp"])
async def test_a_thousand_connections_with_one_prefetch_each_are_all_answered(tmp_path, kind, record_property):
    with server(tmp_path, f"unix://{tmp_path}/s", "tcp://127.0.0.1:0", l1="16MiB") as served:
        async with connect(served.url) as cache:
            await fill(cache, PROMPT)
            await cache.flush()
            await close_many(await open_many(served.urls[kind], WARM_UP))
            before = served.resident_bytes()
            began = served.busy_seconds()
            clients = await open_many(served.urls[kind], CONNECTIONS)
            prefetches = [client.prefetch(PROMPT) for client in clients]
            results = await asyncio.gather(*(prefetch.load_done for prefetch in prefetches))
            seconds = served.busy_seconds() - began
            assert [result.chunks for result in results] == [CHUNKS] * CONNECTIONS
            assert (await cache.stats()).leases == CHUNKS * CONNECTIONS
            each = (served.resident_bytes() - before) / CONNECTIONS
            record_property("seconds", seconds)
            record_property("bytes of each connection", each)
            assert each < MOST_BYTES
            assert seconds < 20
            await close_many(clients)
            await given_back(cache)
            assert await read_back(cache, PROMPT) == CHUNKS


async def test_connections_that_come_and_go_leave_nothing(tmp_path):
    """Of either end: both are in this process, whose objects can be counted."""
    url = socket_in(tmp_path)
    config = CacheConfig(l1_bytes=2**24, l2=["memory://"])
    async with AsyncCache(config) as cache, Server(cache, ServerConfig(listen=[url])), connect(url) as own:
        await fill(own, PROMPT)
        before, blocks = (len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())), []

        async def are_gone():
            await own.ping()
            return (len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())) == before

        for _ in range(rounds(10, 50)):
            clients = await open_many(url, 200)
            await asyncio.gather(*(client.prefetch(PROMPT).load_done for client in clients))
            await close_many(clients)
            del clients
            await given_back(own)
            await wait_until(are_gone)
            gc.collect()
            blocks.append(sys.getallocatedblocks())
        # What is kept of the latest requests is full after seven rounds. An object of each connection were 600 blocks.
        assert blocks[-1] - blocks[6] < 200, blocks
