"""Loads and saves with a device in virtual time: all but the copy itself, as it would be on a GPU."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup
from async_cache.integrations.paged import Geometry, Pages, SaveOrder
from async_cache.integrations.paged.copies import Copies
from async_cache.integrations.paged.device import Copy, Mark
from async_cache.integrations.paged.orders import LoadOrder, Tables
from async_cache.l2.memory import MemoryBackend
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import Prompt
from async_cache.testing.backends import FailingBackend, ThrottledBackend
from tests.integrations.simulated import SimulatedDevice, poison
from tests.integrations.support import BLOCK, CHUNK, caches, geometry
from tests.virtual import virtual

CHUNKS = 4
TOKENS = list(range(CHUNKS * CHUNK))
BLOCKS = [3, 4, 7, 2, 9, 11, 1, 5]
OTHERS = [12, 2, 15, 6, 1, 8, 3, 10]


class Leased:
    """A stream of which the memory is another one's as soon as it is released."""

    def __init__(self, client: "Poisoning", stream: Any):
        self._client, self._stream = client, stream
        self._copies: dict[int, list[torch.Tensor | None]] = {}

    def __enter__(self) -> "Leased":
        self._client.leased += 1
        return self

    def __exit__(self, *_: object) -> None:
        for tensor in (tensor for tensors in self._copies.values() for tensor in tensors if tensor is not None):
            poison(tensor)
        self._client.leased -= 1
        self._stream.release()

    def __getitem__(self, numbers: slice) -> list["LeasedChunk"]:
        return [LeasedChunk(self, chunk) for chunk in self._stream[numbers]]

    def __getattr__(self, name: str) -> Any:
        return self._client.held if name == "held" else getattr(self._stream, name)


class LeasedChunk:
    def __init__(self, lease: Leased, chunk: Any):
        self.index, self.objects, self._lease, self._chunk = chunk.index, chunk.objects, lease, chunk

    def tensors(self) -> list[torch.Tensor | None]:
        tensors = [None if it is None else it.clone() for it in self._chunk.tensors()]
        self._lease._copies[len(self._lease._copies)] = tensors
        return tensors


class Poisoning:
    """A client of an embedded cache, whose leases are poisoned when they are left."""

    def __init__(self, cache: AsyncCache):
        self._cache = cache
        self.leased = 0
        self.held = True
        self.memory = memoryview(bytearray(8192))

    def check_connected(self) -> None:
        pass

    def window(self, size_bytes: int) -> memoryview:
        return self.memory[:size_bytes]

    async def stream(self, request_id: str, *, rank: int, reader: int) -> Leased:
        return Leased(self, await self._cache.stream(request_id, rank=rank, reader=reader))

    def store(self, prompt: Prompt, *, rank: int, start_chunk: int) -> Any:
        return self._cache.store(prompt, rank=rank, start_chunk=start_chunk)


class Rank:
    """One rank of an engine with a device, whose loads and saves are coroutines here."""

    def __init__(self, cache: AsyncCache, where: Geometry, device: SimulatedDevice):
        self.cache, self.where, self.device = cache, where, device
        self.client = Poisoning(cache)
        self.copies = Copies(self._opened, where, device, rank=0, reader=0)
        self.begun: list[Copy] = []

    async def _opened(self) -> Any:
        return self.client

    async def save(self, tokens: list[int], tables: Tables, after: Mark | None = None, *, start_chunk: int = 0) -> None:
        begun: Future[list[Copy]] = Future()
        order = SaveOrder("a", self.where.layout.prompt(tokens), start_chunk, tables)
        try:
            await self.copies.save(order, after or self.device.mark(), begun)
        finally:
            self.begun += begun.result()

    async def load(self, tokens: list[int], tables: Tables, name: str = "r", first: int = 0, end: int = 0) -> int:
        self.cache.prefetch(self.where.layout.prompt(tokens), request_id=name)
        return await self.copies.load(LoadOrder(name, name, first, end or len(tokens), tables), self.device.mark())

    async def landed(self) -> None:
        while self.copies._landing:
            await asyncio.wait(set(self.copies._landing))


def pages_of(where: Geometry, *, filled: bool, blocks: int = 16) -> list[list[torch.Tensor]]:
    made = caches(where, blocks, filled=filled)
    return [[made[layer] for layer in pages.layers] for pages in where.pages]


