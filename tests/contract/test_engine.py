"""The engine of examples/engine.py: whatever becomes of a load, it answers as without a cache, and holds nothing."""

import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest

from async_cache import CacheConfig
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import FailingBackend, GatedBackend, ThrottledBackend

from .support import PAGE, assert_nothing_held, make_cache, open_cache, settle

PATH = Path(__file__).parents[2] / "examples" / "engine.py"
spec = importlib.util.spec_from_file_location("engine_example", PATH)
engine = importlib.util.module_from_spec(spec)
sys.modules["engine_example"] = engine
spec.loader.exec_module(engine)

TOKENS, NEW = list(range(60)), 8  # 7 chunks, and what is left
BLOCKS = 64


async def answer(cache, tokens=TOKENS, request_id="r", **options):
    """The answer of an engine of its own, and how many tokens it has computed; all of its blocks are free then."""
    made = engine.Engine(cache, BLOCKS, **options)
    running = asyncio.create_task(made.run())
    try:
        return await made.generate(request_id, tokens, NEW), made.computed
    finally:
        await made.close()
        running.cancel()
        assert sorted(made.free) == list(range(BLOCKS))


async def right_answer(tokens=TOKENS):
    async with open_cache() as cache:
        told, computed = await answer(cache, tokens)
        assert computed == len(tokens) + NEW - 1
        return told


async def quiet(cache):
    await settle()
    await assert_nothing_held(cache)


async def forgotten_by_memory(cache):
    assert (await cache.flush()).pending == 0
    await cache.clear("l1")


async def test_what_one_engine_has_computed_another_one_has_not_to():
    right = await right_answer()
    memory = MemoryBackend()
    async with open_cache(memory) as cache:
        assert (await answer(cache))[0] == right
        again, computed = await answer(cache)
        assert again == right
        assert computed == 60 + NEW - 1 - 56  # the prompt has 7 whole chunks
        await forgotten_by_memory(cache)
        assert await answer(cache) == (right, computed)
        await quiet(cache)


async def test_what_never_fits_is_refused_and_holds_nobody_up():
    async with open_cache() as cache:
        with pytest.raises(ValueError, match="it takes 65 blocks, and there are 64"):
            await answer(cache, list(range(64 * engine.BLOCK + 1 - NEW)))
        assert (await answer(cache))[0] == await right_answer()
        await quiet(cache)


@pytest.mark.parametrize("number", range(7))
async def test_where_the_kth_chunk_cannot_be_loaded_the_rest_is_computed(number):
    right = await right_answer()
    prompt = engine.LAYOUT.prompt(TOKENS)
    bad = engine.LAYOUT.objects.keys([(prompt.chunk_hashes[number], 1)])
    backend = FailingBackend(MemoryBackend(), "load", times=None, keys=bad)
    async with open_cache(ThrottledBackend(backend, bytes_per_second=1000)) as cache:
        await answer(cache)
        await forgotten_by_memory(cache)
        assert await answer(cache) == (right, 60 + NEW - 1 - 8 * number)
        await quiet(cache)


async def test_an_abort_at_any_time_frees_all_blocks_and_holds_nothing():
    right = await right_answer()
    async with open_cache(
        ThrottledBackend(MemoryBackend(), bytes_per_second=1000), load_timeout_seconds=100.0
    ) as cache:
        await answer(cache)
        made = engine.Engine(cache, BLOCKS)
        running = asyncio.create_task(made.run())
        for turn in range(60):
            await forgotten_by_memory(cache)
            task = asyncio.create_task(made.generate("r", TOKENS, NEW))
            if turn < 30:
                for _ in range(turn):
                    await asyncio.sleep(0)
            else:
                await asyncio.sleep((turn - 30) * 0.04)  # a chunk takes 0.128 s
            task.cancel()
            await asyncio.wait([task])
            await made.close()
            assert sorted(made.free) == list(range(BLOCKS))
            await quiet(cache)
        running.cancel()
        assert (await answer(cache))[0] == right


async def test_requests_that_come_together_run_together_and_wait_for_blocks():
    prompts = [[*range(40), n] for n in range(12)]
    right = [await right_answer(tokens) for tokens in prompts]
    async with open_cache(MemoryBackend()) as cache:
        answers, _ = await engine.serve(cache, [(f"r{n}", tokens) for n, tokens in enumerate(prompts)])
        assert answers == right
        answers, computed = await engine.serve(cache, [(f"r{n}", tokens) for n, tokens in enumerate(prompts)])
        assert (answers, computed) == (right, 12 * (41 + NEW - 1 - 40))
        await quiet(cache)


async def test_a_decoding_engine_waits_for_one_that_prefills():
    right = await right_answer()
    async with open_cache() as cache:
        # What the other engine does: announce the whole prompt, and commit its chunks as it has computed them.
        prefilling = engine.Engine(cache, BLOCKS)
        request = engine.Request("p", TOKENS, NEW)
        request.blocks = list(range(BLOCKS))
        writer = await cache.store(request.prompt)
        decoding = asyncio.create_task(answer(cache, request_id="d", wait_for_writers_seconds=60.0))
        while request.computed < 56:
            await asyncio.sleep(1)
            prefilling._compute(request)
            for task in request.saving:
                task.cancel()
            request.saving.clear()
            for chunk in writer.chunks[: request.computed // 8]:
                prefilling._copy(request, chunk.index, chunk.views[0], into_blocks=False)
                chunk.commit()
        assert await decoding == (right, 60 + NEW - 1 - 56)
        writer.close()
        await quiet(cache)


async def test_without_the_cache_it_goes_on():
    right = await right_answer()
    gate = GatedBackend(MemoryBackend())
    async with make_cache(CacheConfig(l1_bytes=64 * PAGE, l2=[]), [gate]) as cache:
        await answer(cache)
        await forgotten_by_memory(cache)
        gate.hold("load")
        waiting = asyncio.create_task(answer(cache))
        await gate.reached("load")
        await cache.close()
        assert await waiting == (right, 60 + NEW - 1)


async def test_what_is_saved_of_an_aborted_request_is_its_own_though_others_want_its_blocks():
    """Blocks for one request: the next one writes to them as soon as they are free."""
    for turn in range(12, 40, 2):
        tokens, others = [*TOKENS[:-1], 1000 + turn], [2000 + turn, *TOKENS]
        right = [await right_answer(tokens), await right_answer(others)]
        async with open_cache() as cache:
            made = engine.Engine(cache, 18)
            running = asyncio.create_task(made.run())
            aborted = asyncio.create_task(made.generate("a", tokens, NEW))
            next_one = asyncio.create_task(made.generate("b", others, NEW))
            for _ in range(turn):
                await asyncio.sleep(0)
            aborted.cancel()
            assert await next_one == right[1]
            await made.close()
            running.cancel()
            assert (await answer(cache, tokens))[0] == right[0]
            await quiet(cache)
