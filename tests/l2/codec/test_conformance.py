"""Every codec passes the suite, over memory and over a directory."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from faults.disk import Place, place_of

from async_cache.l2.backend import Backend
from async_cache.l2.codec.backend import CodecBackend
from async_cache.l2.codec.codec import Codec
from async_cache.l2.codec.header import HEADER_BYTES
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.memory import MemoryBackend
from async_cache.prompt.keys import ObjectKey
from async_cache.testing import flip_bit
from async_cache.testing.conformance import BackendSuite, content, key, views

from .codecs import CODECS


class OverMemory(BackendSuite):
    codec: ClassVar[Callable[[], Codec]]

    def wrap(self, inner: Backend) -> CodecBackend:
        return CodecBackend(inner, type(self).codec())

    async def make(self, tmp_path: Path) -> Backend:
        return self.wrap(MemoryBackend())

    async def capacity_backend(self, tmp_path: Path, capacity_bytes: int) -> Backend:
        return self.wrap(MemoryBackend(capacity_bytes=capacity_bytes))

    async def damage(self, backend: Backend, key: ObjectKey, bit: int) -> None:
        assert isinstance(backend, CodecBackend)
        assert isinstance(backend.inner, MemoryBackend)
        assert flip_bit(backend.inner, backend.codec.names[0].name(key), bit)

    async def test_keys_lists_every_object_with_its_size(self, backend: Backend) -> None:
        expected = {key(n, rank): 1000 * (n + 1) + rank for n in range(5) for rank in range(2)}
        blobs = [content(n, size) for n, size in enumerate(expected.values())]
        assert all(await backend.store(list(expected), views(blobs)))
        listed = dict([item async for item in backend.keys()])
        assert listed.keys() == expected.keys()
        assert sum(listed.values()) == backend.usage().used_bytes  # what is stored of objects that cannot be compressed
        assert all(HEADER_BYTES <= listed[k] - expected[k] <= HEADER_BYTES + 16 for k in listed)


class OverDirectory(OverMemory):
    async def make(self, tmp_path: Path) -> Backend:
        return self.wrap(FileSystemBackend(tmp_path / "kv", segment_bytes=1))

    async def capacity_backend(self, tmp_path: Path, capacity_bytes: int) -> Backend:
        return self.wrap(FileSystemBackend(tmp_path / "kv", capacity_bytes=capacity_bytes))

    def place(self, backend: Backend, key: ObjectKey) -> Place:
        assert isinstance(backend, CodecBackend)
        assert isinstance(backend.inner, FileSystemBackend)
        return place_of(Path(backend.inner.path), backend.codec.names[0].name(key))

    async def damage(self, backend: Backend, key: ObjectKey, bit: int) -> None:
        place = self.place(backend, key)
        data = bytearray(place.read())
        data[bit // 8] ^= 1 << bit % 8
        place.write(data)

    @pytest.fixture(autouse=True)
    def _patching(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    async def make_unreadable(self, backend: Backend, key: ObjectKey) -> None:
        bad, real = str(self.place(backend, key).path), os.preadv

        def preadv(fd: int, *arguments: object) -> int:
            if os.readlink(f"/proc/self/fd/{fd}") == bad:
                raise OSError(errno.EIO, "bad sector")
            return real(fd, *arguments)

        self.monkeypatch.setattr(os, "preadv", preadv)


class TestZstdOverMemory(OverMemory):
    codec = CODECS["zstd"]


class TestAesOverMemory(OverMemory):
    codec = CODECS["aes"]


class TestBothOverMemory(OverMemory):
    codec = CODECS["zstd,aes"]


class TestZstdOverADirectory(OverDirectory):
    codec = CODECS["zstd"]


class TestALevelOverADirectory(OverDirectory):
    codec = CODECS["zstd:3"]


class TestAesOverADirectory(OverDirectory):
    codec = CODECS["aes"]


class TestBothOverADirectory(OverDirectory):
    codec = CODECS["zstd,aes"]