@asynccontextmanager
async def ranks(
    where: Geometry, *devices: dict[str, Any], backend: Any = None, **config: Any
) -> AsyncIterator[list[Rank]]:
    """A filled rank that writes, and others that read, on one cache, which holds nothing in the end."""
    settings = CacheConfig(l1_bytes=2**24, **config)
    async with AsyncCache(settings, backends=[backend if backend is not None else MemoryBackend()]) as cache:
        made = []
        for number, device in enumerate(devices):
            blocks = device.pop("blocks", 16)
            pages = pages_of(where, filled=number == 0, blocks=blocks)
            made.append(Rank(cache, where, SimulatedDevice(pages, **device)))
        yield made
        for rank in made:
            rank.device.close()
            await rank.copies.close()
            assert not rank.client.leased
        await asyncio.sleep(1)  # what was cancelled lets go
        stats = await cache.stats()
        assert not (stats.leases or stats.reserved_bytes or stats.quarantined_bytes)


@asynccontextmanager
async def saved(*devices: dict[str, Any]) -> AsyncIterator[list[Rank]]:
    """Ranks of which the first has saved all its blocks."""
    async with ranks(geometry(), *devices) as made:
        await made[0].save(TOKENS, (BLOCKS,))
        await made[0].landed()
        yield made


@asynccontextmanager
async def reader(where: Geometry, backend: Any, **device: Any) -> AsyncIterator[Rank]:
    """An empty rank on a cache of its own."""
    async with AsyncCache(CacheConfig(l1_bytes=2**22), backends=[backend]) as cache:
        rank = Rank(cache, where, SimulatedDevice(pages_of(where, filled=False), **device))
        yield rank
        rank.device.close()
        await end(rank, "r")
        assert not rank.client.leased
        assert not (await cache.stats()).leases


async def end(rank: Rank, *names: str) -> None:
    for name in names:
        await rank.cache.end_request(name)


def block_of(rank: Rank, number: int, group: int = 0) -> torch.Tensor:
    return torch.stack([layer[number] for layer in rank.device.groups[group]])


def right_blocks(ours: Rank, theirs: Rank, count: int = len(BLOCKS), group: int = 0) -> list[bool]:
    """By block of a prompt, whether the second rank has what the first one had."""
    return [torch.equal(block_of(ours, BLOCKS[n], group), block_of(theirs, OTHERS[n], group)) for n in range(count)]


@virtual
async def test_blocks_are_copied_out_and_in_beside_each_other_and_beside_steps() -> None:
    async with ranks(geometry(), {}, {}) as (first, second):
        step = first.device.compute(0.5, lambda: first.device.groups[0][0][BLOCKS[0]].fill_(7.0))
        await first.save(TOKENS, (BLOCKS,))
        assert [(len(view), writable) for view, writable in first.device.pinned] == [(4096, True)]
        assert step.done(), "a save comes after what its engine had submitted"
        await first.landed()
        assert await second.load(TOKENS, (OTHERS,)) == len(TOKENS)
        assert all(right_blocks(first, second))
        assert (second.device.groups[0][0][OTHERS[0]] == 7.0).all()
        untouched = set(range(16)) - set(OTHERS)
        assert not any(block_of(second, number).any() for number in untouched)


@virtual
async def test_blocks_may_change_as_soon_as_a_save_has_ended_and_before_it_has_landed() -> None:
    slow = {"bytes_per_second": 1e3}
    async with ranks(geometry(), slow, {}) as (first, second):
        before = [layer.clone() for layer in first.device.groups[0]]
        await first.save(TOKENS, (BLOCKS,))
        assert first.copies._landing
        for layer in first.device.groups[0]:
            poison(layer)
        await first.landed()
        assert await second.load(TOKENS, (OTHERS,)) == len(TOKENS)
        first.device.groups[0][:] = before
        assert all(right_blocks(first, second))


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("jitter", [0.0, 0.9])
@virtual
async def test_a_lease_ends_when_it_is_read_and_a_load_when_its_bytes_are_there(slots: int, jitter: float) -> None:
    slow = {"gather_bytes_per_second": 1e4, "slots": slots, "jitter": jitter}
    async with saved({}, slow) as (first, second):
        assert await second.load(TOKENS, (OTHERS,)) == len(TOKENS)
        assert all(right_blocks(first, second)), "what was leased was poisoned before the last blocks were filled"


