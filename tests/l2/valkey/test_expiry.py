"""What a server of Valkey lets expire is told as that, though nobody says when."""

import asyncio

from contract.support import PAGE, fill_l2, make_prompt

from async_cache import AsyncCache, CacheConfig, ChunkState, Missed, Removal

from .servers import Server


async def test_a_chunk_that_has_expired_says_so(tcp: Server) -> None:
    await tcp.say("FLUSHALL")
    prompt = make_prompt(1)
    url = f"valkey://127.0.0.1:{tcp.port}?ttl=0.5"
    async with AsyncCache(CacheConfig(l1_bytes=64 * PAGE, l2=[url])) as cache:
        await fill_l2(cache, prompt)
        async with asyncio.timeout(60):
            while (missed := (await cache.lookup(prompt)).missed) != Missed(ChunkState.REMOVED, Removal.EXPIRED):
                # It is there, or in the milliseconds between the server's clock and ours, lost.
                assert missed is None or missed.removal is Removal.LOST
                await asyncio.sleep(0)
        (span,) = (await cache.explain(prompt)).spans
        assert (span.removal, span.backend) == (Removal.EXPIRED, cache.core.guards.current[0].name)


async def test_a_chunk_that_somebody_else_removes_before_its_time_is_lost(tcp: Server) -> None:
    await tcp.say("FLUSHALL")
    prompt = make_prompt(1)
    async with AsyncCache(CacheConfig(l1_bytes=64 * PAGE, l2=[f"valkey://127.0.0.1:{tcp.port}?ttl=1000"])) as cache:
        await fill_l2(cache, prompt)
        await tcp.say("FLUSHALL")
        assert (await cache.lookup(prompt)).missed == Missed(ChunkState.REMOVED, Removal.LOST)
