"""A copy leaves out what is there, verifies what it copies, can be broken off, and needs little memory."""

import asyncio
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from async_cache.config import CacheConfig
from async_cache.errors import BackendError
from async_cache.l2 import Backend, LoadOutcome
from async_cache.l2.codec.backend import CodecBackend
from async_cache.l2.codec.header import Header
from async_cache.l2.copy import _BATCH_BYTES, _Buffer, copy_all
from async_cache.l2.filesystem import FileSystemBackend
from async_cache.l2.guard.guard import Guard
from async_cache.l2.memory import MemoryBackend
from async_cache.l2.urls.registry import from_url
from async_cache.prompt.keys import ObjectKey
from async_cache.testing import BitFlipBackend, FailingBackend, GatedBackend, flip_bit
from async_cache.testing.backends import WrappedBackend
from async_cache.values import Copied
from tests.virtual import virtual

CONFIG = CacheConfig(l2=[], breaker_failures=1, load_timeout_seconds=2, store_timeout_seconds=2)


def key(number: int) -> ObjectKey:
    return ObjectKey(number.to_bytes(32, "big"), number % 3, 0)


def body(number: int, size_bytes: int = 1000) -> bytes:
    return number.to_bytes(4, "big") * (size_bytes // 4)


async def filled(backend: Backend, numbers: Sequence[int], size_bytes: int = 1000) -> Backend:
    await backend.open()
    for number in numbers:
        assert await backend.store([key(number)], [memoryview(bytearray(body(number, size_bytes)))]) == [True]
    await backend.close()
    return backend


async def content(backend: Backend) -> dict[ObjectKey, bytes]:
    found = {}
    await backend.open()
    async for each, size in backend.keys():
        buffer = bytearray(size)
        await backend.load([each], [memoryview(buffer)])
        found[each] = bytes(buffer)
    await backend.close()
    return found


async def test_everything_is_copied_byte_by_byte(tmp_path: Path) -> None:
    source = await filled(FileSystemBackend(tmp_path / "a"), range(600))
    told: list[Copied] = []
    copied = await copy_all(source, FileSystemBackend(tmp_path / "b"), told=told.append)
    assert copied == Copied(found=600, copied=600, copied_bytes=600_000)
    assert await content(FileSystemBackend(tmp_path / "b")) == {key(n): body(n) for n in range(600)}
    assert told[-1] == copied and [each.found for each in told] == sorted(each.found for each in told)


async def test_what_is_there_is_left_out() -> None:
    source, target = await filled(MemoryBackend("a"), range(100)), await filled(MemoryBackend("b"), range(50, 70))
    counting = WrappedBackend(source)
    copied = await copy_all(counting, target)
    assert (copied.found, copied.present, copied.copied) == (100, 20, 80)
    assert counting.keys_asked["load"] == 80
    assert (await copy_all(source, target)).present == 100


async def test_a_copy_that_was_broken_off_goes_on_where_it_was() -> None:
    source, memory = await filled(MemoryBackend("a"), range(1000)), MemoryBackend("b")
    gate = GatedBackend(memory)
    copying = asyncio.create_task(copy_all(source, gate))
    await gate.reached("store", 3)
    gate.hold("store")
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    there = memory.usage().objects
    assert 0 < there < 1000
    copied = await copy_all(source, memory)
    assert (copied.present, copied.copied) == (there, 1000 - there)
    assert await content(memory) == await content(source)
    assert (source.pins, memory.pins) == (0, 0)


async def test_what_is_damaged_is_not_copied() -> None:
    source = await filled(MemoryBackend("a"), range(10))
    assert flip_bit(source, key(3))
    copied = await copy_all(source, target := MemoryBackend("b"))
    assert (copied.copied, copied.corrupt) == (9, 1)
    assert key(3) not in await content(target)


async def test_what_vanishes_meanwhile_is_gone() -> None:
    class Vanishing(WrappedBackend):
        async def before(self, verb: str, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> None:
            if verb == "load":
                await self.inner.delete(list(keys)[:2])

    copied = await copy_all(Vanishing(await filled(MemoryBackend("a"), range(10))), MemoryBackend("b"))
    assert (copied.copied, copied.gone) == (8, 2)


async def test_what_cannot_be_read_or_has_no_room_is_counted_and_copied_the_next_time() -> None:
    memory = await filled(MemoryBackend("a"), range(10))
    failing = FailingBackend(memory, "load", times=1, keys=[key(3)])
    copied = await copy_all(failing, target := MemoryBackend("b"), CONFIG)
    assert (copied.copied, copied.failed) == (9, 1)
    assert (await copy_all(failing, target, CONFIG)).copied == 1
    full = FailingBackend(MemoryBackend("c"), "store", times=None, keys=[key(4)])
    copied = await copy_all(memory, full, CONFIG)
    assert (copied.copied, copied.failed) == (9, 1)


@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_a_source_that_dies_ends_the_copy(nth: int) -> None:
    memory, target = await filled(MemoryBackend("a"), range(1000)), MemoryBackend("b")
    with pytest.raises(BackendError, match="a is left alone after failures"):
        await copy_all(FailingBackend(memory, "load", nth=nth, times=None), target, CONFIG)
    assert (await copy_all(memory, target, CONFIG)).found == 1000
    assert await content(target) == await content(memory)


async def test_a_target_that_dies_ends_the_copy() -> None:
    memory, target = await filled(MemoryBackend("a"), range(1000)), MemoryBackend("b")
    with pytest.raises(BackendError, match="b cannot be written to"):
        await copy_all(memory, FailingBackend(target, "store", nth=2, times=None), CONFIG)
    assert 0 < target.usage().objects < 1000


async def test_the_listing_of_a_copy_that_ends_early_is_closed() -> None:
    listings = []

    class Listed(WrappedBackend):
        def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
            listings.append(self._list())  # so that nobody else closes it
            return listings[-1]

        async def _list(self) -> AsyncGenerator[tuple[ObjectKey, int], None]:
            async for each in self.inner.keys():
                yield each

    source = Listed(await filled(MemoryBackend("a"), range(1000)))
    with pytest.raises(BackendError, match="b cannot be written to"):
        await copy_all(source, FailingBackend(MemoryBackend("b"), "store", times=None), CONFIG)
    assert len(listings) == 1
    with pytest.raises(StopAsyncIteration):
        await anext(listings[0])


async def test_a_source_that_cannot_be_listed_or_opened_ends_the_copy(tmp_path: Path) -> None:
    class Unlisted(WrappedBackend):
        def keys(self):  # type: ignore[no-untyped-def]
            raise OSError("injected")

    class Closed(WrappedBackend):
        async def open(self) -> None:
            raise BackendError("it does not open")

    memory = await filled(MemoryBackend("a"), range(10))
    with pytest.raises(BackendError, match="a failed: injected"):
        await copy_all(Unlisted(memory), MemoryBackend("b"), CONFIG)
    with pytest.raises(BackendError, match="it does not open"):
        await copy_all(memory, Closed(MemoryBackend("b")), CONFIG)


@virtual
async def test_a_call_that_is_silent_keeps_its_buffer_to_itself() -> None:
    memory = await filled(MemoryBackend("a"), range(600))
    gate = GatedBackend(memory, stubborn=True)
    gate.hold("load")
    copying = asyncio.create_task(copy_all(gate, target := MemoryBackend("b"), CONFIG))
    with pytest.raises(BackendError):
        await copying
    gate.release()
    assert (await copy_all(memory, target, CONFIG)).copied == 600
    assert await content(target) == await content(memory)


@virtual
async def test_a_load_that_outlasts_its_time_spoils_nothing_that_is_copied_after_it() -> None:
    late: list[memoryview] = []
    over = asyncio.Event()

    class Stuck(WrappedBackend):
        load_listed = Backend.load_listed  # by what it loads itself

        async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
            if late:
                await asyncio.sleep(0.1)  # else all is copied by the other worker
                return await super().load(keys, buffers)
            late.extend(buffers)
            while not over.is_set():
                with suppress(asyncio.CancelledError):
                    await over.wait()
            return [LoadOutcome.FAILED] * len(keys)

    class Spoiled(WrappedBackend):
        async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
            for buffer in late:
                buffer[:4] = b"late"
            return await super().store(keys, buffers)

    memory, target = await filled(MemoryBackend("a"), range(2000)), MemoryBackend("b")
    config = CacheConfig(l2=[], load_timeout_seconds=0.2, close_timeout_seconds=1)
    asyncio.get_running_loop().call_later(0.8, over.set)
    copied = await copy_all(Stuck(memory), Spoiled(target), config)
    assert copied.failed == 256 and copied.copied == 2000 - 256
    assert (await content(target)).items() <= (await content(memory)).items()


async def test_a_buffer_is_left_to_a_call_that_has_not_ended_and_used_again_after_one_that_has() -> None:
    gate = GatedBackend(await filled(MemoryBackend("a"), range(2)), stubborn=True)
    guard, buffer = Guard.of(gate, CONFIG), _Buffer()
    (first,) = buffer.room([1000])
    ended = guard.begin_load([key(0)], [first])
    assert ended is not None
    await ended.result()
    buffer.leave_to(ended)
    buffer.begin()
    (again,) = buffer.room([1000])
    gate.hold("load")
    out = guard.begin_load([key(1)], [again])
    assert out is not None
    await gate.reached("load", 2)
    buffer.leave_to(out)
    buffer.begin()
    (other,) = buffer.room([1000])
    again[:4], other[:4] = b"late", b"mine"
    seen = bytes(first[:4]), bytes(other[:4])
    gate.release()
    await guard.close(1)
    assert seen == (b"late", b"mine")


def test_what_a_buffer_gives_does_not_overlap_until_it_begins_anew() -> None:
    buffer = _Buffer()
    views = [view for sizes in ([10, 5000], [100], [70 * 2**20], [1]) for view in buffer.room(sizes)]
    for number, view in enumerate(views):
        view[:] = bytes([number]) * len(view)
    assert all(view[0] == view[-1] == number for number, view in enumerate(views))
    buffer.begin()
    (again,) = buffer.room([1])
    again[0] = 99
    assert views[0][0] == 99


async def test_a_large_object_has_a_batch_of_its_own() -> None:
    source = await filled(MemoryBackend("a"), range(3), _BATCH_BYTES + 4)
    await filled(source, range(3, 20))
    assert (await copy_all(source, target := MemoryBackend("b"))).copied == 20
    assert await content(target) == await content(source)


async def test_its_memory_does_not_depend_on_how_much_there_is(tmp_path: Path) -> None:
    size = 4 * 2**20
    source = await filled(FileSystemBackend(tmp_path / "a"), range(60), size)

    class Measured(WrappedBackend):
        most = 0

        async def before(self, verb: str, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> None:
            self.most = max(self.most, sum(map(len, buffers)))

    target = Measured(FileSystemBackend(tmp_path / "b"))
    tracemalloc.start()
    try:
        assert (await copy_all(source, target)).copied == 60
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert target.most <= 32 * 2**20
    assert peak < 2 * 32 * 2**20 + 16 * 2**20


async def test_a_flipped_bit_is_noticed_as_it_is_loaded() -> None:
    memory = await filled(MemoryBackend("a"), range(5))
    copied = await copy_all(BitFlipBackend(memory), MemoryBackend("b"))
    assert (copied.copied, copied.corrupt) == (0, 5)


@pytest.mark.parametrize(
    ("source_codec", "target_codec"),
    [("zstd", "none"), ("none", "zstd"), ("zstd", "aes"), ("aes", "zstd,aes"), ("aes", "aes")],
)
async def test_what_is_encoded_is_copied_as_what_it_is(source_codec: str, target_codec: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(bytes(range(100, 132)))
    (tmp_path / "keys").chmod(0o600)

    def url(name: str, codec: str) -> str:
        return f"memory://{name}?codec={codec}" + (f"&key_file={tmp_path}/keys" if "aes" in codec else "")

    source = await filled(from_url(url("source", source_codec)), range(600))
    await filled(source, [600], 40 * 2**20)  # longer than what is encoded or decoded at a time
    target = from_url(url("target", target_codec))
    copied = await copy_all(source, target, CONFIG)
    assert (copied.copied, copied.copied_bytes) == (601, 600_000 + 40 * 2**20)
    await target.open()
    for number in range(601):
        size = 1000 if number < 600 else 40 * 2**20
        buffer = bytearray(size)
        assert await target.load([key(number)], [memoryview(buffer)]) == [LoadOutcome.LOADED]
        assert buffer == body(number, size)
    await target.close()
    assert (await copy_all(source, target, CONFIG)).present == 601


async def test_what_cannot_be_decoded_is_not_copied() -> None:
    source = from_url("memory://source?codec=zstd")
    assert isinstance(source, CodecBackend) and isinstance(source.inner, MemoryBackend)
    await filled(source, range(5))
    names = [source.codec.names[0].name(key(number)) for number in range(5)]
    await source.inner.open()
    for name, forged in (
        (names[1], Header(0, 0, 0, 2**63).pack() + bytes(100)),  # nobody makes room for that
        (names[2], b"no header of ours, and longer than that"),
        (names[3], Header(0, 0, 0, 999).pack() + bytes(1000)),
    ):
        await source.inner.delete([name])
        assert await source.inner.store([name], [memoryview(forged)]) == [True]
    copied = await copy_all(source, target := MemoryBackend("target"), CONFIG)
    assert (copied.copied, copied.corrupt) == (2, 3)
    assert await content(target) == {key(number): body(number) for number in (0, 4)}
    assert (await copy_all(source, MemoryBackend("other"), CONFIG)).found == 2
