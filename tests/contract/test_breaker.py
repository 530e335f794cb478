"""One circuit breaker for each backend: open after three failures in a row, half open a little later, closed again."""

import pytest

from async_cache import BackendError, Shortfall
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import GatedBackend

from .support import (
    Recorder,
    Scripted,
    advance,
    assert_fails_alone,
    assert_nothing_held,
    count_hits,
    fill,
    fill_l2,
    make_prompt,
    object_keys,
    open_cache,
    read_back,
    seed,
    settle,
)

PROMPT = make_prompt(3)


async def broken(name="memory"):
    backend = Scripted(MemoryBackend(name=name))
    await seed(backend, PROMPT)
    backend.lookup_error = OSError("broken")
    return backend


async def ask(cache):
    prefetch = cache.prefetch(PROMPT)
    hits = await prefetch.lookup_done
    await cache.end_request(prefetch.request_id)
    return hits


async def test_after_three_failures_in_a_row_a_backend_is_left_alone():
    backend = await broken()
    async with open_cache(backend) as cache:
        for _ in range(10):
            hits = await ask(cache)
            assert (hits.chunks, hits.shortfall) == (0, Shortfall.BACKEND_ERROR)
        assert backend.calls["lookup"] == 3
        await assert_nothing_held(cache, backend)


async def test_a_success_between_failures_begins_the_count_anew():
    backend = await broken()
    async with open_cache(backend) as cache:
        for _ in range(4):
            backend.lookup_error = OSError("broken")
            await ask(cache)
            await ask(cache)
            backend.lookup_error = None
            assert (await ask(cache)).chunks == 3
            await cache.clear(tier="l1")
        assert backend.calls["lookup"] == 12


async def test_a_few_seconds_later_it_is_tried_once_and_left_alone_again_if_it_fails():
    backend = await broken()
    async with open_cache(backend) as cache:
        for _ in range(5):
            await ask(cache)
        for tries in (4, 5, 6):
            await advance(60)
            for _ in range(3):
                assert (await ask(cache)).shortfall is Shortfall.BACKEND_ERROR
            assert backend.calls["lookup"] == tries


async def test_it_is_used_again_when_it_is_back():
    backend = await broken()
    async with open_cache(backend) as cache:
        for _ in range(5):
            await ask(cache)
        backend.lookup_error = None
        assert (await ask(cache)).chunks == 0
        await advance(60)
        assert await read_back(cache, PROMPT) == 3
        await cache.clear(tier="l1")
        assert await read_back(cache, PROMPT) == 3
        backend.lookup_error = OSError("broken")
        await cache.clear(tier="l1")
        asked = backend.calls["lookup"]
        for _ in range(5):
            await ask(cache)
        assert backend.calls["lookup"] == asked + 3


async def test_only_one_call_tries_a_backend_that_was_left_alone():
    backend = await broken()
    gate = GatedBackend(backend)
    async with open_cache(gate) as cache:
        for _ in range(5):
            await ask(cache)
        assert gate.calls["lookup"] == 3
        await advance(60)
        backend.lookup_error = None
        gate.hold("lookup")
        first = cache.prefetch(PROMPT)
        await gate.reached("lookup", 4)
        hits = await cache.prefetch(PROMPT).lookup_done
        assert (hits.chunks, hits.shortfall) == (0, Shortfall.BACKEND_ERROR)
        assert gate.calls["lookup"] == 4
        gate.release("lookup")
        assert (await first.lookup_done).chunks == 3
        assert (await first.load_done).chunks == 3


async def test_a_breaker_cuts_off_its_own_backend_only():
    backend, sound = await broken("broken"), Recorder(MemoryBackend(name="sound"))
    await seed(sound, PROMPT)
    async with open_cache(backend, sound) as cache:
        for _ in range(6):
            assert await read_back(cache, PROMPT) == 3
            await cache.clear(tier="l1")
        assert backend.calls["lookup"] == 3
        assert sound.calls["lookup"] == 6
        await assert_nothing_held(cache, backend, sound)


async def test_l1_serves_while_the_breaker_is_open():
    backend = await broken()
    async with open_cache(backend) as cache:
        for _ in range(5):
            await ask(cache)
        await fill(cache, make_prompt(2, 2))
        assert await count_hits(cache, make_prompt(2, 2)) == 2
        assert await read_back(cache, make_prompt(2, 2)) == 2


@pytest.mark.parametrize("failures", [1, 2])
async def test_fewer_than_three_failures_cut_off_nothing(failures):
    backend = await broken()
    async with open_cache(backend) as cache:
        for _ in range(failures):
            await ask(cache)
        backend.lookup_error = None
        assert await read_back(cache, PROMPT) == 3
        await settle()


@pytest.mark.parametrize(
    "answer", [BackendError("bad sector"), LoadOutcome.FAILED], ids=lambda answer: type(answer).__name__
)
@pytest.mark.parametrize("chunks", [1, 3])
async def test_what_fails_alone_in_its_call_leaves_its_backend_in_use(chunks, answer):
    backend, bad, sound = Scripted(MemoryBackend()), make_prompt(chunks, 1), make_prompt(3, 2)
    async with open_cache(backend) as cache:
        await fill_l2(cache, bad, sound)
        backend.load_answers = dict.fromkeys(object_keys(bad), answer)
        await assert_fails_alone(cache, bad, sound)
        backend.load_answers = {}
        await fill(cache, bad)  # anew
        await cache.flush()
        await cache.clear(tier="l1")
        assert await read_back(cache, bad) == chunks
        await assert_nothing_held(cache, backend)


async def test_a_chunk_that_cannot_be_stored_leaves_its_backend_in_use():
    backend, sound = Scripted(MemoryBackend()), make_prompt(3, 2)
    async with open_cache(backend) as cache:
        await fill_l2(cache, sound)
        backend.store_answer = BackendError("refused")
        await fill(cache, make_prompt(1))
        assert (await cache.flush()).dropped == 1
        assert {backend.breaker for backend in await cache.backends()} == {"closed"}
        assert await read_back(cache, sound) == 3
        await assert_nothing_held(cache, backend)


async def test_loads_that_fail_one_after_the_other_leave_their_backend_alone_though_it_finds_them():
    backend, prompts = Scripted(MemoryBackend()), [make_prompt(1, number) for number in range(4)]
    async with open_cache(backend) as cache:
        await fill_l2(cache, *prompts)
        backend.load_answers = {key: BackendError("dead") for prompt in prompts for key in object_keys(prompt)}
        assert [(await ask_and_load(cache, prompt)).chunks for prompt in prompts] == [0] * 4
        assert backend.calls["load"] == 3
        assert {backend.breaker for backend in await cache.backends()} == {"open"}


async def ask_and_load(cache, prompt):
    prefetch = cache.prefetch(prompt)
    result = await prefetch.load_done
    await cache.end_request(prefetch.request_id)
    return result
