"""Writers: reserve, fill, commit or discard."""

import asyncio
import gc
import os

import pytest

from async_cache import ObjectGroup, WriterClosedError
from async_cache.l2.memory import MemoryBackend

from .support import (
    OBJECT_BYTES,
    PAGE,
    TWO_RANKS,
    assert_nothing_held,
    attempt,
    count_hits,
    fill,
    fill_l2,
    make_layout,
    make_prompt,
    object_keys,
    open_cache,
    pattern,
    read_back,
    settle,
    verify,
    write,
)


async def test_a_writer_gives_the_chunks_that_l1_lacks_in_order():
    prompt = make_prompt(5)
    async with open_cache() as cache:
        await fill(cache, prompt, chunks=[0, 2])
        async with cache.store(prompt) as writer:
            assert len(writer) == 3
            assert [chunk.index for chunk in writer] == [1, 3, 4]
            assert writer[1].index == 3
            assert writer.shortfall is None


async def test_a_writer_begins_at_its_start_chunk():
    prompt = make_prompt(5)
    async with open_cache() as cache:
        async with cache.store(prompt, start_chunk=3) as writer:
            assert [chunk.index for chunk in writer] == [3, 4]
        async with cache.store(prompt, start_chunk=5) as writer:
            assert len(writer) == 0


async def test_a_writer_of_a_prompt_that_is_there_has_nothing_to_do():
    async with open_cache() as cache:
        await fill(cache, make_prompt(3))
        for prompt in (make_prompt(3), make_prompt(0)):
            async with cache.store(prompt) as writer:
                assert (len(writer), writer.shortfall) == (0, None)


async def test_a_writer_gives_what_only_l2_has():
    async with open_cache(MemoryBackend()) as cache:
        await fill_l2(cache, make_prompt(3))
        async with cache.store(make_prompt(3)) as writer:
            assert len(writer) == 3


async def test_the_views_of_a_writer_are_writable_bytes():
    layout = make_layout(ObjectGroup((5,), "float16"), ObjectGroup((3,), "uint8", ranks=(1,)), world_size=2)
    prompt = make_prompt(1, layout=layout)
    async with open_cache() as cache:
        async with cache.store(prompt, rank=1) as writer:
            assert [view.nbytes for view in writer[0].views] == [10, 3]
            assert all((view.readonly, view.format) == (False, "B") for view in writer[0].views)
            assert [tuple(tensor.shape) for tensor in writer[0].tensors()] == [(5,), (3,)]
        async with cache.store(prompt, rank=0) as writer:
            assert writer[0].views[1] is None


async def test_what_is_written_through_tensors_is_read():
    layout = make_layout(ObjectGroup((4,), "float32"))
    prompt = make_prompt(1, layout=layout)
    async with open_cache() as cache:
        async with cache.store(prompt) as writer:
            writer[0].tensors()[0][:] = 1.5
            writer[0].commit()
        cache.prefetch(prompt, request_id="a")
        async with cache.read("a") as lease:
            assert lease[0].tensors()[0].tolist() == [1.5] * 4


async def test_a_chunk_is_absent_until_its_writer_commits_it():
    prompt = make_prompt(3)
    async with open_cache(MemoryBackend()) as cache:
        async with cache.store(prompt) as writer:
            for number, chunk in enumerate(writer):
                write(chunk, prompt)
                assert await count_hits(cache, prompt) == number
                assert (await cache.prefetch(prompt, request_id="a").load_done).chunks == number
                await cache.end_request("a")
                assert chunk.commit() is None
                assert await count_hits(cache, prompt) == number + 1
                assert await read_back(cache, prompt) == number + 1
        await assert_nothing_held(cache)


async def test_chunks_may_be_committed_in_any_order():
    prompt = make_prompt(3)
    async with open_cache() as cache, cache.store(prompt) as writer:
        for index, count in ((2, 0), (0, 1), (1, 3)):
            write(writer[index], prompt)
            writer[index].commit()
            assert await count_hits(cache, prompt) == count


async def test_room_that_is_reserved_is_counted_and_given_back():
    async with open_cache() as cache:
        async with cache.store(make_prompt(4)) as writer:
            assert (await cache.stats()).reserved_bytes >= 4 * OBJECT_BYTES
            writer[0].commit()
            reserved = (await cache.stats()).reserved_bytes
            assert reserved >= 3 * OBJECT_BYTES
        await assert_nothing_held(cache)
        assert (await cache.stats()).l1_chunks == 1


async def test_leaving_discards_what_was_not_committed():
    prompt = make_prompt(4)
    async with open_cache() as cache:
        async with cache.store(prompt) as writer:
            for chunk in writer:
                write(chunk, prompt)
            writer[0].commit()
        assert await count_hits(cache, prompt) == 1
        await assert_nothing_held(cache)


