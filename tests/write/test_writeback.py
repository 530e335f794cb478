"""Write-back: when it begins, what ends it, and that no error of its own does."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from async_cache import AsyncCache, CacheConfig, FlushResult, ModelLayout, ObjectGroup
from async_cache.l1.entry import Entry
from async_cache.l2 import Backend
from async_cache.l2.backend import Limits
from async_cache.l2.guard.meter import Meter
from async_cache.l2.memory import MemoryBackend
from async_cache.l2.placement import Placement, Placing
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.objects import ChunkObjects
from async_cache.testing import FailingBackend, GatedBackend
from async_cache.testing.backends import WrappedBackend
from async_cache.testing.virtual import run_virtual
from async_cache.write.pending import Pending, prefixes_of

PAGE = 4096
LAYOUT = ModelLayout("model", (ObjectGroup((16,), "uint8"),), chunk_tokens=4)
TWO_RANKS = ModelLayout("model", (ObjectGroup((16,), "uint8"),), chunk_tokens=4, world_size=2)


def play(backend: Backend, scene: Callable[[AsyncCache], Awaitable[None]], **settings: float) -> None:
    """Run a scene in virtual time, with a cache over the backend."""

    async def main() -> None:
        async with AsyncCache(CacheConfig(l1_bytes=64 * PAGE, l2=[], **settings), [backend]) as cache:
            await scene(cache)
            cache.check_integrity()

    run_virtual(main())


async def store(cache: AsyncCache, number: int, *, layout: ModelLayout = LAYOUT, rank: int = 0) -> None:
    """Commit one chunk."""
    async with cache.store(layout.prompt(range(number * 100, number * 100 + 4)), rank=rank) as writer:
        for chunk in writer:
            chunk.commit()


class Timed(WrappedBackend):
    """Notes when it is asked to store how much."""

    def __init__(self, inner: Backend):
        super().__init__(inner)
        self.stored: list[tuple[float, int]] = []

    async def before(self, verb: str, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> None:
        if verb == "store":
            self.stored.append((round(asyncio.get_running_loop().time(), 4), len(keys)))


@pytest.mark.parametrize(("commits", "after"), [(1, 0.003), (3, 0.007), (100, 0.025)])
def test_a_write_waits_for_a_pause_in_a_burst_of_commits_but_not_for_ever(commits: int, after: float) -> None:
    timed = Timed(MemoryBackend())

    async def scene(cache: AsyncCache) -> None:
        for number in range(commits):
            await store(cache, number)
            await asyncio.sleep(0.002)
        await cache.flush()
        assert timed.stored[0][0] == pytest.approx(after, abs=0.0011)

    play(timed, scene)


def test_what_was_committed_a_while_ago_is_written_at_once() -> None:
    timed = Timed(MemoryBackend())

    async def scene(cache: AsyncCache) -> None:
        for number in range(3):
            await store(cache, number)
        await cache.flush()
        first, second, third = (time for time, _ in timed.stored)
        assert first == second == third

    play(timed, scene, writeback_share=1 / 64)  # a chunk at a time


def test_an_error_of_its_own_does_not_end_the_queue_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_until_idle = Meter.wait_until_idle
    errors = [RuntimeError("a bug"), RuntimeError("once more")]

    async def failing(self: Meter, timeout_seconds: float) -> None:
        if errors:
            raise errors.pop()
        await wait_until_idle(self, timeout_seconds)

    monkeypatch.setattr(Meter, "wait_until_idle", failing)

    async def scene(cache: AsyncCache) -> None:
        await store(cache, 1)
        assert await cache.flush() == FlushResult(written=1, pending=0, dropped=0)

    play(MemoryBackend(), scene)


def test_a_flush_returns_though_a_chunk_cannot_even_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: ChunkObjects, chunks: object) -> list[ObjectKey]:
        raise RuntimeError("a bug")

    async def scene(cache: AsyncCache) -> None:
        with monkeypatch.context() as context:
            context.setattr(ChunkObjects, "keys", failing)
            await store(cache, 1)
            assert await cache.flush() == FlushResult(written=0, pending=0, dropped=1)
        await store(cache, 2)
        assert await cache.flush() == FlushResult(written=1, pending=0, dropped=0)

    play(MemoryBackend(), scene)


def test_the_attempts_are_not_used_up_while_a_backend_is_left_alone() -> None:
    backend = FailingBackend(MemoryBackend(), "store", times=3)
    backend.limits = Limits(breaker_failures=1, breaker_reset_seconds=60)

    async def scene(cache: AsyncCache) -> None:
        await store(cache, 1)
        assert await cache.flush() == FlushResult(written=1, pending=0, dropped=0)
        assert asyncio.get_running_loop().time() == pytest.approx(180, abs=1)
        assert backend.calls["store"] == 4

    play(backend, scene, breaker_reset_seconds=5)


def test_a_write_that_fails_while_more_of_its_chunk_waits_drops_nothing() -> None:
    gate = GatedBackend(FailingBackend(MemoryBackend(), "store", times=1), "store")

    async def scene(cache: AsyncCache) -> None:
        await store(cache, 1, layout=TWO_RANKS)
        await gate.reached("store")
        await store(cache, 1, layout=TWO_RANKS, rank=1)
        gate.release("store")
        assert await cache.flush() == FlushResult(written=1, pending=0, dropped=0)
        lookups = gate.calls["lookup"]
        await store(cache, 1, layout=TWO_RANKS)
        await cache.flush()
        assert gate.calls["lookup"] == lookups  # nothing of it was dropped, that is to be stored anew

    play(gate, scene)


def test_what_write_back_holds_is_said_in_words() -> None:
    gate = GatedBackend(MemoryBackend("disk"), "store")

    async def scene(cache: AsyncCache) -> None:
        await store(cache, 1)
        await gate.reached("store")
        assert repr(cache.core.writeback) == "<Writeback, 1 pending, 0 dropped>"
        assert repr(cache.core.writing) == "<Writing, 0 open>"
        gate.release("store")
        await cache.flush()

    play(gate, scene)


# One object of many.


class Poisoned(WrappedBackend):
    """A store of one object, whatever else is in the call, raises."""

    def __init__(self, inner: Backend, poison: bytes):
        super().__init__(inner)
        self.poison = poison

    async def before(self, verb: str, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> None:
        if verb == "store" and any(key.chunk_hash == self.poison for key in keys):
            raise ValueError("too bad")


def test_an_object_that_makes_its_call_raise_is_dropped_alone() -> None:
    prompt = LAYOUT.prompt(range(50 * 4))
    backend = Poisoned(MemoryBackend(), prompt.chunk_hashes[17])

    async def scene(cache: AsyncCache) -> None:
        async with cache.store(prompt) as writer:
            for chunk in writer:
                chunk.commit()
        assert await cache.flush() == FlushResult(written=49, pending=0, dropped=1)
        assert backend.inner.usage().objects == 49

    play(backend, scene)


def test_an_object_that_is_not_stored_holds_up_nothing_that_comes_after() -> None:
    prompts = [LAYOUT.prompt(range(number * 100, number * 100 + 4)) for number in range(3)]
    bad = ObjectKey(prompts[0].chunk_hashes[0], 0, 0)
    backend = FailingBackend(MemoryBackend(), "store", times=None, keys=[bad])

    async def scene(cache: AsyncCache) -> None:
        for number in range(3):
            await store(cache, number)
        assert await cache.flush() == FlushResult(written=2, pending=0, dropped=1)
        waited = asyncio.get_running_loop().time()
        assert waited < 2
        await store(cache, 7)
        await cache.flush()
        assert asyncio.get_running_loop().time() < waited + 0.1  # it does not wait for what was given up

    play(backend, scene, writeback_share=1 / 64)


def test_what_is_in_front_of_a_batch_is_named_once_and_first() -> None:
    one, other = LAYOUT.prompt(range(40)), LAYOUT.prompt([*range(20), *range(100, 120)])
    entry = Entry(b"", LAYOUT)
    batch = [Pending(entry, 0, of.chunk_hashes, number) for of, number in ((one, 3), (one, 7), (other, 6), (one, 1))]
    assert prefixes_of(batch) == [*one.chunk_hashes[:8], *other.chunk_hashes[5:7]]


@pytest.mark.parametrize("alone", [True, False])
def test_what_could_not_be_read_is_stored_anew_though_the_backend_still_finds_it(alone: bool) -> None:
    prompt = LAYOUT.prompt(range(4 if alone else 12))
    keys = [ObjectKey(prompt.chunk_hashes[-1], 0, 0)]
    backend = FailingBackend(MemoryBackend(), "load", times=None, keys=keys)

    async def scene(cache: AsyncCache) -> None:
        for _ in range(2):
            async with cache.store(prompt) as writer:
                for chunk in writer:
                    chunk.commit()
            stored = backend.keys_asked["store"]
            await cache.flush()
            assert backend.keys_asked["store"] > stored
            await cache.clear(tier="l1")
            prefetch = cache.prefetch(prompt)
            assert (await prefetch.load_done).chunks == len(prompt) - 1
            await cache.end_request(prefetch.request_id)
        assert backend.keys_asked["store"] == len(prompt) + 1

    play(backend, scene)


def test_what_could_not_be_read_once_and_was_stored_anew_is_left_out_after_that() -> None:
    prompt = LAYOUT.prompt(range(12))
    keys = [ObjectKey(prompt.chunk_hashes[-1], 0, 0)]
    backend = FailingBackend(MemoryBackend(), "load", keys=keys)

    async def scene(cache: AsyncCache) -> None:
        prefetches = []
        for stored in (len(prompt), len(prompt) + 1, len(prompt) + 1):
            async with cache.store(prompt) as writer:
                for chunk in writer:
                    chunk.commit()
            await cache.flush()
            assert backend.keys_asked["store"] == stored
            await cache.clear(tier="l1")
            if not prefetches:
                prefetches.append(cache.prefetch(prompt))
                assert (await prefetches[0].load_done).chunks == len(prompt) - 1
                await cache.end_request(prefetches[0].request_id)
                await cache.clear(tier="l1")

    play(backend, scene)


def test_a_removal_waits_for_a_chunk_of_others_that_is_stored_by_several_calls_as_long_as_it_goes_on() -> None:
    many = ModelLayout("many", tuple(ObjectGroup((1,), "uint8") for _ in range(600)), chunk_tokens=4)
    memory = MemoryBackend()

    async def scene(cache: AsyncCache) -> None:
        await store(cache, 0, layout=many)
        await asyncio.sleep(5)
        assert (await cache.delete_model("another")).chunks == 0
        assert memory.usage().objects == 600

    play(Slow(memory), scene)


class Refusing(WrappedBackend):
    """Stores nothing while it refuses."""

    refuses = False

    async def before(self, verb: str, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> None:
        if verb == "store" and self.refuses:
            raise OSError("refused")


def test_what_could_not_be_read_and_is_not_stored_anew_as_another_backend_has_it_is_stored_when_none_has() -> None:
    key = ObjectKey(LAYOUT.prompt(range(4)).chunk_hashes[0], 0, 0)
    broken = FailingBackend(MemoryBackend("broken"), "load", times=None)
    broken.placement = Placement(write=Placing.SKIP_IF_PRESENT)
    other = Refusing(MemoryBackend("other"))

    async def main() -> None:
        assert await broken.store([key], [memoryview(bytes(16))]) == [True]
        async with AsyncCache(CacheConfig(l1_bytes=64 * PAGE, l2=[]), [broken, other]) as cache:
            assert (await cache.prefetch(LAYOUT.prompt(range(4))).load_done).chunks == 0
            await store(cache, 0)
            await cache.flush()
            assert other.usage().objects == 1 and broken.keys_asked["store"] == 1
            assert await other.delete([key]) == 1
            other.refuses = True
            await cache.clear(tier="l1")
            await store(cache, 0)
            await cache.flush()
            assert other.usage().objects == 0 and broken.keys_asked["store"] == 2

    run_virtual(main())


class Owned(Timed):
    """Notes how many chunks had been asked for before each, by a byte of their hash."""

    def __init__(self, inner: Backend):
        super().__init__(inner)
        self.order: list[bytes] = []

    async def before(self, verb: str, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> None:
        if verb == "store":
            self.order += [key.chunk_hash for key in keys]
            await asyncio.sleep(1)


def test_a_chunk_of_more_objects_than_a_call_has_is_stored_by_several_and_goes_on_after_one_that_failed() -> None:
    many = ModelLayout("many", tuple(ObjectGroup((1,), "uint8") for _ in range(600)), chunk_tokens=4)
    memory = MemoryBackend()
    timed = Timed(FailingBackend(memory, "store", 5))

    async def scene(cache: AsyncCache) -> None:
        await store(cache, 0, layout=many)
        assert await cache.flush() == FlushResult(1, 0, 0)
        assert [count for _, count in timed.stored] == [256, 256, 88]
        await store(cache, 1, layout=many)
        assert await cache.flush() == FlushResult(1, 0, 0)
        assert [count for _, count in timed.stored[3:]] == [256, 256, 256, 88], "what is there is not stored again"

    play(timed, scene)
    assert memory.usage().objects == 2 * 600


class Slow(Timed):
    """Takes its time to store."""

    async def before(self, verb: str, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> None:
        await super().before(verb, keys, buffers)
        if verb == "store":
            await asyncio.sleep(20)


@pytest.mark.parametrize("clears", [False, True])
def test_a_chunk_that_is_removed_between_two_calls_that_store_it_is_stored_no_further(clears: bool) -> None:
    many = ModelLayout("many", tuple(ObjectGroup((1,), "uint8") for _ in range(600)), chunk_tokens=4)
    memory = MemoryBackend()
    slow = Slow(memory)

    async def scene(cache: AsyncCache) -> None:
        await store(cache, 0, layout=many)
        await asyncio.sleep(5)
        assert (await (cache.clear("all") if clears else cache.delete(many.prompt(range(4))))).chunks == 1
        assert memory.usage().objects == 0
        await asyncio.sleep(100)
        assert memory.usage().objects == 0 and [count for _, count in slow.stored] == [256]
        await store(cache, 0, layout=many)
        assert await cache.flush() == FlushResult(1, 0, 0)
        assert memory.usage().objects == 600

    play(slow, scene)


def test_chunks_of_others_are_stored_before_all_of_one_and_a_flush_of_their_own_does_not_wait_for_it() -> None:
    owned = Owned(MemoryBackend())
    large = ModelLayout("large", (ObjectGroup((PAGE,), "uint8"),), chunk_tokens=4)

    async def scene(cache: AsyncCache) -> None:
        writeback, clock = cache.core.writeback, asyncio.get_running_loop().time
        writeback.tell_apart(["red", "blue"])
        red, blue = (large.prompt(range(4 * count), salt=salt) for count, salt in ((40, "red"), (2, "blue")))
        for prompt in (red, blue):
            async with cache.store(prompt) as writer:
                for chunk in writer:
                    chunk.commit()
        assert (writeback.pending_of(["red"]), writeback.pending_of(["blue"])) == (40, 2)
        began = clock()
        assert await writeback.flush(None, ["blue"]) == FlushResult(2, 0, 0)
        assert clock() - began < 4 and writeback.pending_of(["red"]) > 30
        assert owned.order.index(blue.chunk_hashes[1]) < 10
        assert await writeback.flush(0.5, ["red"]) != FlushResult(0, 0, 0)
        assert (await cache.flush()).pending == 0
        assert await writeback.flush(None, ["blue"]) == FlushResult(0, 0, 0)
        assert writeback.dropped_of(["red", "blue"]) == 0 and writeback.pending_of(["red", "blue"]) == 0

    play(owned, scene, writeback_share=4 / 64)  # four chunks at a time


WIDE = ModelLayout("wide", tuple(ObjectGroup((16,), "uint8") for _ in range(8)), chunk_tokens=4)


class InPages(WrappedBackend):
    """A backend in which each object takes a page."""

    def __init__(self, inner: Backend):
        super().__init__(inner)
        self.unit_bytes = PAGE


@pytest.mark.parametrize("capacity_bytes", [127, 7 * PAGE], ids=["bytes", "pages"])
def test_a_chunk_that_is_larger_than_the_storage_is_refused_at_once_and_nothing_makes_room_for_it(
    capacity_bytes: int,
) -> None:
    inner = MemoryBackend(capacity_bytes=capacity_bytes)
    backend = InPages(inner) if capacity_bytes >= PAGE else inner

    async def scene(cache: AsyncCache) -> None:
        cache.core.writeback.tell_apart(["red", "blue"])
        await store(cache, 1)
        assert await cache.flush() == FlushResult(1, 0, 0)
        now = asyncio.get_running_loop().time()
        for number, salt in enumerate(("red", "red", "blue")):
            async with cache.store(WIDE.prompt([number] * 4, salt=salt)) as writer:
                writer[0].commit()
        assert await cache.flush(1000) == FlushResult(0, 0, 0, refused=3)
        assert asyncio.get_running_loop().time() - now < 0.1
        assert inner.usage().objects == 1
        assert (await cache.backends())[0].refused == {"capacity": 3}
        of = cache.core.writeback.flush
        assert [(await of(1, {salt})).refused for salt in ("red", "blue", "red")] == [2, 1, 0]

    play(backend, scene)
