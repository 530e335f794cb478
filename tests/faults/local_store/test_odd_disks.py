"""File systems that lack something, are full, may only be read, or are taken away under a store."""

import asyncio
import errno
import os
import shutil
import stat
import subprocess
import time
from contextlib import ExitStack, asynccontextmanager, nullcontext, suppress

import pytest

from async_cache import BackendError, ConfigError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.filesystem import FileSystemBackend, following, writers
from async_cache.l2.filesystem.journal import Journal
from async_cache.testing.conformance import key

from .story import SLACK_BYTES, disk_bytes, found, load, store
from .strikes import LACKS, strike

LOADED = LoadOutcome.LOADED
MANY = range(60)
GROUPS = [MANY[begin : begin + 6] for begin in range(0, len(MANY), 6)]


@asynccontextmanager
async def opened(directory, **options):
    backend = FileSystemBackend(directory, **options)
    await backend.open()
    try:
        yield backend
        backend.check_integrity()
        assert backend.pins == 0
    finally:
        await backend.close()


@pytest.fixture
def mounted(tmp_path):
    """A small file system of its own."""
    mount(tmp_path, "size=8m")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], capture_output=True)


def mount(path, options):
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A directory behind FUSE."""
    broken_disk = pytest.importorskip("faults.broken_disk", exc_type=OSError)
    with broken_disk.BrokenDisk(tmp_path, "flushing").mounted() as disk:
        disk.start_anew()
        yield disk


async def test_what_an_older_version_stores_in_the_directory_counts(tmp_path, caplog):
    """It knows nothing of the format, and is about to be replaced: a rolling upgrade."""
    capacity_bytes, theirs = 400 * 4096, 150 * 4096
    async with opened(tmp_path, capacity_bytes=capacity_bytes) as backend:
        for group in GROUPS:
            assert all(await store(backend, group))
        (tmp_path / f"{'0' * 64}.0.0.kv").write_bytes(bytes(theirs))
        assert await found(backend, [10**6]) == []
        for begin in range(1000, 1300, 6):
            assert all(await store(backend, range(begin, begin + 6)))
            assert disk_bytes(tmp_path) <= capacity_bytes + 6 * 5 * 4096
        assert theirs < disk_bytes(tmp_path) and await load(backend, [1299]) == {1299: LOADED}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


# What a file system need not have.


@pytest.mark.parametrize("durability", ["none", "fsync"])
@pytest.mark.parametrize(
    "which",
    LACKS,
)
def test_a_file_system_without(tmp_path, which, durability):
    struck = strike("lack", tmp_path / "kv", durability, which)
    assert which == "times" or struck


# Room.


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("durability", ["none", "fsync"])
def test_a_disk_smaller_than_the_capacity_takes_what_is_new(tmp_path, durability, error):
    directory = tmp_path / "kv"
    directory.mkdir()
    assert sum(strike("overfill", directory, durability, error).values())


async def test_a_directory_larger_than_its_new_capacity_shrinks_at_the_start(tmp_path):
    """What was used last stays; before anything is stored."""
    async with opened(tmp_path, capacity_bytes=None) as backend:
        for group in GROUPS:
            assert all(await store(backend, group))
    before = disk_bytes(tmp_path)
    capacity_bytes = before // 3
    async with opened(tmp_path, capacity_bytes=capacity_bytes) as backend:
        assert [each async for each in backend.keys()]
        there = await found(backend, MANY)
        assert set((await load(backend, there)).values()) == {LOADED}
        assert set(GROUPS[-1]) <= set(there)
        assert GROUPS[0][-1] not in there
    assert disk_bytes(tmp_path) <= capacity_bytes + SLACK_BYTES < before


# What may only be read.


async def test_a_file_system_that_is_made_read_only_is_read(disk):
    """As the kernel does after a fault: what is there is served."""
    async with opened(disk.path) as backend:
        assert all(await store(backend, MANY))
        with ExitStack() as stack:
            for verb in ("create", "write", "truncate", "fallocate", "rename", "unlink", "mkdir"):
                stack.enter_context(disk.broken(verb, "erofs"))
            for _ in range(2):
                assert await found(backend, MANY) == list(MANY)
                assert set((await load(backend, MANY)).values()) == {LOADED}
                with pytest.raises(BackendError):
                    await store(backend, [1000, 1001])
        assert all(await store(backend, [1000, 1001, *MANY]))
        assert set((await load(backend, [1000, 1001, *MANY])).values()) == {LOADED}


async def test_a_read_only_file_system_is_told_at_the_start(mounted):
    directory = mounted / "kv"
    async with opened(directory) as backend:
        assert all(await store(backend, MANY))
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)  # noqa: ASYNC221
    with pytest.raises(ConfigError, match=r"cannot be used: .*Read-only"):
        await FileSystemBackend(directory).open()


# What is taken away.


def removed(directory):
    shutil.rmtree(directory)


def removed_and_made_anew(directory):
    shutil.rmtree(directory)
    directory.mkdir()


def moved_away(directory):
    directory.rename(directory.with_name("elsewhere"))


def another_in_its_place(directory):
    directory.rename(directory.with_name("elsewhere"))
    directory.mkdir()


def unmounted(directory):
    subprocess.run(["umount", "--lazy", directory.parent], check=True)


def emptied(directory):
    for path in directory.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "vanish", [removed, removed_and_made_anew, moved_away, another_in_its_place, unmounted, emptied]
)
async def test_a_directory_that_vanishes_is_made_anew(mounted, vanish):
    """What is stored from then on is in the place where the path is, and not into nothing."""
    directory = mounted / "kv"
    async with opened(directory) as backend:
        assert all(await store(backend, MANY))
        vanish(directory)
        await load(backend, MANY)  # is right, or a miss
        for _ in range(3):
            with suppress(BackendError):
                if all(await store(backend, [100, 101])):
                    break
        assert await found(backend, [100, 101]) == [100, 101]
        async with opened(directory) as other:
            assert await found(other, [100, 101]) == [100, 101]
            assert set((await load(other, [100, 101])).values()) == {LOADED}
        assert set((await load(backend, [100, 101])).values()) == {LOADED}
        assert all(await store(backend, MANY))
        assert await found(backend, MANY) == list(MANY)
        assert set((await load(backend, MANY)).values()) == {LOADED}


async def test_a_file_system_that_is_mounted_anew_is_opened_anew(tmp_path):
    """What was opened before fails for ever then, as all does on a server that was set up anew."""
    broken_disk = pytest.importorskip("faults.broken_disk", exc_type=OSError)
    disk = broken_disk.BrokenDisk(tmp_path)
    with ExitStack() as stack:
        stack.enter_context(disk.mounted())
        disk.start_anew()
        backend = FileSystemBackend(disk.path)
        await backend.open()
        assert all(await store(backend, MANY))
        disk.dies()
        for action in (backend.lookup, backend.delete):
            with suppress(BackendError):
                await action([key(1000)])
        with pytest.raises(BackendError):
            await store(backend, [1000])
        stack.enter_context(disk.mounted_again())
        for _ in range(3):
            with suppress(BackendError):
                if await store(backend, [1001]) == [True]:
                    break
        assert await found(backend, [1001, *MANY]) == [1001, *MANY]
        assert set((await load(backend, [1001, *MANY])).values()) == {LOADED}
        backend.check_integrity()
        await backend.close()


async def test_a_directory_whose_time_stands_still_shows_what_others_store(tmp_path, monkeypatch):
    """Some network file systems keep it for a minute, or have none."""
    fstat = os.fstat

    class StandsStill:
        def __init__(self, status):
            self._status = status

        def __getattr__(self, name):
            return 10**18 if name == "st_mtime_ns" else getattr(self._status, name)

    def still(fd):
        status = fstat(fd)
        return StandsStill(status) if stat.S_ISDIR(status.st_mode) else status

    monkeypatch.setattr(os, "fstat", still)
    monkeypatch.setattr(following, "ADOPT_SECONDS", 0.1)
    async with opened(tmp_path) as one:
        assert all(await store(one, [1]))
        async with opened(tmp_path) as other:
            assert await found(other, [1]) == [1]
            assert all(await store(other, [2]))
            async with asyncio.timeout(60):
                while not await found(one, [2]):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)


async def test_a_server_whose_clock_is_behind_shows_what_others_store(tmp_path, monkeypatch):
    """Two changes of a directory in one tick of its clock have the same time, however late it is here."""
    ours, behind_ns = time.time_ns, 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: ours() + behind_ns)
    monkeypatch.setattr(writers, "has_status_at_hand", lambda fd: False)
    monkeypatch.setattr(Journal, "touch", lambda self: tmp_path.stat().st_mtime_ns)  # it stands still, nearly
    monkeypatch.setattr(following, "ADOPT_SECONDS", 1e9)
    async with opened(tmp_path) as one, opened(tmp_path):
        assert await found(one, [1]) == []
        tick = tmp_path.stat().st_mtime_ns
        async with opened(tmp_path) as other:
            assert all(await store(other, [1]))
            os.utime(tmp_path, ns=(tick, tick))
            assert await found(one, [1]) == [1]


# What does not say the truth, or says it late.


@pytest.mark.parametrize(
    ("verb", "fault"),
    [
        ("getattr", "no links"),
        ("flush", "eio"),
        ("fallocate", "eio"),
        ("fsync", "slow"),
    ],
)
async def test_a_disk_with_a_quirk_stores_and_loads(disk, verb, fault):
    """Files that have no name though they do, an error when a file is closed, one when room is given back."""
    with disk.broken(verb, fault):
        for _ in range(3):
            async with opened(disk.path, durability="fsync") as backend:
                for group in GROUPS:
                    assert all(await store(backend, group))
                assert set((await load(backend, MANY)).values()) == {LOADED}
                with suppress(BackendError) if verb == "fallocate" else nullcontext():
                    assert await backend.delete([key(number) for number in MANY[10:20]]) == 10
                assert not await found(backend, MANY[10:20])
        assert len(list(disk.source.iterdir())) <= len(MANY) + 10
    async with opened(disk.path) as backend:
        assert set(await found(backend, MANY)) == set(MANY) - set(MANY[10:20])
