"""Read leases: who reads, once, what they see, and how they leave."""

import asyncio

import pytest
import torch

from async_cache import ObjectGroup, ReadConflictError, Shortfall, UnknownRequestError
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import GatedBackend

from .support import (
    OBJECT_BYTES,
    PAGE,
    SMALL,
    TWO_RANKS,
    assert_nothing_held,
    attempt,
    count_hits,
    fill,
    make_layout,
    make_prompt,
    open_cache,
    pattern,
    seed,
    settle,
    verify,
)

MIXED = make_layout(
    ObjectGroup((3, 5), "float16"), ObjectGroup((7,), "uint8", ranks=(1,)), ObjectGroup((2, 2), "float32"), world_size=2
)


async def ready(cache, prompt, request_id="a", **options):
    await fill(cache, prompt)
    prefetch = cache.prefetch(prompt, request_id=request_id, **options)
    await prefetch.load_done
    return prefetch


async def test_a_read_gives_the_chunks_in_order_with_their_bytes():
    prompt = make_prompt(5)
    async with open_cache() as cache:
        prefetch = await ready(cache, prompt)
        async with cache.read("a") as lease:
            assert lease.result == await prefetch.load_done
            assert len(lease) == 5
            assert [chunk.index for chunk in lease] == [0, 1, 2, 3, 4]
            assert lease[3].index == 3
            assert bytes(lease[3].views[0]) == pattern(prompt, 3)


async def test_two_tasks_that_enter_one_lease_at_once_have_the_same_read():
    prompt = make_prompt(3)
    gate = GatedBackend(MemoryBackend(), "load")
    async with open_cache(gate) as cache:
        await fill(cache, prompt)
        await cache.flush()
        await cache.clear("l1")
        cache.prefetch(prompt, request_id="a")
        lease = cache.read("a")
        given_up, *entering = [asyncio.create_task(entered(lease)) for _ in range(3)]
        await asyncio.sleep(0)
        given_up.cancel()  # and whoever comes next enters
        gate.release()
        assert await asyncio.gather(*entering) == [lease, lease]
        assert verify(lease, prompt) == [0, 1, 2]
        lease.release()
        await assert_nothing_held(cache)


async def entered(lease):
    return await lease


async def test_a_read_can_be_awaited_and_released_later():
    prompt = make_prompt(3)
    async with open_cache() as cache:
        await ready(cache, prompt)
        lease = await cache.read("a")
        assert verify(lease, prompt) == [0, 1, 2]
        assert (await cache.stats()).leases == 3
        lease.release()
        await assert_nothing_held(cache)


async def test_a_read_may_be_released_early_and_more_than_once():
    prompt = make_prompt(3)
    async with open_cache() as cache:
        await ready(cache, prompt)
        async with cache.read("a") as lease:
            verify(lease, prompt)
            assert lease.release() is None
            await assert_nothing_held(cache)
            lease.release()
        lease.release()
        await assert_nothing_held(cache)


async def test_a_second_release_gives_back_nothing_of_another_reader():
    prompt = make_prompt(3, layout=TWO_RANKS)
    async with open_cache() as cache:
        await ready(cache, prompt)
        first, second = await cache.read("a", rank=0), await cache.read("a", rank=1)
        first.release()
        first.release()
        assert (await cache.stats()).leases == 3
        assert verify(second, prompt, 1) == [0, 1, 2]
        second.release()
        await assert_nothing_held(cache)


async def test_a_read_waits_for_the_load():
    prompt = make_prompt(3)
    gate = GatedBackend(MemoryBackend())
    await seed(gate, prompt)
    async with open_cache(gate) as cache:
        gate.hold("load")
        cache.prefetch(prompt, request_id="a")

        async def worker():
            async with cache.read("a") as lease:
                return verify(lease, prompt)

        task = asyncio.ensure_future(worker())
        await gate.reached("load")
        await settle()
        assert not task.done()
        gate.release("load")
        assert await task == [0, 1, 2]


async def test_each_rank_and_reader_reads_once_and_the_last_ends_the_request():
    layout = make_layout(world_size=2, readers_per_rank=2)
    prompt = make_prompt(2, layout=layout)
    async with open_cache() as cache:
        await ready(cache, prompt)
        places = [(rank, reader) for rank in (0, 1) for reader in (0, 1)]
        for number, (rank, reader) in enumerate(places):
            assert (await cache.query_lookup_hits("a")).chunks == 2
            async with cache.read("a", rank=rank, reader=reader) as lease:
                assert verify(lease, prompt, rank) == [0, 1]
                with pytest.raises(ReadConflictError):
                    await attempt(lambda rank=rank, reader=reader: cache.read("a", rank=rank, reader=reader))
            if number < 3:
                with pytest.raises(ReadConflictError):
                    await attempt(lambda rank=rank, reader=reader: cache.read("a", rank=rank, reader=reader))
        with pytest.raises(UnknownRequestError):
            await cache.query_lookup_hits("a")
        await assert_nothing_held(cache)


