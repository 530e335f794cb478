"""The suite, and what a pool does with a record: leases, eviction, and values that are not what they should be."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import Backend, LoadOutcome
from async_cache.l2.codec.backend import CodecBackend
from async_cache.l2.mooncake import backend as mooncake_backend
from async_cache.l2.mooncake.backend import MooncakeBackend
from async_cache.l2.mooncake.calls import Remove
from async_cache.l2.record import file_name
from async_cache.l2.urls.registry import from_url
from async_cache.prompt.keys import ObjectKey
from async_cache.testing.conformance import MIB, BackendSuite, content, find, get, key, put, views

from ..codec.codecs import kv
from .support import Bare, Master

LOADED, GONE, CORRUPT, FAILED = LoadOutcome
numbers = count()


@pytest.fixture(scope="module")
def master() -> Iterator[Master]:
    with Master() as running:
        yield running


@pytest.fixture(scope="module")
def holder(master: Master) -> Iterator[Bare]:
    with Bare(master, 256 * MIB) as bare:
        yield bare


@pytest.fixture
def namespace() -> str:
    return f"test-{next(numbers)}"


@pytest.fixture
async def backend(master: Master, holder: Bare, namespace: str) -> AsyncIterator[Backend]:
    backend = from_url(master.url(namespace))
    await backend.open()
    yield backend
    await backend.close()


class TestMooncake(BackendSuite):
    """Objects lie in the memory of another process, and travel over TCP."""

    @pytest.fixture(autouse=True)
    def _pool(self, master: Master, holder: Bare, namespace: str) -> None:
        self.master, self.holder, self.namespace = master, holder, namespace

    async def make(self, tmp_path: Path) -> Backend:
        return from_url(self.master.url(self.namespace))

    async def damage(self, backend: Backend, key: ObjectKey, bit: int) -> None:
        name = f"{self.namespace}/{file_name(key)}"
        value = bytearray(self.holder.get(name))
        value[bit // 8] ^= 1 << bit % 8
        self.holder.put(name, value)


@pytest.mark.parametrize("wrong", ["truncated", "oversized", "empty of sense", "of another object"])
async def test_a_value_that_is_no_record_of_its_object_is_corrupt_alone(
    backend: Backend, holder: Bare, namespace: str, wrong: str
) -> None:
    await put(backend, range(3), 5000)
    name, other = (f"{namespace}/{file_name(key(n))}" for n in (1, 2))
    value = holder.get(name)
    assert len(value) == 5064
    replaced = {
        "truncated": value[:-1],
        "oversized": value + b"x",
        "empty of sense": bytes(5064),
        "of another object": holder.get(other),
    }
    holder.put(name, replaced[wrong])
    assert await get(backend, range(3), 5000) == [content(0, 5000), CORRUPT, content(2, 5000)]
    assert await find(backend, [1]) == [False]
    assert await put(backend, [1], 5000) == [True]
    assert await get(backend, [1], 5000) == [content(1, 5000)]


async def test_what_is_found_is_leased_and_cannot_be_evicted(backend: Backend, holder: Bare, namespace: str) -> None:
    await put(backend, [1], 5000)
    assert await backend.lookup([key(1)]) == [True]
    assert holder.call("remove", f"{namespace}/{file_name(key(1))}") == -706  # it has a lease
    assert await backend.delete([key(1)]) == 1


async def test_two_caches_share_a_pool(backend: Backend, master: Master, namespace: str) -> None:
    other = from_url(master.url(namespace))
    await other.open()
    try:
        assert await put(backend, range(4), 5000) == [True] * 4
        assert await find(other, range(4)) == [True] * 4
        assert await get(other, range(4), 5000) == [content(n, 5000) for n in range(4)]
        assert await other.delete([key(0)]) == 1
        assert await find(backend, range(2)) == [False, True]
        assert await get(backend, [0, 1], 5000) == [GONE, content(1, 5000)]
        assert {k async for k, _ in backend.keys()} == {k async for k, _ in other.keys()} == {key(n) for n in (1, 2, 3)}
    finally:
        await other.close()


async def test_namespaces_do_not_see_each_other(backend: Backend, master: Master, namespace: str) -> None:
    await put(backend, [1], 5000)
    other = from_url(master.url(namespace + "-other"))
    await other.open()
    try:
        assert await find(other, [1]) == [False]
        assert [item async for item in other.keys()] == []
    finally:
        await other.close()


async def test_a_pool_that_is_full_stores_nothing_and_what_it_evicts_is_gone(namespace: str) -> None:
    with Master("--default_kv_lease_ttl=500") as master, Bare(master, 16 * MIB):
        backend = from_url(master.url(namespace))
        await backend.open()
        try:
            stored = [(await put(backend, [n], MIB))[0] for n in range(20)]
            assert stored.count(False) >= 4  # more than fits, and no time to evict
            deadline = time.monotonic() + 100
            while not (await put(backend, [99], MIB))[0]:
                assert time.monotonic() < deadline, "nothing is evicted"
                await asyncio.sleep(0.2)
            there = [n for n in range(20) if stored[n]]
            loaded = await get(backend, there, MIB)
            assert GONE in loaded  # what made room
            for n, bytes_or_outcome in zip(there, loaded, strict=True):
                assert bytes_or_outcome in (content(n, MIB), GONE)
        finally:
            await backend.close()


async def test_a_pool_without_memory_stores_nothing(namespace: str) -> None:
    with Master() as master:
        backend = from_url(master.url(namespace))
        await backend.open()
        try:
            assert await put(backend, range(2), 5000) == [False, False]
            assert await find(backend, [0]) == [False]
        finally:
            await backend.close()


async def test_memory_is_given_to_the_pool_by_segment(namespace: str) -> None:
    with Master() as master:
        backend = from_url(master.url(namespace, segment="64MiB"))
        await backend.open()
        try:
            assert await put(backend, range(2), 5000) == [True, True]
            assert await get(backend, range(2), 5000) == [content(0, 5000), content(1, 5000)]
        finally:
            await backend.close()


async def test_what_a_dead_host_held_is_not_read_and_is_stored_anew_elsewhere(namespace: str) -> None:
    with Master() as master:
        backend = from_url(master.url(namespace))
        with Bare(master, 64 * MIB):
            await backend.open()
            assert await put(backend, range(3), 5000) == [True] * 3
        try:
            with pytest.raises(BackendError):  # the holder was killed: nothing can be read
                await get(backend, range(3), 5000)
            with Bare(master, 64 * MIB):
                deadline = time.monotonic() + 100
                while not all(await _stored(backend)):  # until the master takes note that the first one is dead
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.5)
                assert await get(backend, range(3), 5000) == [content(n, 5000) for n in range(3)]
        finally:
            await backend.close()


async def _stored(backend: Backend) -> list[bool]:
    try:
        return await put(backend, range(3), 5000)
    except BackendError:
        return [False]


# Sizes that nobody knows, lots, and listings.


@pytest.mark.parametrize("codec", ["zstd", "aes"])
async def test_what_is_encoded_goes_to_the_pool_and_back_without_a_copy(
    master: Master, holder: Bare, namespace: str, tmp_path: Path, codec: str
) -> None:
    (tmp_path / "keys").write_bytes(bytes(range(100, 132)))
    (tmp_path / "keys").chmod(0o600)
    key_file = f"&key_file={tmp_path}/keys" if codec == "aes" else ""
    backend = from_url(f"{master.url(namespace)}&codec={codec}{key_file}")
    assert isinstance(backend, CodecBackend) and isinstance(backend.inner, MooncakeBackend)
    await backend.open()
    try:
        sizes = [100, MIB, 5 * MIB, 0, 40 * MIB]  # the last one is longer than the memory of a codec
        blobs = [kv(size, seed) for seed, size in enumerate(sizes)]
        keys = [key(n) for n in range(len(sizes))]
        assert await backend.store(keys, views(blobs)) == [True] * len(sizes)
        staged = memoryview(backend.inner._staging[1])[:64]  # type: ignore[index]
        staged[:] = bytes(64)
        buffers = [bytearray(size) for size in sizes]
        assert await backend.load(keys[:-1], views(buffers[:-1])) == [LOADED] * (len(sizes) - 1)
        assert bytes(staged) == bytes(64)  # nothing went that way
        assert await backend.load(keys, views(buffers)) == [LOADED] * len(sizes)
        assert buffers == blobs
        name = f"{namespace}/{file_name(backend.codec.names[0].name(key(1)))}"
        value = bytearray(holder.get(name))
        value[200] ^= 1
        holder.put(name, bytes(value))
        assert (await backend.load(keys, views(buffers)))[:3] == [LOADED, CORRUPT, LOADED]
        assert await find(backend, [0, 1, 2]) == [True, False, True]
        staged.release()
    finally:
        await backend.close()


async def test_objects_that_are_listed_come_page_by_page(
    backend: Backend, master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mooncake_backend, "SLICE", 7)
    assert all(await put(backend, range(20), 100))
    assert sorted([item async for item in backend.keys()]) == sorted((key(n), 100) for n in range(20))
    one, other = aiter(backend.keys()), aiter(backend.keys())
    listed = [await anext(one), await anext(other)]
    await backend.delete([key(n) for n in range(20)])
    listed += [item async for item in one] + [item async for item in other]
    assert len(listed) == 2 * 7  # what has left meanwhile is left out
    left = [aiter(backend.keys()) for _ in range(12)]
    assert all(await put(backend, range(20), 100))
    for listing in left:
        await anext(listing)
    with pytest.raises(BackendError, match="too many listings"):
        assert [item async for item in left[0]]
    assert len([item async for item in left[-1]]) == 19


async def test_what_is_damaged_and_cannot_be_removed_is_not_found_until_it_is_stored_anew(
    backend: MooncakeBackend, holder: Bare, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(await put(backend, range(2), 5000))
    holder.put(f"{namespace}/{file_name(key(1))}", bytes(5064))
    helper = backend._helper
    assert helper is not None
    real, refused = helper.ask, True

    async def ask(call: Any) -> Any:
        if isinstance(call, Remove) and refused:
            return [-900] * len(call.keys)
        return await real(call)

    monkeypatch.setattr(helper, "ask", ask)
    assert await get(backend, range(2), 5000) == [content(0, 5000), CORRUPT]
    assert await find(backend, range(2)) == [True, False]
    refused = False
    assert await put(backend, [1], 5000) == [True]
    assert await find(backend, range(2)) == [True, True]
    assert await get(backend, range(2), 5000) == [content(n, 5000) for n in range(2)]


# What a user may get wrong.


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("mooncake://", "the host of the master is missing"),
        ("mooncake://host:99999", "Port out of range"),
        ("mooncake://host:0", "a port from 1 to 65535"),
        ("mooncake://host/path", "a master has no path"),
        ("mooncake://host?segment=much", "segment"),
        ("mooncake://host?protocol=udp", "'udp' is not tcp or rdma"),
        ("mooncake://host?namespace=a/b", "must be of letters"),
        ("mooncake://host?color=red", "unknown parameter 'color'"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_in_one_line(url: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_url(url)
    assert told in str(refused.value) and "allowed: " in str(refused.value) and "\n" not in str(refused.value)


def test_without_the_extra_it_is_named() -> None:
    code = (
        "from importlib import util; real = util.find_spec;"
        "util.find_spec = lambda name, *a: None if name == 'mooncake' else real(name, *a);"
        "from async_cache.l2.urls.registry import from_url\n"
        "try: from_url('mooncake://host')\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith("ConfigError") and "async-kv-cache[mooncake]" in told