@pytest.mark.embedded
async def test_the_room_of_a_chunk_of_which_a_tensor_is_left_is_not_used_again_while_it_lives():
    async with open_cache() as cache:
        async with cache.store(make_prompt(2)) as writer:
            tensor = writer[0].tensors()[0]
        stats = await cache.stats()
        assert (stats.reserved_bytes, stats.quarantined_bytes) == (0, PAGE)
        tensor[:] = 1
        del tensor
        await assert_nothing_held(cache)


async def test_an_error_while_writing_discards_what_was_not_committed():
    prompt = make_prompt(4)
    async with open_cache() as cache:

        async def engine():
            async with cache.store(prompt) as writer:
                write(writer[0], prompt)
                writer[0].commit()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await engine()
        assert await read_back(cache, prompt) == 1
        await assert_nothing_held(cache)


async def test_a_cancelled_task_discards_what_it_did_not_commit():
    async with open_cache() as cache:

        async def engine():
            async with cache.store(make_prompt(4)):
                await asyncio.sleep(1000)

        task = asyncio.ensure_future(engine())
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await count_hits(cache, make_prompt(4)) == 0
        await assert_nothing_held(cache)


async def test_a_writer_can_be_awaited_and_closed_later_and_twice():
    prompt = make_prompt(2)
    async with open_cache() as cache:
        writer = await cache.store(prompt)
        write(writer[0], prompt)
        writer[0].commit()
        assert writer.close() is None
        writer.close()
        await assert_nothing_held(cache)
        assert await read_back(cache, prompt) == 1


async def test_a_commit_after_the_writer_was_closed_raises():
    prompt = make_prompt(2)
    async with open_cache() as cache:
        async with cache.store(prompt) as writer:
            left = writer[1]
        with pytest.raises(WriterClosedError):
            left.commit()
        assert await count_hits(cache, prompt) == 0
        await assert_nothing_held(cache)


async def test_the_first_commit_of_a_chunk_wins():
    prompt = make_prompt(2)
    async with open_cache(MemoryBackend()) as cache:
        async with cache.store(prompt) as first, cache.store(prompt) as second:
            assert len(first) == len(second) == 2
            for number, writer in enumerate((first, second)):
                for chunk in writer:
                    write(chunk, prompt, version=number)
            second[1].commit()
            first[0].commit()
            first[1].commit()
            second[0].commit()
        cache.prefetch(prompt, request_id="a")
        async with cache.read("a") as lease:
            assert [bytes(chunk.views[0]) for chunk in lease] == [pattern(prompt, 0), pattern(prompt, 1, version=1)]
        await assert_nothing_held(cache)
        flushed = await cache.flush()
        assert flushed.pending == 0
        await cache.clear(tier="l1")
        cache.prefetch(prompt, request_id="b")
        async with cache.read("b") as lease:
            assert [bytes(chunk.views[0]) for chunk in lease] == [pattern(prompt, 0), pattern(prompt, 1, version=1)]


async def test_a_read_does_not_change_when_a_later_writer_writes_on():
    prompt = make_prompt(1)
    async with open_cache() as cache, cache.store(prompt) as first, cache.store(prompt) as second:
        write(first[0], prompt)
        first[0].commit()
        cache.prefetch(prompt, request_id="a")
        async with cache.read("a") as lease:
            write(second[0], prompt, version=7)
            second[0].commit()
            assert verify(lease, prompt) == [0]


async def test_two_ranks_write_the_same_chunks_side_by_side():
    prompt = make_prompt(3, layout=TWO_RANKS)
    async with open_cache() as cache:
        async with cache.store(prompt, rank=0) as zero, cache.store(prompt, rank=1) as one:
            for rank, writer in enumerate((zero, one)):
                assert len(writer) == 3
                for chunk in writer:
                    write(chunk, prompt, rank)
            for index in range(3):
                one[index].commit()
                assert await count_hits(cache, prompt) == index
                zero[index].commit()
                assert await count_hits(cache, prompt) == index + 1
        assert await read_back(cache, prompt) == 3


async def test_a_writer_that_is_idle_beyond_its_ttl_is_closed():
    prompt = make_prompt(3)
    async with open_cache(reservation_ttl_seconds=50) as cache:
        writer = await cache.store(prompt)
        write(writer[0], prompt)
        writer[0].commit()
        await asyncio.sleep(49)
        assert (await cache.stats()).swept_reservations == 0
        await asyncio.sleep(2)
        stats = await cache.stats()
        assert (stats.swept_reservations, stats.reserved_bytes) == (1, 0)
        with pytest.raises(WriterClosedError):
            writer[1].commit()
        writer.close()
        assert await read_back(cache, prompt) == 1
        gc.collect()
        await settle()
        await assert_nothing_held(cache)


