"""A server that is killed and started again under load, below a whole cache: misses, and never a wrong byte.

A restarted server is empty: what is promised afterwards must have been stored since.
"""

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest
from contract.support import assert_nothing_held, fill, make_layout, make_prompt, verify
from soak import rounds

from async_cache import AsyncCache, CacheConfig, ObjectGroup
from async_cache.l2.guard.breaker import BreakerState
from async_cache.l2.urls.registry import from_url

from .servers import running
from .support import eventually, nothing_left

LAYOUT = make_layout(ObjectGroup((100_000,), "uint8"))
PROMPTS = [make_prompt(6, number, LAYOUT) for number in range(8)]
USERS = 4
BACK_SECONDS = 50.0


async def use(cache: AsyncCache, rng: random.Random, stop: asyncio.Event, told: Counter[str]) -> None:
    """Prefetch and check, and store what was not there, as an engine does."""
    while not stop.is_set():
        prompt = rng.choice(PROMPTS)
        prefetch = cache.prefetch(prompt)
        hits, result = await prefetch.lookup_done, await prefetch.load_done
        assert result.chunks <= hits.chunks
        assert result.chunks == hits.chunks or result.shortfall is not None
        async with cache.read(prefetch.request_id) as lease:
            assert verify(lease, prompt) == list(range(result.chunks))
        told["hits"] += result.l2_chunks
        told[str(result.shortfall)] += 1
        await fill(cache, prompt)
        await cache.flush(deadline_seconds=rng.choice((0.01, 0.2)))
        await cache.clear("l1")
        await asyncio.sleep(0)


@pytest.mark.timeout(3600)
async def test_a_server_is_killed_and_restarted_under_load(tmp_path: Path) -> None:
    with running(tmp_path / "valkey") as server:
        async with nothing_left():
            backend = from_url(f"valkey://127.0.0.1:{server.port}?breaker_reset=2&connect_timeout=0.5")
            async with AsyncCache(CacheConfig(l1_bytes=64 * 2**20), backends=[backend]) as cache:
                (guard,) = cache.core.guards
                loop, stop, told = asyncio.get_running_loop(), asyncio.Event(), Counter[str]()
                errors: list[BreakerState] = []  # the state that each led to
                count = guard.failed

                def failed(why: str) -> None:
                    count(why)
                    errors.append(guard.breaker.state)

                guard.failed = failed  # type: ignore[method-assign]
                users = [asyncio.ensure_future(use(cache, random.Random(n), stop, told)) for n in range(USERS)]
                for n in range(rounds(3, 50)):
                    before = told["hits"]
                    await eventually(lambda before=before: told["hits"] > before + 20 or any(u.done() for u in users))
                    errors.clear()
                    server.kill()
                    await eventually(lambda: guard.breaker.state is not BreakerState.CLOSED)
                    await asyncio.sleep(random.Random(n).uniform(0, 1))
                    server.start()
                    began = loop.time()
                    await eventually(lambda: guard.breaker.state is BreakerState.CLOSED)
                    assert loop.time() - began < BACK_SECONDS, f"round {n}"
                    assert errors.index(BreakerState.OPEN) < 3
                    assert not any(user.done() for user in users), [user for user in users if user.done()]
                stop.set()
                await asyncio.gather(*users)
                await assert_nothing_held(cache)
    assert told["hits"] > 0


async def test_no_hit_is_promised_of_what_a_restart_lost(tmp_path: Path) -> None:
    with running(tmp_path / "valkey") as server:
        backend = from_url(f"valkey://127.0.0.1:{server.port}?breaker_reset=0.1")
        async with AsyncCache(CacheConfig(l1_bytes=64 * 2**20), backends=[backend]) as cache:
            await fill(cache, PROMPTS[0])
            await cache.flush()
            await cache.clear("l1")
            assert (await cache.lookup(PROMPTS[0])).chunks == 6
            server.kill()
            assert (await cache.lookup(PROMPTS[0])).chunks == 0
            server.start()
            for _ in range(50):
                assert (await cache.lookup(PROMPTS[0])).chunks == 0
                await asyncio.sleep(0.01)
            await fill(cache, PROMPTS[0])
            while (await cache.flush()).written == 0:
                pass
            await cache.clear("l1")
            assert (await cache.lookup(PROMPTS[0])).chunks == 6


async def test_a_dead_server_does_not_delay_what_l1_has(tmp_path: Path) -> None:
    with running(tmp_path / "valkey") as server:
        backend = from_url(f"valkey://127.0.0.1:{server.port}")
        async with AsyncCache(CacheConfig(l1_bytes=64 * 2**20), backends=[backend]) as cache:
            await fill(cache, PROMPTS[0])
            await cache.flush()
            server.stop()  # it says nothing any more
            prefetch = cache.prefetch(PROMPTS[0])
            assert prefetch.lookup_done.done() and prefetch.load_done.done()  # within the call
            assert (await prefetch.load_done).l1_chunks == 6
            server.kill()
            prefetch = cache.prefetch(PROMPTS[0])
            assert prefetch.load_done.done()
