"""A backend with a codec: keys, forgeries, threads, memory, and what of the inner backend shows."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_64_intdigest

from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import Backend, Limits, LoadOutcome
from async_cache.l2.codec import backend as codec_backend
from async_cache.l2.codec import scratch
from async_cache.l2.codec.aes import Aes
from async_cache.l2.codec.backend import CodecBackend
from async_cache.l2.codec.codec import Codec
from async_cache.l2.codec.header import Header
from async_cache.l2.codec.zstd import Zstd
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.memory import STEP_BYTES, MemoryBackend, _Object
from async_cache.prompt.keys import ObjectKey
from async_cache.testing import FailingBackend, GatedBackend
from async_cache.testing.conformance import CANARY, content, find, get, holds_the_loop, key, put, views

from .codecs import CODECS, KEY, OTHER_KEY, kv

LOADED, GONE, CORRUPT, FAILED = LoadOutcome
MIB = 2**20


def aes(*keys: bytes) -> Codec:
    return Codec(encryption=Aes(keys))


@asynccontextmanager
async def opened(inner: Backend, codec: Codec, **options: Any):
    """A backend with a codec, while it is open."""
    backend = CodecBackend(inner, codec, **options)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


def encoded(backend: CodecBackend, key: ObjectKey) -> bytes:
    """What the memory behind a codec has for an object."""
    assert isinstance(backend.inner, MemoryBackend)
    return b"".join(backend.inner._objects[backend.codec.names[0].name(key)].pieces)


def forge(backend: CodecBackend, key: ObjectKey, data: bytes) -> None:
    """Put other bytes in its place, and a checksum that fits them, as who can write to the store may do."""
    inner, name = backend.inner, backend.codec.names[0].name(key)
    assert isinstance(inner, MemoryBackend)
    pieces = [bytearray(data[begin : begin + STEP_BYTES]) for begin in range(0, len(data), STEP_BYTES)]
    inner._objects[name] = _Object(pieces, len(data), xxh3_64_intdigest(data))
    inner._index.put(name, len(data))


# Keys.


async def test_a_note_is_encoded_and_read_alone() -> None:
    inner = MemoryBackend()
    async with opened(inner, aes(KEY)) as backend:
        for name in ("a", "b"):
            await backend.keep_note(name, name.encode() * 1000)
        assert b"a" * 100 not in inner._notes["a"]
        inner._notes["b"] = inner._notes["a"]
        assert [await backend.note(name) for name in ("a", "b", "c")] == [b"a" * 1000, None, None]
        assert await backend.notes() == {"a": b"a" * 1000}


async def test_under_another_key_an_object_is_absent_and_stays_for_others() -> None:
    store = MemoryBackend()
    async with opened(store, aes(KEY)) as ours, opened(store, aes(OTHER_KEY)) as theirs:
        assert await put(ours, [1, 2], 5000) == [True, True]
        assert await find(theirs, [1, 2]) == [False, False]
        assert await get(theirs, [1, 2], 5000) == [GONE, GONE]
        assert await put(theirs, [1], 5000) == [True]
        assert await theirs.delete([key(1), key(2)]) == 1
        assert await get(ours, [1, 2], 5000) == [content(1, 5000), content(2, 5000)]


async def test_a_key_that_came_later_encrypts_and_older_ones_still_decrypt() -> None:
    store = MemoryBackend()
    async with opened(store, aes(KEY)) as before:
        await put(before, [1, 2], 5000)
    async with opened(store, aes(OTHER_KEY, KEY)) as during:
        keys = [key(n) for n in (1, 2, 3)]
        assert during.lookup_nowait([key(1).chunk_hash], [(0, 0)]) is None
        assert await put(during, [3], 5000) == [True]
        assert during.lookup_nowait([key(3).chunk_hash, key(1).chunk_hash], [(0, 0)]) is None
        assert store.pins == 0
        assert await during.lookup(keys) == [True, True, True]
        assert await get(during, [1, 2, 3], 5000) == [content(n, 5000) for n in (1, 2, 3)]
        assert store.pins == 3
        during.unpin(keys)
        assert store.pins == 0 and not during._found_older
        during.check_integrity()
        assert sorted([k async for k, _ in during.keys()]) == sorted(keys)
        assert await during.delete([key(2)]) == 1
        assert await put(during, [1], 5000) == [True]
    async with opened(store, aes(OTHER_KEY)) as after:
        assert await get(after, [1, 2, 3], 5000) == [content(1, 5000), GONE, content(3, 5000)]


async def test_what_others_stored_is_told_at_once_when_it_was_heard_of(tmp_path: Path) -> None:
    codec, here = aes(KEY), [key(0)[1:]]
    async with opened(FileSystemBackend(tmp_path), codec) as one, opened(FileSystemBackend(tmp_path), codec) as other:
        assert one.follows and not CodecBackend(FileSystemBackend(tmp_path), aes(OTHER_KEY, KEY)).follows
        assert await put(other, [1, 2], 5000) == [True, True]
        hashes = [key(n).chunk_hash for n in (1, 2, 3)]
        assert one.lookup_nowait(hashes, here) is None
        lookup = await one.lookup_later()
        assert lookup is not None and lookup(hashes, here) == [True, True, False]
        assert await get(one, [1, 2], 5000) == [content(1, 5000), content(2, 5000)]
        one.unpin([key(1), key(2)])
        one._faults.hide([key(1)])
        assert lookup(hashes, here) is None


async def test_a_lookup_that_fails_for_older_keys_has_pinned_nothing() -> None:
    store = MemoryBackend()
    async with opened(store, aes(OTHER_KEY, KEY)) as plain:
        await put(plain, [1], 5000)
    failing = FailingBackend(store, "lookup", nth=2)
    async with opened(failing, aes(OTHER_KEY, KEY)) as backend:
        with pytest.raises(BackendError):
            await backend.lookup([key(1), key(2)])
        assert store.pins == 0


async def test_objects_of_every_codec_and_plain_ones_lie_side_by_side(tmp_path: Path) -> None:
    inner = FileSystemBackend(tmp_path)
    await inner.open()
    assert await put(inner, [1], 5000) == [True]
    await inner.close()
    for name, codec in CODECS.items():
        if name == "zstd:3":
            continue  # it is the same codec, and finds what zstd has stored
        async with opened(FileSystemBackend(tmp_path), codec()) as backend:
            assert await find(backend, [1]) == [False], name
            assert await put(backend, [1], 5000) == [True]
            assert await get(backend, [1], 5000) == [content(1, 5000)]
            assert [k async for k, _ in backend.keys()] == [key(1)]
    async with opened(FileSystemBackend(tmp_path), CODECS["zstd:3"]()) as backend:
        assert await get(backend, [1], 5000) == [content(1, 5000)]
    await inner.open()
    assert await get(inner, [1], 5000) == [content(1, 5000)]
    await inner.close()


# Forgeries: each is a miss of its own, and can be stored again.

FORGERIES: dict[str, Callable[[CodecBackend, bytes], bytes]] = {
    "empty": lambda backend, data: b"",
    "truncated within the header": lambda backend, data: data[:40],
    "truncated": lambda backend, data: data[:-1],
    "swapped": lambda backend, data: encoded(backend, key(2)),
    "of a newer version": lambda backend, data: data[:6] + b"\x02" + data[7:],
    "of another size": lambda backend, data: Header(0, 0, 0, 4999).pack() + bytes(4999),
}
FORGERIES_OF_AES: dict[str, Callable[[CodecBackend, bytes], bytes]] = {
    "plain": lambda backend, data: Header(0, 0, 0, 5000).pack() + bytes(5000),
    "plain, with a tag": lambda backend, data: Header(0, 0, 0, 5000).pack() + bytes(5016),
    "said to be plain": lambda backend, data: data[:10] + b"\0" + data[11:],
    "with one bit of its tag flipped": lambda backend, data: data[:-1] + bytes([data[-1] ^ 1]),
    "under an unknown key": lambda backend, data: data[:24] + bytes(8) + data[32:],
}


@pytest.mark.parametrize(
    ("name", "forgery"),
    [(name, forgery) for name in CODECS for forgery in FORGERIES if not (name[:4] == "zstd" and forgery == "swapped")]
    + [("zstd,aes", "swapped")]
    + [(name, forgery) for name in ("aes", "zstd,aes") for forgery in FORGERIES_OF_AES],
)
async def test_a_forged_object_is_corrupt_alone_and_can_be_stored_again(name: str, forgery: str) -> None:
    async with opened(MemoryBackend(), CODECS[name]()) as backend:
        await put(backend, [1, 2, 3], 5000)
        forge(backend, key(1), (FORGERIES | FORGERIES_OF_AES)[forgery](backend, encoded(backend, key(1))))
        assert await get(backend, [3, 1, 2], 5000) == [content(3, 5000), CORRUPT, content(2, 5000)]
        assert await find(backend, [1]) == [False]
        assert await put(backend, [1], 5000) == [True]
        assert await get(backend, [1], 5000) == [content(1, 5000)]


# Threads and memory.


class Held(Codec):
    """A codec whose steps wait in their thread until they are let go."""

    def __init__(self) -> None:
        super().__init__(Zstd(), Aes([KEY]))
        self.entered, self.go = threading.Event(), threading.Event()

    def _hold(self) -> None:
        self.entered.set()
        assert self.go.wait(100)

    def encode(self, *arguments: Any) -> int:
        self._hold()
        return super().encode(*arguments)

    def decode(self, *arguments: Any) -> bool:
        self._hold()
        return super().decode(*arguments)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 30)


@pytest.mark.parametrize("verb", ["load", "store"])
async def test_a_call_that_is_cancelled_ends_when_no_thread_has_its_buffers(verb: str) -> None:
    codec = Held()
    async with opened(MemoryBackend(), codec) as backend:
        codec.go.set()
        await put(backend, range(2), MIB)
        codec.go.clear()
        codec.entered.clear()
        buffers = [bytearray(content(n, MIB)) for n in range(2)]
        call = getattr(backend, verb)([key(n) for n in range(2)], views(buffers))
        task = asyncio.create_task(call)
        await codec.reached()
        task.cancel()
        done, _ = await asyncio.wait((task,), timeout=0.05)
        assert not done
        codec.go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        for buffer in buffers:
            buffer[:] = bytes([CANARY]) * MIB
        assert await get(backend, range(2), MIB) == [content(n, MIB) for n in range(2)]
        assert all(buffer.count(CANARY) == MIB for buffer in buffers)


@pytest.mark.parametrize("name", CODECS)
async def test_fifty_loads_at_once_do_not_hold_the_loop(name: str) -> None:
    async with opened(MemoryBackend(), CODECS[name]()) as backend:
        blobs = [kv(MIB, seed) for seed in range(10)]
        keys = [key(n) for n in range(10)]
        assert all(await backend.store(keys, views(blobs)))
        buffers = [[bytearray(MIB) for _ in keys] for _ in range(50)]
        for _ in range(5):  # a busy machine spoils a round, a backend that holds the loop spoils all
            held = await holds_the_loop(_all(backend.load(keys, views(into)) for into in buffers))
            assert all(into == blobs for into in buffers)
            if not held:
                return
        pytest.fail("fifty loads held the loop")


async def _all(calls: Any) -> None:
    for outcomes in await asyncio.gather(*calls):
        assert outcomes == [LOADED] * len(outcomes)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "code" in thread.name}


async def test_its_threads_end_when_it_closes() -> None:
    assert threads() == set()
    backend = CodecBackend(MemoryBackend("near"), CODECS["zstd"](), threads=2)
    await backend.open()
    assert threads() == {f"near {way} {n}" for way in ("encode", "decode") for n in range(2)}
    await put(backend, [1], 5000)
    await backend.close()
    for thread in [thread for thread in threading.enumerate() if "code" in thread.name]:
        await asyncio.to_thread(thread.join, 10)
    assert threads() == set()
    await backend.close()


async def test_it_closes_though_a_thread_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_backend, "CLOSE_SECONDS", 0.05)
    codec = Held()
    async with opened(MemoryBackend(), codec) as backend:
        task = asyncio.create_task(put(backend, [1], 5000))
        await codec.reached()
    with pytest.raises(BackendError):
        await task
    codec.go.set()


class Counted(MemoryBackend):
    """It knows how many bytes it was given to load into at a time."""

    most = now = 0

    async def load_sized(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[int | LoadOutcome]:
        self.now += sum(map(len, buffers))
        self.most = max(self.most, self.now)
        try:
            return await super().load_sized(keys, buffers)
        finally:
            self.now -= sum(map(len, buffers))


@pytest.mark.parametrize("name", ["zstd", "aes"])
async def test_memory_for_encoded_objects_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "SLAB_BYTES", 3 * MIB)
    sizes = [MIB] * 5 + [1000, 4 * MIB + 1, 5 * MIB] + [MIB // 2] * 6  # some are longer than a slab
    keys, blobs = [key(n) for n in range(len(sizes))], [content(n, size) for n, size in enumerate(sizes)]
    async with opened(inner := Counted(), CODECS[name]()) as backend:
        assert await backend.store(keys, views(blobs)) == [True] * len(keys)
        buffers = [[bytearray(size) for size in sizes] for _ in range(6)]
        await asyncio.gather(*(backend.load(keys, views(into)) for into in buffers))
        assert all(into == blobs for into in buffers)
        assert inner.most <= 2 * (5 * MIB + 1000)


async def test_who_waits_for_memory_can_be_cancelled() -> None:
    gate = GatedBackend(MemoryBackend())
    async with opened(gate, CODECS["zstd"]()) as backend:
        await put(backend, [1], 5000)
        gate.hold("load")
        tasks = [asyncio.create_task(get(backend, [1], 5000)) for _ in range(5)]
        await gate.reached("load", codec_backend.SLABS)
        tasks[-1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks.pop()
        gate.release()
        assert await asyncio.gather(*tasks) == [[content(1, 5000)]] * 4


async def test_objects_of_a_storage_that_is_silent_do_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "PATIENCE_SECONDS", 0.02)

    class Silent(MemoryBackend):
        """Of which one object never comes."""

        async def load_sized(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[int | LoadOutcome]:
            if names.name(key(1)) in keys:
                await asyncio.Event().wait()
            return await super().load_sized(keys, buffers)

    codec = CODECS["zstd"]()
    names = codec.names[0]
    async with opened(Silent(), codec) as backend:
        await put(backend, [1, 2], 5000)
        silent = [asyncio.create_task(get(backend, [1], 5000)) for _ in range(codec_backend.SLABS + 3)]
        for _ in range(2 * scratch.MOST_MORE):  # what was lent is given back
            assert await get(backend, [2], 5000) == [content(2, 5000)]
        for task in silent:
            task.cancel()
        await asyncio.wait(silent)
        assert backend._load_scratch._more == 0 and backend._load_scratch._free.qsize() == codec_backend.SLABS


# The inner backend.


async def test_what_cannot_be_decoded_and_not_be_removed_is_not_found_until_it_is_stored_anew() -> None:
    failing = FailingBackend(MemoryBackend(), "delete", times=2)
    async with opened(failing, CODECS["zstd"]()) as backend:
        assert isinstance(failing.inner, MemoryBackend)
        await put(backend, [1, 2], 5000)
        name = backend.codec.names[0].name(key(1))
        await failing.inner.delete([name])
        await failing.inner.store([name], [memoryview(b"nothing that could be decoded")])
        assert await get(backend, [1, 2], 5000) == [CORRUPT, content(2, 5000)]
        assert await find(backend, [1, 2]) == [False, True]
        assert backend.lookup_nowait([key(1).chunk_hash], [(0, 0)]) is None
        assert failing.inner.pins == 0
        assert await put(backend, [1, 3], 5000) == [False, True]  # it cannot be replaced yet
        assert await find(backend, [1, 3]) == [False, True]
        assert await put(backend, [1], 5000) == [True]
        assert await find(backend, [1]) == [True]
        assert await get(backend, [1], 5000) == [content(1, 5000)]


async def test_a_load_of_several_lots_that_is_stuck_at_the_close_is_a_fault_of_the_storage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scratch, "SLAB_BYTES", 3 * MIB)
    monkeypatch.setattr(codec_backend, "CLOSE_SECONDS", 0.05)
    codec = Held()
    async with opened(MemoryBackend(), codec) as backend:
        codec.go.set()
        await put(backend, range(6), MIB)
        codec.go.clear()
        codec.entered.clear()
        task = asyncio.create_task(get(backend, range(6), MIB))
        await codec.reached()
    with pytest.raises(BackendError, match="closed"):
        await task
    codec.go.set()


async def test_a_storage_that_fails_is_told_as_without_a_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "SLAB_BYTES", 3 * MIB)
    async with opened(FailingBackend(MemoryBackend(), "load", nth=2, times=None), CODECS["zstd"]()) as backend:
        assert await put(backend, range(6), MIB) == [True] * 6
        found = await get(backend, range(6), MIB)  # three lots, of which one is loaded
        assert found[:2] == [content(n, MIB) for n in range(2)]
        assert found[2:] == [FAILED] * 4
        with pytest.raises(BackendError, match="injected"):
            await get(backend, range(6), MIB)
    for nth, stored in ((1, None), (2, [True, True, False, False, False, False])):
        async with opened(FailingBackend(MemoryBackend(), "store", nth=nth), CODECS["zstd"]()) as backend:
            if stored is None:
                with pytest.raises(BackendError, match="injected"):
                    await put(backend, range(6), MIB)
            else:
                assert await put(backend, range(6), MIB) == stored


async def test_its_name_limits_and_usage_are_those_of_what_it_wraps() -> None:
    inner = MemoryBackend("near", capacity_bytes=10**6)
    inner.limits = Limits(load_timeout_seconds=5)
    inner.shared = True
    async with opened(inner, CODECS["zstd"]()) as backend:
        assert (backend.name, backend.limits, backend.shared) == ("near", inner.limits, True)
        await backend.store([key(1)], [memoryview(kv(2**19))])
        usage = backend.usage()
        assert usage == inner.usage()
        assert usage.used_bytes < 2**19 / 1.4  # of the room, an object takes what is stored of it


def test_a_backend_that_cannot_load_what_it_does_not_know_the_size_of_is_refused() -> None:
    class Old(MemoryBackend):
        load_sized = Backend.load_sized

    with pytest.raises(ConfigError, match="codec: Old loads only what it is told the size of"):
        CodecBackend(Old(), CODECS["zstd"]())
