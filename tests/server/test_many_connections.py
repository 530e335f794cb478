"""A thousand connections at a time."""

import asyncio
import resource

import pytest
from contract.support import fill, make_prompt, read_back
from soak import rounds

from async_cache import connect

from .programs import server
from .support import descriptors_given_back, given_back

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
    with server(tmp_path, l1="16MiB") as served:
        async with connect(served.url) as cache:
            await fill(cache, PROMPT)
            descriptors = served.descriptors()
            for round_ in range(rounds(10, 50)):
                clients = await open_many(served.url, 200)
                await asyncio.gather(*(client.prefetch(PROMPT).load_done for client in clients))
                await close_many(clients)
                await given_back(cache)
                if round_ == 6:  # what is kept of the latest requests is full then
                    settled = served.resident_bytes()
            await descriptors_given_back(served, cache, descriptors)
            assert served.resident_bytes() - settled < 2 * 2**20