async def test_a_writer_that_commits_is_not_idle():
    prompt = make_prompt(4)
    async with open_cache(reservation_ttl_seconds=50) as cache, cache.store(prompt) as writer:
        for chunk in writer:
            await asyncio.sleep(40)
            write(chunk, prompt)
            chunk.commit()
        assert await count_hits(cache, prompt) == 4
        assert (await cache.stats()).swept_reservations == 0


async def test_leaving_a_writer_that_was_swept_is_no_error():
    async with open_cache(reservation_ttl_seconds=50) as cache:
        async with cache.store(make_prompt(3)) as writer:
            await asyncio.sleep(60)
            with pytest.raises(WriterClosedError):
                writer[0].commit()
        del writer
        gc.collect()
        await settle()
        await assert_nothing_held(cache)


@pytest.mark.embedded
async def test_the_room_of_a_writer_that_was_closed_from_outside_is_quarantined_while_its_views_are_exported():
    layout = make_layout(ObjectGroup((PAGE,), "uint8"))
    prompt = make_prompt(3, layout=layout)
    async with open_cache(pages=16, reservation_ttl_seconds=50) as cache:
        writer = await cache.store(prompt)
        view = writer[1].views[0]
        await asyncio.sleep(51)
        stats = await cache.stats()
        assert stats.reserved_bytes == 0
        assert PAGE <= stats.quarantined_bytes <= 3 * PAGE
        resident = make_prompt(16, 2, layout)
        await fill(cache, resident)
        view[:] = b"\xff" * PAGE
        assert await read_back(cache, resident) > 10
        view.release()
        del view, writer
        gc.collect()
        await asyncio.sleep(60)
        await assert_nothing_held(cache)


@pytest.mark.embedded
async def test_a_tensor_that_is_still_held_quarantines_too():
    layout = make_layout(ObjectGroup((PAGE,), "uint8"))
    async with open_cache(pages=16, reservation_ttl_seconds=50) as cache:
        writer = await cache.store(make_prompt(3, layout=layout))
        (tensor,) = writer[1].tensors()
        del writer
        await asyncio.sleep(51)
        assert (await cache.stats()).quarantined_bytes >= PAGE
        resident = make_prompt(16, 2, layout)
        await fill(cache, resident)
        tensor[:] = 255
        assert await read_back(cache, resident) > 10
        del tensor
        gc.collect()
        await asyncio.sleep(60)
        await assert_nothing_held(cache)


@pytest.mark.parametrize("rank", [2, -1])
async def test_a_rank_out_of_range_is_a_value_error(rank):
    async with open_cache() as cache:
        with pytest.raises(ValueError, match="rank"):
            await attempt(lambda: cache.store(make_prompt(1, layout=TWO_RANKS), rank=rank))
        await assert_nothing_held(cache)


async def test_what_is_committed_is_what_l2_gets_under_its_identity():
    prompt = make_prompt(3, layout=TWO_RANKS)
    backend = MemoryBackend()
    async with open_cache(backend) as cache:
        await fill(cache, prompt)
        await cache.flush()
        stored = {key: size async for key, size in backend.keys()}
        assert stored == dict.fromkeys(object_keys(prompt), OBJECT_BYTES)


async def test_no_writer_keeps_l1_mapped_when_the_cache_has_closed():
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        async with open_cache() as cache:
            await fill(cache, make_prompt(2))
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()


@pytest.mark.real_time
async def test_a_writer_that_two_tasks_open_at_once_reserves_once():
    prompt = make_layout(chunk_tokens=10_000).prompt(range(40_000))  # hashed in a thread
    async with open_cache() as cache:
        writer = cache.store(prompt)

        async def enter():
            await writer

        await asyncio.gather(enter(), enter())
        assert (await cache.stats()).reserved_bytes == 4 * PAGE
        writer.close()
        await assert_nothing_held(cache)


async def test_who_forgets_to_await_is_told_so():
    async with open_cache() as cache:
        await fill(cache, make_prompt(2))
        prefetch = cache.prefetch(make_prompt(2))
        await prefetch.load_done
        for made in (
            cache.store(make_prompt(2, 2)),
            cache.read(prefetch.request_id),
            cache.stream(prefetch.request_id),
        ):
            assert len(made) == 0
            for use in (made.__enter__, made.__iter__, lambda made=made: made.chunks):
                with pytest.raises(RuntimeError, match="`async with` or `await` it first"):
                    use()
