"""Caches on one bucket: what one stored the others find, what all deleted nobody gets, and the server may die."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from contract.support import (
    PAGE,
    assert_fails_alone,
    assert_nothing_held,
    count_hits,
    fill,
    fill_l2,
    make_prompt,
    read_back,
    verify,
)
from soak import rounds

from async_cache import AsyncCache, CacheConfig, Shortfall
from async_cache.l2.guard import Guard
from async_cache.l2.guard.breaker import BreakerState

from .support import Server

CHUNKS = 4
PROMPTS = 6
CLOSED = BreakerState.CLOSED
WAIT_SECONDS = 100  # for what should take a moment: the machine may be busy


@asynccontextmanager
async def opened(server: Server, prefix: str, **parameters: Any) -> AsyncIterator[AsyncCache]:
    config = CacheConfig(
        l1_bytes=64 * PAGE, l2=(server.url(prefix, **parameters),), breaker_reset_seconds=1, lookup_timeout_seconds=20
    )
    async with AsyncCache(config) as cache:
        yield cache
        await assert_nothing_held(cache)


async def test_what_one_stored_the_other_finds(server: Server) -> None:
    async with opened(server, "shared") as one, opened(server, "shared") as two:
        prompts = [make_prompt(CHUNKS, number) for number in range(PROMPTS)]
        await fill_l2(one, *prompts)
        assert [await count_hits(two, prompt) for prompt in prompts] == [CHUNKS] * PROMPTS
        assert [await read_back(two, prompt) for prompt in prompts] == [CHUNKS] * PROMPTS
        assert (await two.delete(prompts[0])).chunks == CHUNKS
        assert await count_hits(one, prompts[0]) == 0  # its L1 is empty
        assert (await one.stats()).backends[one.core.guards.current[0].name].objects == CHUNKS * PROMPTS


async def test_a_cache_that_opens_later_finds_all_and_can_clear_all(server: Server) -> None:
    prompts = [make_prompt(CHUNKS, number) for number in range(PROMPTS)]
    async with opened(server, "later") as one:
        await fill_l2(one, *prompts)
    async with opened(server, "later") as two:
        assert (await two.stats()).backends[two.core.guards.current[0].name].objects == CHUNKS * PROMPTS
        assert [await read_back(two, prompt) for prompt in prompts] == [CHUNKS] * PROMPTS
        assert (await two.clear("all")).chunks == CHUNKS * PROMPTS
        assert [await count_hits(two, prompt) for prompt in prompts] == [0] * PROMPTS
    async with opened(server, "later") as three:
        assert [await count_hits(three, prompt) for prompt in prompts] == [0] * PROMPTS


async def test_two_caches_store_delete_and_read_the_same_as_a_model_does(server: Server) -> None:
    """Each round is one act of both caches at once; what both have deleted is not served by either afterwards."""
    rng = random.Random(13)
    prompts = [make_prompt(CHUNKS, number) for number in range(PROMPTS)]
    async with opened(server, "model", lookup_timeout=20) as one, opened(server, "model", lookup_timeout=20) as two:
        caches = (one, two)
        stored: set[int] = set()  # by any cache since both have deleted it
        served = 0
        for _ in range(rounds(300, 10_000)):
            number = rng.randrange(PROMPTS)
            prompt = prompts[number]
            match rng.choices(("store", "store both", "delete", "race", "read", "drop"), (4, 2, 3, 2, 8, 2))[0]:
                case "store":
                    await store(rng.choice(caches), prompt, flushed=rng.random() < 0.5)
                    stored.add(number)
                case "store both":
                    await asyncio.gather(*(store(cache, prompt, flushed=True) for cache in caches))
                    stored.add(number)
                case "delete":
                    await asyncio.gather(*(cache.delete(prompt) for cache in caches))
                    stored.discard(number)
                    assert [await count_hits(cache, prompt) for cache in caches] == [0, 0]
                case "race":  # while they read, and write back
                    reads = [asyncio.create_task(read_back(cache, prompt)) for cache in caches]
                    await asyncio.sleep(rng.uniform(0, 0.01))
                    await asyncio.gather(*(cache.delete(prompt) for cache in caches))
                    stored.discard(number)
                    assert [await count_hits(cache, prompt) for cache in caches] == [0, 0]
                    await asyncio.gather(*reads)
                    assert [await read_back(cache, prompt) for cache in caches] == [0, 0]
                case "read":
                    counts = await asyncio.gather(*(read_back(cache, prompt) for cache in caches))
                    assert number in stored or counts == [0, 0]
                    served += sum(counts)
                case "drop":
                    await rng.choice(caches).clear("l1")
        assert served > 0


async def store(cache: AsyncCache, prompt: Any, *, flushed: bool) -> None:
    await fill(cache, prompt)
    if flushed:
        await cache.flush()


async def test_a_server_that_dies_again_and_again_costs_hits_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, the server has lost all that it had."""
    errors: list[str] = []  # in a row, while the breaker was closed
    failed, succeeded = Guard.failed, Guard.succeeded

    def fail(guard: Guard, why: str) -> None:
        if guard.breaker.state is CLOSED:
            errors.append(why)
        failed(guard, why)

    def succeed(guard: Guard, verb: str, *, is_trial: bool) -> None:
        succeeded(guard, verb, is_trial=is_trial)
        forget(guard)

    def forget(guard: Guard) -> None:
        """What is in a row: a success of one kind says nothing of a failure of another one."""
        del errors[: max(0, len(errors) - guard.breaker._failures)]

    monkeypatch.setattr(Guard, "failed", fail)
    monkeypatch.setattr(Guard, "succeeded", succeed)
    with Server() as server:
        async with opened(server, "dying") as cache:
            guard = cache.core.guards.current[0]
            deaths = served = 0
            over = False

            async def work(worker: int) -> None:
                nonlocal served
                rng = random.Random(worker)
                while not over:
                    prompt = make_prompt(CHUNKS, deaths * 40 + worker * 10 + rng.randrange(10))
                    await fill(cache, prompt)
                    await cache.flush(deadline_seconds=1)
                    await cache.clear("l1")
                    before, prefetch = deaths, cache.prefetch(prompt)
                    hits, result = await prefetch.lookup_done, await prefetch.load_done
                    async with cache.read(prefetch.request_id) as lease:
                        verify(lease, prompt)
                    served += result.l2_chunks
                    if deaths == before:  # while the server lived, or was dead, all the time
                        assert result.shortfall not in (Shortfall.GONE, Shortfall.CORRUPT), "a hit that was not there"
                        assert result.chunks == hits.chunks or result.shortfall

            def serves_again() -> bool:
                return served >= CHUNKS

            workers = [asyncio.create_task(work(worker)) for worker in range(4)]
            try:
                for _ in range(rounds(3, 50)):
                    forget(guard)
                    deaths += 1
                    await asyncio.to_thread(server.kill)
                    await until(lambda: guard.breaker.state is not CLOSED, workers)
                    assert len(errors) == 3
                    await asyncio.to_thread(server.start)
                    back = time.monotonic()
                    await until(lambda: guard.breaker.state is CLOSED, workers)
                    assert time.monotonic() - back < 30
                    served = 0
                    await until(serves_again, workers)
            finally:
                over = True
                await asyncio.gather(*workers)


async def until(condition: Any, workers: list[asyncio.Task[None]]) -> None:
    """Wait for a condition while the workers go on; what one of them raises is raised."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.005)
            for worker in workers:
                if worker.done():
                    worker.result()


@pytest.mark.parametrize("codec", ["", "zstd"])
@pytest.mark.parametrize("chunks", [1, 3])
async def test_what_is_denied_of_one_prompt_leaves_the_bucket_in_use(server: Server, chunks: int, codec: str) -> None:
    bad, sound = make_prompt(chunks, 1), make_prompt(CHUNKS, 2)
    async with opened(server, f"alone-{chunks}-{codec}", **{"codec": codec} if codec else {}) as cache:
        server.faults()
        await fill_l2(cache, bad)
        paths = [request.removeprefix("PUT ") for request in server.seen() if request.startswith("PUT ")]
        assert len(paths) == chunks
        await fill_l2(cache, sound)
        server.faults(*({"request": f"GET {path}", "status": 403, "code": "InvalidObjectState"} for path in paths))
        await assert_fails_alone(cache, bad, sound)
        server.faults()
