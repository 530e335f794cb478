"""What storage evicts of a prefix, however its parts came and were used: the tail, for the head serves without it."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, Prompt
from async_cache.l2.memory import MemoryBackend

BYTES = 4000
LAYOUT = ModelLayout("model", (ObjectGroup((BYTES,), "uint8"),), chunk_tokens=4)
TWO_RANKS = ModelLayout("model", (ObjectGroup((BYTES // 2,), "uint8"),), chunk_tokens=4, world_size=2)
ROOM = 20  # chunks
PAGE_BYTES = 4096  # an object in a directory takes whole pages
DIRECTORY_BYTES = 7 * PAGE_BYTES  # of the disk, beside what is stored
LENGTH = 16

PIECES = [(16,), (4, 8, 12, 16), tuple(range(1, 17)), (1, 16), (15, 16)]
KINDS = ["memory", "fs"]


def storage(kind: str, folder: Path, chunks: int = ROOM) -> CacheConfig:
    if kind == "memory":
        return CacheConfig(l1_bytes=2**20, l2=[f"memory://?capacity={chunks * BYTES}"])
    return CacheConfig(l1_bytes=2**20, l2=[f"fs://{folder}?capacity={chunks * PAGE_BYTES + DIRECTORY_BYTES}"])


def prompt(chunks: int, number: int = 0, layout: ModelLayout = LAYOUT) -> Prompt:
    return layout.prompt([number] * chunks * layout.chunk_tokens)


async def fill(cache: AsyncCache, of: Prompt, rank: int = 0) -> None:
    async with cache.store(of, rank=rank) as writer:
        for chunk in writer:
            chunk.commit()


async def others(cache: AsyncCache, count: int, first: int = 100) -> None:
    """Store so many prompts of one chunk."""
    for number in range(first, first + count):
        await fill(cache, prompt(1, number))
    await cache.flush()


async def loaded(cache: AsyncCache, of: Prompt, skip_chunks: int = 0) -> int:
    prefetch = cache.prefetch(of, skip_tokens=skip_chunks * of.layout.chunk_tokens)
    chunks = (await prefetch.load_done).chunks
    await cache.end_request(prefetch.request_id)
    return chunks


@pytest.mark.parametrize("flush_each", [True, False])
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("kind", KINDS)
async def test_tails_first_in_whatever_pieces_it_was_stored(
    tmp_path: Path, kind: str, pieces: tuple[int, ...], flush_each: bool
) -> None:
    async with AsyncCache(storage(kind, tmp_path)) as cache:
        for end in pieces:
            await fill(cache, prompt(end))
            if flush_each:
                await cache.flush()
        await cache.flush()
        await others(cache, 14)
        await cache.clear("l1")
        assert await loaded(cache, prompt(LENGTH)) == ROOM - 14


@pytest.mark.parametrize("kind", KINDS)
async def test_tails_first_after_a_load(tmp_path: Path, kind: str) -> None:
    async with AsyncCache(storage(kind, tmp_path)) as cache:
        await fill(cache, prompt(LENGTH))
        await cache.flush()
        await cache.clear("l1")
        assert await loaded(cache, prompt(LENGTH)) == LENGTH
        await cache.clear("l1")
        await others(cache, 14)
        await cache.clear("l1")
        assert await loaded(cache, prompt(LENGTH)) == ROOM - 14


@pytest.mark.parametrize("how", ["prefetch", "lookup", "skip"])
@pytest.mark.parametrize("kind", KINDS)
async def test_tails_first_where_only_the_tail_was_asked_of_storage(tmp_path: Path, kind: str, how: str) -> None:
    """The head is in memory, of L1 or of the engine: it is in use all the same."""
    async with AsyncCache(storage(kind, tmp_path)) as cache:
        await fill(cache, prompt(LENGTH))
        await cache.flush()
        await cache.clear("l1")
        if how == "skip":
            assert await loaded(cache, prompt(LENGTH), skip_chunks=8) == 8
        else:
            assert await loaded(cache, prompt(8)) == 8
            if how == "lookup":
                assert (await cache.lookup(prompt(LENGTH))).l2_chunks == 8
            else:
                assert await loaded(cache, prompt(LENGTH)) == LENGTH
        await others(cache, 14)
        await cache.clear("l1")
        assert await loaded(cache, prompt(LENGTH)) == ROOM - 14


@pytest.mark.parametrize("kind", KINDS)
async def test_tails_first_where_ranks_were_stored_apart(tmp_path: Path, kind: str) -> None:
    room, left = (ROOM, ROOM - 14) if kind == "memory" else (2 * ROOM, (2 * ROOM - 14) // 2)  # a page an object
    async with AsyncCache(storage(kind, tmp_path, room)) as cache:
        for rank in (0, 1):
            for end in (6, LENGTH):
                await fill(cache, prompt(end, layout=TWO_RANKS), rank)
                await cache.flush()
        await others(cache, 14)
        await cache.clear("l1")
        assert await loaded(cache, prompt(LENGTH, layout=TWO_RANKS)) == left


async def test_tails_first_after_a_restart(tmp_path: Path) -> None:
    async with AsyncCache(storage("fs", tmp_path)) as cache:
        await fill(cache, prompt(LENGTH))
        await cache.flush()
    async with AsyncCache(storage("fs", tmp_path, ROOM + 1)) as cache:  # beside a page of the index of before
        await others(cache, 14)
        await cache.clear("l1")
        assert await loaded(cache, prompt(LENGTH)) == ROOM - 14


@pytest.mark.parametrize("kind", KINDS)
async def test_a_prompt_longer_than_storage_keeps_its_head(tmp_path: Path, kind: str) -> None:
    async with AsyncCache(storage(kind, tmp_path, 12)) as cache:
        for round_number in range(2):
            assert await loaded(cache, prompt(LENGTH)) == 12 * (round_number > 0)
            await fill(cache, prompt(LENGTH))
            await cache.flush()
            await cache.clear("l1")


async def test_conversations_that_grow_find_as_much_as_in_memory_of_the_same_size(tmp_path: Path) -> None:
    """A head that all share, histories of different lengths, asked for at random: what is found is a prefix."""

    async def found(config: CacheConfig, *, in_storage: bool) -> int:
        chance, chunks = random.Random(1), 0
        turns = [chance.randrange(4, 20) for _ in range(12)]
        async with AsyncCache(config) as cache:
            for _ in range(150):
                who = chance.randrange(12)
                turns[who] += chance.randrange(3)
                of = LAYOUT.prompt([7] * 16 + [who] * 4 * turns[who])
                chunks += await loaded(cache, of)
                await fill(cache, of)
                if in_storage:
                    await cache.flush()
                    await cache.clear("l1")
        return chunks

    memory = await found(CacheConfig(l1_bytes=40 * 4096, l2=[], prefetch_share=1.0), in_storage=False)
    assert await found(storage("memory", tmp_path, 40), in_storage=True) > 0.95 * memory


async def test_a_write_of_a_long_prompt_keeps_no_more_of_it_at_a_time_than_the_loop_can_bear() -> None:
    class Seen(MemoryBackend):
        most = 0

        def pin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
            self.most = max(self.most, len(chunk_hashes))
            super().pin_prefix(chunk_hashes)

    backend = Seen()
    layout = ModelLayout("model", (ObjectGroup((8,), "uint8"),), chunk_tokens=1)
    async with AsyncCache(CacheConfig(l1_bytes=2**26), backends=[backend]) as cache:
        await fill(cache, prompt(6000, layout=layout))
        await cache.flush()
        assert backend.usage().objects == 6000
    assert 256 < backend.most <= 2048 + 256