async def test_readers_read_side_by_side():
    prompt = make_prompt(2, layout=make_layout(readers_per_rank=3))
    async with open_cache() as cache:
        await ready(cache, prompt)
        leases = [await cache.read("a", reader=reader) for reader in (2, 0, 1)]
        for lease in leases:
            assert verify(lease, prompt) == [0, 1]
        leases[1].release()
        leases[2].release()
        assert (await cache.stats()).leases == 2
        leases[0].release()
        await assert_nothing_held(cache)


@pytest.mark.parametrize(("rank", "reader"), [(2, 0), (-1, 0), (0, 1), (0, -1)])
async def test_a_rank_or_reader_out_of_range_is_a_value_error(rank, reader):
    prompt = make_prompt(2, layout=TWO_RANKS)
    async with open_cache() as cache:
        await ready(cache, prompt)
        with pytest.raises(ValueError, match=r"rank|reader"):
            await attempt(lambda: cache.read("a", rank=rank, reader=reader))
        for good in (0, 1):
            async with cache.read("a", rank=good) as lease:
                assert len(lease) == 2
        await assert_nothing_held(cache)


async def test_views_are_read_only_bytes():
    async with open_cache() as cache:
        await ready(cache, make_prompt(1))
        async with cache.read("a") as lease:
            (view,) = lease[0].views
            assert isinstance(view, memoryview)
            assert isinstance(lease[0].views, tuple)
            assert (view.readonly, view.format, view.itemsize, view.nbytes) == (True, "B", 1, OBJECT_BYTES)
            with pytest.raises(TypeError):
                view[0] = 1


@pytest.mark.memory
async def test_the_views_of_a_chunk_are_contiguous_from_its_offset():
    prompt = make_prompt(3, layout=MIXED)
    async with open_cache() as cache:
        await ready(cache, prompt)
        arena = memoryview(cache.memory).cast("B")
        for rank in (0, 1):
            async with cache.read("a", rank=rank) as lease:
                assert verify(lease, prompt, rank) == [0, 1, 2]
                for chunk in lease:
                    body = b"".join(bytes(view) for view in chunk.views if view is not None)
                    assert bytes(arena[chunk.offset : chunk.offset + len(body)]) == body
        arena.release()


async def test_a_group_that_the_rank_lacks_has_no_view_and_no_tensor():
    prompt = make_prompt(2, layout=MIXED)
    async with open_cache() as cache:
        await ready(cache, prompt)
        async with cache.read("a", rank=0) as zero, cache.read("a", rank=1) as one:
            assert [view is None for view in zero[0].views] == [False, True, False]
            assert [view is None for view in one[0].views] == [False, False, False]
            assert zero[0].tensors()[1] is None


async def test_tensors_have_the_shape_and_type_of_the_group_over_the_same_memory():
    prompt = make_prompt(2, layout=MIXED)
    async with open_cache() as cache:
        await ready(cache, prompt)
        async with cache.read("a", rank=1) as lease:
            for chunk in lease:
                tensors = chunk.tensors()
                assert [tuple(tensor.shape) for tensor in tensors] == [(3, 5), (7,), (2, 2)]
                assert [tensor.dtype for tensor in tensors] == [torch.float16, torch.uint8, torch.float32]
                for group, tensor in enumerate(tensors):
                    flat = tensor.contiguous().view(torch.uint8).flatten()
                    assert bytes(flat.tolist()) == pattern(prompt, chunk.index, 1, group)
                again = chunk.tensors()
                assert [t.data_ptr() for t in again] == [t.data_ptr() for t in tensors]
                assert tensors[1].data_ptr() - tensors[0].data_ptr() == 30


@pytest.mark.memory
async def test_two_requests_read_the_same_memory():
    prompt = make_prompt(2)
    async with open_cache() as cache:
        await ready(cache, prompt, "a")
        await cache.prefetch(prompt, request_id="b").load_done
        async with cache.read("a") as first, cache.read("b") as second:
            assert [chunk.offset for chunk in first] == [chunk.offset for chunk in second]
            assert first[1].tensors()[0].data_ptr() == second[1].tensors()[0].data_ptr()


async def test_every_kind_of_number_comes_as_its_tensor():
    names = ["bool", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "float8_e4m3fn"]
    layout = make_layout(*(ObjectGroup((2,), name) for name in names))
    prompt = make_prompt(1, layout=layout)
    async with open_cache() as cache:
        async with cache.store(prompt) as writer:
            for tensor, name in zip(writer[0].tensors(), names, strict=True):
                assert tensor.dtype is getattr(torch, name)
                tensor.copy_(torch.tensor([1, 0]).to(tensor.dtype))
            writer[0].commit()
        cache.prefetch(prompt, request_id="a")
        async with cache.read("a") as lease:
            for tensor, name in zip(lease[0].tensors(), names, strict=True):
                assert tensor.dtype is getattr(torch, name)
                assert tensor.to(torch.float64).tolist() == [1, 0]


