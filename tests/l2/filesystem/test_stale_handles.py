"""A handle may be stale, as over NFS when the server was started anew: the file is there, and is to be opened again."""

import errno
import os

import pytest

from async_cache.errors import BackendError
from async_cache.l2.filesystem import FileSystemBackend
from async_cache.testing.conformance import content, find, get, put


@pytest.fixture
async def start(tmp_path):
    """Makes opened backends on the directory; closed, and checked, at the end."""
    started = []

    async def start(**settings):
        backend = FileSystemBackend(tmp_path / "kv", **settings)
        await backend.open()
        started.append(backend)
        return backend

    yield start
    for backend in started:
        backend.check_integrity()
        await backend.close()


def stale(monkeypatch, ending):
    """Have the handles of those files that are open now, and have such names, be stale."""
    descriptors = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").endswith(ending):
                descriptors.append(int(name))
        except FileNotFoundError:  # that of the listing itself
            continue
    held = [os.dup(fd) for fd in descriptors]  # no other file has its inode meanwhile
    inodes = {os.fstat(fd).st_ino for fd in held}
    assert inodes

    def refuse(name):
        real = getattr(os, name)

        def call(fd, *arguments):
            if fd in descriptors and os.fstat(fd).st_ino in inodes:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return real(fd, *arguments)

        monkeypatch.setattr(os, name, call)

    for name in ("pwrite", "pwritev", "pread", "preadv", "fdatasync", "ftruncate"):
        refuse(name)
    return held


@pytest.mark.parametrize("durability", ["none", "fsync"])
async def test_a_stale_segment_is_opened_anew_by_a_store(start, monkeypatch, durability):
    backend = await start(durability=durability)
    assert await put(backend, range(3), 5000) == [True] * 3
    held = stale(monkeypatch, ".seg")
    assert await put(backend, range(3, 6), 5000) == [True] * 3
    assert await get(backend, range(6), 5000) == [content(number, 5000) for number in range(6)]
    for fd in held:
        os.close(fd)


@pytest.mark.parametrize("durability", ["none", "fsync"])
async def test_a_stale_index_costs_a_store_and_the_directory_is_opened_anew(start, monkeypatch, durability):
    backend = await start(durability=durability)
    assert await put(backend, range(3), 5000) == [True] * 3
    held = stale(monkeypatch, ".idx")
    with pytest.raises(BackendError):
        await put(backend, [3], 5000)
    assert await put(backend, [4], 5000) == [True]
    assert await find(backend, [4]) == [True]
    for fd in held:
        os.close(fd)
    monkeypatch.undo()
    await backend.close()
    other = await start()
    assert await find(other, [0, 1, 2, 4]) == [True] * 4
    assert await get(other, [0, 1, 2, 4], 5000) == [content(number, 5000) for number in (0, 1, 2, 4)]