@virtual
async def test_only_the_tokens_that_are_ordered_are_written() -> None:
    async with saved({}, {}) as (first, second):
        assert await second.load(TOKENS, (OTHERS,), first=CHUNK + BLOCK, end=3 * CHUNK + 1) == 3 * CHUNK + 1
        right = right_blocks(first, second)
        assert right == [False] * 3 + [True] * 4 + [False]
        assert not any(block_of(second, OTHERS[n]).any() for n in (0, 1, 2, 7))


@virtual
async def test_a_window_that_moves_back_with_a_shortfall_is_filled_again() -> None:
    where, memory = geometry(windows=(None, 1)), MemoryBackend()
    hashes = where.layout.prompt(TOKENS).chunk_hashes
    async with ranks(where, {}, backend=memory) as (first,):
        await first.save(TOKENS, (BLOCKS, BLOCKS))
        await first.landed()
        await first.cache.flush()
        bad = [ObjectKey(hashes[-1], 0, 0)]
        slow = ThrottledBackend(FailingBackend(memory, "load", times=None, keys=bad), bytes_per_second=1e3)
        async with reader(where, slow) as second:
            there = Rank(second.cache, where, SimulatedDevice(first.device.groups))
            await there.save(TOKENS[:-CHUNK], (BLOCKS, BLOCKS))  # so memory has the windows of these, too
            await there.landed()
            filled = await second.load(TOKENS, (OTHERS, OTHERS))
            assert filled == (CHUNKS - 1) * CHUNK
            assert all(right_blocks(first, second, 2 * (CHUNKS - 1)))
            assert all(right_blocks(first, second, 2 * (CHUNKS - 1), group=1)[-2:])


# What breaks.

STAGES = 2 * CHUNKS


