"""What is given back in turns holds up nobody: the end of a small request and statistics are answered meanwhile."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from unittest.mock import patch

from client.servers import SECONDS
from contract.support import fill, make_prompt

from async_cache import AsyncCache, CacheClient, CacheConfig, ServerConfig, connect
from async_cache.server import Server

MANY, FEW = make_prompt(1000), make_prompt(8, 2)


@asynccontextmanager
async def served(tmp_path) -> AsyncIterator[tuple[AsyncCache, CacheClient]]:
    """A cache that gives back one chunk in each turn, and a client."""
    url = f"unix://{tmp_path}/s"
    with patch("async_cache.l1.store._AT_ONCE", 1):
        cache = AsyncCache(CacheConfig(l1_bytes=2**23, l2=()))
        async with cache, Server(cache, ServerConfig(listen=(url,))), connect(url) as client:
            yield cache, client


async def loaded(client, prompt):
    prefetch = client.prefetch(prompt)
    assert (await prefetch.load_done).chunks == len(prompt)
    return prefetch.request_id


async def test_the_end_of_a_small_request_passes_what_another_one_gives_back(tmp_path):
    async with served(tmp_path) as (cache, client):
        for prompt in (MANY, FEW):
            await fill(client, prompt)
        many, few = await loaded(client, MANY), await loaded(client, FEW)
        large = asyncio.ensure_future(client.end_request(many))
        await client.end_request(few)
        assert cache.core.l1.backlog, "the other one is not given back yet"
        assert not large.done()
        assert (cache.core.stats().requests, cache.core.l1.leases > 0) == (0, True)
        await large
        assert (await client.stats()).leases == 0


async def test_statistics_wait_for_what_was_given_back_before_and_not_for_what_comes_meanwhile(tmp_path):
    async with served(tmp_path) as (cache, client):
        backlog = cache.core.l1.backlog

        async def saturate():
            while True:
                backlog.do(len, range(300))
                await asyncio.sleep(0)

        busy = asyncio.create_task(saturate())
        try:
            async with asyncio.timeout(SECONDS):
                await client.stats()
            assert backlog
        finally:
            busy.cancel()
            backlog.do_all()