async def test_a_read_of_nothing_is_an_empty_lease_that_ends_the_request():
    async with open_cache() as cache:
        cache.prefetch(make_prompt(3), request_id="a")
        async with cache.read("a") as lease:
            assert len(lease) == 0
            assert list(lease) == []
            assert lease.result.chunks == 0
        with pytest.raises(UnknownRequestError):
            await cache.query_status("a")
        await assert_nothing_held(cache)


async def test_a_read_of_a_cancelled_prefetch_has_no_chunks():
    gate = GatedBackend(MemoryBackend())
    await seed(gate, make_prompt(2))
    async with open_cache(gate) as cache:
        gate.hold("load")
        prefetch = cache.prefetch(make_prompt(2), request_id="a")
        await gate.reached("load")
        prefetch.cancel()
        async with cache.read("a") as lease:
            assert len(lease) == 0
            assert lease.result.shortfall is Shortfall.CANCELLED
        await settle()
        await assert_nothing_held(cache)


async def test_chunks_have_absolute_indices_after_a_skip():
    prompt = make_prompt(5)
    async with open_cache() as cache:
        await ready(cache, prompt, skip_tokens=8)
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [2, 3, 4]
            assert lease.result.start_chunk == 2


async def test_outside_a_window_there_is_no_view():
    layout = make_layout(SMALL, ObjectGroup((8,), "uint8", window_chunks=2))
    prompt = make_prompt(4, layout=layout)
    async with open_cache() as cache:
        await ready(cache, prompt)
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [0, 1, 2, 3]
            assert [chunk.views[1] is None for chunk in lease] == [True, True, False, False]
            assert [chunk.tensors()[1] is None for chunk in lease] == [True, True, False, False]
            assert all(chunk.views[0] is not None for chunk in lease)


async def test_an_entered_read_keeps_its_memory_when_the_request_is_ended():
    layout = make_layout(ObjectGroup((PAGE,), "uint8"))
    prompt = make_prompt(6, layout=layout)
    async with open_cache(pages=16) as cache:
        await ready(cache, prompt)
        async with cache.read("a") as lease:
            await cache.end_request("a")
            with pytest.raises(UnknownRequestError):
                await cache.query_lookup_hits("a")
            for number in range(2, 12):
                await fill(cache, make_prompt(16, number, layout))
            assert verify(lease, prompt) == list(range(6))
            assert (await cache.stats()).leased_bytes >= 6 * PAGE
        await assert_nothing_held(cache)


async def test_an_ended_request_can_not_be_read_by_the_next():
    prompt = make_prompt(2, layout=TWO_RANKS)
    async with open_cache() as cache:
        await ready(cache, prompt)
        async with cache.read("a", rank=0):
            await cache.end_request("a")
            with pytest.raises(UnknownRequestError):
                await attempt(lambda: cache.read("a", rank=1))
        await assert_nothing_held(cache)


async def test_who_waits_in_a_read_when_the_request_is_ended_gets_an_error():
    gate = GatedBackend(MemoryBackend())
    await seed(gate, make_prompt(2))
    async with open_cache(gate) as cache:
        gate.hold("load")
        cache.prefetch(make_prompt(2), request_id="a")

        async def worker():
            async with cache.read("a"):
                pass

        task = asyncio.ensure_future(worker())
        await gate.reached("load")
        await settle()
        await cache.end_request("a")
        with pytest.raises(UnknownRequestError):
            await task


async def test_an_error_inside_a_read_releases_it():
    async with open_cache() as cache:
        await ready(cache, make_prompt(2))
        with pytest.raises(ZeroDivisionError):
            async with cache.read("a"):
                raise ZeroDivisionError
        await assert_nothing_held(cache)


async def test_a_cancelled_task_inside_a_read_releases_it():
    async with open_cache() as cache:
        await ready(cache, make_prompt(2))

        async def worker():
            async with cache.read("a"):
                await asyncio.sleep(1000)

        task = asyncio.ensure_future(worker())
        await settle()
        assert (await cache.stats()).leases == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await assert_nothing_held(cache)


async def test_a_read_that_was_made_but_not_entered_reads_nothing():
    prompt = make_prompt(2)
    async with open_cache() as cache:
        await ready(cache, prompt)
        cache.read("a")
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [0, 1]
        await assert_nothing_held(cache)


async def test_what_was_read_stays_cached():
    async with open_cache() as cache:
        await ready(cache, make_prompt(3))
        async with cache.read("a"):
            pass
        assert await count_hits(cache, make_prompt(3)) == 3