@pytest.mark.parametrize("stage", range(STAGES))
@virtual
async def test_a_load_of_which_a_stage_fails_fills_what_it_says_and_holds_nothing(stage: int) -> None:
    async with saved({}, {"fails": stage, "slots": 2}) as (first, second):
        filled = await second.load(TOKENS, (OTHERS,))
        assert filled % CHUNK == 0 and filled < len(TOKENS)
        assert all(right_blocks(first, second, filled // BLOCK))
        assert await second.load(TOKENS, (OTHERS,), "again") == len(TOKENS)
        assert all(right_blocks(first, second))


@pytest.mark.parametrize("stage", range(STAGES))
@virtual
async def test_a_load_of_which_a_stage_never_ends_is_not_told_and_its_lease_is_given_back(stage: int) -> None:
    async with saved({}, {"hangs": stage, "slots": 2}) as (_, second):
        load = asyncio.create_task(second.load(TOKENS, (OTHERS,)))
        await asyncio.sleep(1000)
        assert not load.done(), "its blocks may still be written to"
        assert not second.client.leased
        assert await second.load(TOKENS, (OTHERS,), "again") == 0, "the device is asked for nothing more"
        second.device.close()
        assert await load == 0
        await end(second, "again")


@pytest.mark.parametrize("stage", range(STAGES))
@virtual
async def test_a_device_that_goes_on_after_a_pause_is_used_again(stage: int) -> None:
    async with saved({}, {"hangs": stage, "slots": 2}) as (first, second):
        load = asyncio.create_task(second.load(TOKENS, (OTHERS,)))
        await asyncio.sleep(1000)
        assert not load.done()
        second.device.resume()
        assert await load == 0, "its lease had ended"
        assert await second.load(TOKENS, (OTHERS,), "again") == len(TOKENS)
        assert all(right_blocks(first, second))


@pytest.mark.parametrize("stage", range(STAGES))
@pytest.mark.parametrize("how", ["fails", "hangs"])
@virtual
async def test_a_save_of_which_a_stage_breaks_publishes_only_what_was_copied(how: str, stage: int) -> None:
    async with ranks(geometry(), {how: stage, "slots": 2}, {}) as (first, second):
        await first.save(TOKENS, (BLOCKS,))
        ours = [layer.clone() for layer in first.device.groups[0]]
        for layer in first.device.groups[0]:
            poison(layer)  # its blocks may change
        await first.landed()
        first.device.groups[0][:] = ours
        filled = await second.load(TOKENS, (OTHERS,))
        assert filled < len(TOKENS)
        assert all(right_blocks(first, second, filled // BLOCK))
        found = (await second.cache.lookup(first.where.layout.prompt(TOKENS))).chunks
        assert found == filled // CHUNK
        assert bool((await first.cache.stats()).quarantined_bytes) == (how == "hangs"), "it may still be written to"
        await first.save(TOKENS, (BLOCKS,))
        await first.landed()
        again = await second.load(TOKENS, (OTHERS,), "again")
        assert again == (len(TOKENS) if how == "fails" else filled)
        assert all(right_blocks(first, second, again // BLOCK))
        await end(second, "r", "again")


@pytest.mark.parametrize("moment", range(40))
@virtual
async def test_an_engine_that_takes_blocks_at_any_moment_waits_for_what_is_read_and_for_nothing_else(
    moment: int,
) -> None:
    slow = {"bytes_per_second": 1e5, "gather_bytes_per_second": 2e5, "latency_seconds": 0.0, "slots": 2}
    async with ranks(geometry(), slow, {}) as (first, second):
        begun: Future[list[Copy]] = Future()
        order = SaveOrder("a", first.where.layout.prompt(TOKENS), 0, (BLOCKS,))
        saving = asyncio.create_task(first.copies.save(order, first.device.mark(), begun))
        await asyncio.wrap_future(begun)
        await asyncio.sleep(moment * 1e-4)
        ours = [layer.clone() for layer in first.device.groups[0]]
        first.device.hold(begun.result())
        step = first.device.compute(1e-6, lambda: [poison(layer) for layer in first.device.groups[0]])  # type: ignore[func-returns-value]
        await step
        assert first.device.waited_seconds <= 2 * 240 / 2e5 * 2, "two that were being read, at most"
        await saving
        await first.landed()
        first.device.groups[0][:] = ours
        filled = await second.load(TOKENS, (OTHERS,))
        assert all(right_blocks(first, second, filled // BLOCK))


@pytest.mark.parametrize("missing", range(CHUNKS))
@virtual
async def test_a_load_that_falls_short_while_it_is_streamed_fills_what_it_counts(missing: int) -> None:
    where, memory = geometry(), MemoryBackend()
    async with ranks(where, {}, backend=memory) as (first,):
        await first.save(TOKENS, (BLOCKS,))
        await first.landed()
        await first.cache.flush()
        bad = [ObjectKey(where.layout.prompt(TOKENS).chunk_hashes[missing], 0, 0)]
        slow = ThrottledBackend(FailingBackend(memory, "load", times=None, keys=bad), bytes_per_second=1e3)
        async with reader(where, slow) as second:
            assert await second.load(TOKENS, (OTHERS,)) == missing * CHUNK
            assert all(right_blocks(first, second, missing * CHUNK // BLOCK))


@asynccontextmanager
async def streaming(**device: Any) -> AsyncIterator[tuple[Rank, Rank]]:
    """A rank whose chunks are in storage, which gives one in a quarter of a second, and one that is to load them."""
    where, memory = geometry(), MemoryBackend()
    async with ranks(where, {}, backend=memory) as (first,):
        await first.save(TOKENS, (BLOCKS,))
        await first.landed()
        await first.cache.flush()
        async with reader(where, ThrottledBackend(memory, bytes_per_second=1e3), **device) as second:
            yield first, second


@pytest.mark.parametrize("moment", range(18))
@pytest.mark.parametrize("how", ["ended", "lost", "closed"])
@virtual
async def test_whatever_happens_at_any_moment_of_a_streamed_load_it_fills_what_it_says_and_holds_nothing(
    how: str, moment: int
) -> None:
    async with streaming() as (first, second):
        loading = asyncio.create_task(second.load(TOKENS, (OTHERS,)))
        await asyncio.sleep(moment * 0.06)  # up to 1.02 s: all of it takes 0.96 s
        is_over = loading.done()
        if how == "ended":  # an abort
            await second.cache.end_request("r")
        elif how == "lost":  # the server
            second.client.held = False
        else:  # the engine
            second.device.close()
        filled = await loading
        assert is_over == (moment > 16)
        assert filled == len(TOKENS) if is_over else filled % CHUNK == 0
        assert moment >= 16 or filled < len(TOKENS)
        assert how != "lost" or is_over or not filled, "what was copied of its memory may be anything"
        assert all(right_blocks(first, second, filled // BLOCK))


@pytest.mark.parametrize("stage", range(STAGES))
@pytest.mark.parametrize("how", ["fails", "hangs"])
@virtual
async def test_whichever_stage_of_a_streamed_load_breaks_it_fills_what_it_says_and_holds_nothing(
    how: str, stage: int
) -> None:
    async with streaming(**{how: stage}) as (first, second):
        loading = asyncio.create_task(second.load(TOKENS, (OTHERS,)))
        if how == "hangs":
            await asyncio.sleep(1000)
            assert not loading.done() and not second.client.leased
            second.device.close()
        filled = await loading
        assert filled % CHUNK == 0 and filled <= stage // 2 * CHUNK
        assert all(right_blocks(first, second, filled // BLOCK))


@virtual
async def test_what_was_read_while_the_lease_was_lost_does_not_count() -> None:
    async with saved({}, {}) as (_, second):
        second.client.held = False
        assert await second.load(TOKENS, (OTHERS,)) == 0


@pytest.mark.parametrize("moment", range(12))
@virtual
async def test_a_device_that_is_closed_at_any_moment_of_a_load_or_save_holds_nothing(moment: int) -> None:
    slow = {"bytes_per_second": 1e5, "gather_bytes_per_second": 2e5, "slots": 2}
    async with saved({}, dict(slow)) as (first, second):
        load = asyncio.create_task(second.load(TOKENS, (OTHERS,)))
        save = asyncio.create_task(second.save([99, *TOKENS], (BLOCKS,)))
        await asyncio.sleep(moment * 1e-3)
        second.device.close()
        filled = await load
        assert all(right_blocks(first, second, filled // BLOCK))
        await save
        await second.landed()


# How fast.


@virtual
async def test_both_directions_run_at_the_bandwidth_with_four_requests_at_once_and_the_engine_never_waits() -> None:
    chunks, chunk_bytes, bandwidth = 16, 2**12, 2.0**20
    group = ObjectGroup((2, 4, chunk_bytes // 8), "uint8")
    where = Geometry(ModelLayout("toy", (group,), chunk_tokens=16), (Pages(0, 4, ("0", "1")),))
    prompts = [[n * 1000 + token for token in range(16 * chunks)] for n in range(8)]
    tables = [([*range(1 + n * 4 * chunks, 1 + (n + 1) * 4 * chunks)],) for n in range(8)]
    async with AsyncCache(CacheConfig(l1_bytes=2**26), backends=[MemoryBackend()]) as cache:
        made = [torch.randint(0, 255, (1 + 8 * 4 * chunks, chunk_bytes // 8), dtype=torch.uint8) for _ in range(2)]
        fast = SimulatedDevice([made], bytes_per_second=1e12, gather_bytes_per_second=1e12)
        writer = Rank(cache, where, fast)
        for n in range(4):
            await writer.save(prompts[n], tables[n])
        await writer.landed()
        # As a H200: HBM is some forty times as fast as the bus.
        device = SimulatedDevice(
            [made], bytes_per_second=bandwidth, gather_bytes_per_second=40 * bandwidth, latency_seconds=1e-4
        )
        rank, loop = Rank(cache, where, device), asyncio.get_running_loop()
        began, steps = loop.time(), 0

        async def compute() -> None:
            nonlocal steps
            while True:
                await device.compute(1e-3)
                steps += 1

        engine = asyncio.create_task(compute())
        await asyncio.gather(
            *(rank.load(prompts[n], tables[n], f"r{n}") for n in range(4)),
            *(rank.save(prompts[n], tables[n]) for n in range(4, 8)),
        )
        await rank.landed()
        engine.cancel()
        for direction in ("in", "out"):
            assert device.moved[direction] == 4 * chunks * chunk_bytes
            reached = device.moved[direction] / (device.ended_at[direction] - began) / bandwidth
            assert reached >= 0.95, (direction, reached)
        assert steps and device.waited_seconds == 0
