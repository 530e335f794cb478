"""What a client maps and writes into: a segment's blocks, and the arena that it can only read."""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from async_cache.client.memory import Segment
from async_cache.memory.arena import Arena
from async_cache.memory.mapping import map_read_only

PAGE = 4096


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment()
    segment.grow(8 * PAGE)
    yield segment
    segment.close()


def mappings(fd: int) -> int:
    """How often this process has mapped the file."""
    inode = os.fstat(fd).st_ino
    return sum(line.split()[4] == str(inode) for line in Path("/proc/self/maps").read_text().splitlines())


# The segment.


def test_blocks_are_written_to_the_file_at_their_offsets(segment: Segment) -> None:
    blocks = segment.blocks(2 * PAGE, 3)
    assert sorted(offset for offset, _ in blocks) == [0, 2 * PAGE, 4 * PAGE]
    for offset, block in blocks:
        view = memoryview(block).cast("B")
        assert (len(view), view.readonly, bytes(view)) == (2 * PAGE, False, bytes(2 * PAGE))
        view[:] = bytes([offset // PAGE + 1]) * len(view)
        assert os.pread(segment.fd, 2 * PAGE, offset) == bytes(view)


def test_there_are_no_more_blocks_than_fit(segment: Segment) -> None:
    held = segment.blocks(3 * PAGE, 5)
    assert len(held) == 2
    assert segment.blocks(3 * PAGE, 1) == []
    assert len(segment.blocks(PAGE, 5)) == 2


def test_a_segment_without_a_size_has_no_blocks() -> None:
    segment = Segment()
    assert segment.blocks(PAGE, 1) == []
    segment.close()


def test_a_block_is_free_again_only_when_no_view_is_left(segment: Segment) -> None:
    [(offset, block)] = segment.blocks(8 * PAGE, 1)
    view = memoryview(block).cast("B")
    part = view[5:10]
    del block
    assert segment.blocks(PAGE, 1) == []
    del view
    part[:] = b"still"
    assert segment.blocks(PAGE, 1) == []
    assert os.pread(segment.fd, 5, offset + 5) == b"still"
    del part
    assert [offset for offset, _ in segment.blocks(8 * PAGE, 1)] == [offset]


def test_an_array_over_it_keeps_its_block(segment: Segment) -> None:
    [(_, block)] = segment.blocks(8 * PAGE, 1)
    array = numpy.frombuffer(memoryview(block).cast("B")[:100], dtype=numpy.uint8)[50:]
    del block
    assert segment.blocks(PAGE, 1) == []
    del array
    gc.collect()
    assert len(segment.blocks(8 * PAGE, 1)) == 1


def test_blocks_are_freed_from_any_thread(segment: Segment) -> None:
    for _ in range(50):
        held = [[block] for block in segment.blocks(PAGE, 8)]
        assert len(held) == 8
        threads = [threading.Thread(target=each.clear) for each in held]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(segment.blocks(PAGE, 9)) == 8


def test_only_what_was_written_to_takes_memory() -> None:
    segment = Segment()
    segment.grow(2**40)
    assert os.fstat(segment.fd).st_blocks == 0
    blocks = segment.blocks(2**30, 3)
    memoryview(blocks[2][1]).cast("B")[: 2 * PAGE] = bytes(2 * PAGE)
    assert os.fstat(segment.fd).st_blocks * 512 == 2 * PAGE
    segment.close()


def test_views_keep_the_memory_of_a_closed_segment(segment: Segment) -> None:
    segment = Segment()
    segment.grow(PAGE)
    [(_, block)] = segment.blocks(PAGE, 1)
    kept = os.dup(segment.fd)
    view = memoryview(block).cast("B")[:5]
    segment.close()
    assert segment.blocks(PAGE, 1) == []
    view[:] = b"still"
    assert os.pread(kept, 5, 0) == b"still"
    assert mappings(kept) == 1
    del view, block
    gc.collect()
    assert mappings(kept) == 0
    os.close(kept)


@pytest.mark.parametrize("size_bytes", [4 * PAGE, 16 * PAGE])
def test_a_segment_keeps_its_size(segment: Segment, size_bytes: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, size_bytes)


# The arena.


@pytest.fixture
def arena_fd() -> Iterator[int]:
    """The descriptor of a memory file of 4 pages."""
    fd = os.memfd_create("arena")
    os.ftruncate(fd, 4 * PAGE)
    yield fd
    os.close(fd)


def test_what_the_server_writes_is_seen(arena_fd: int) -> None:
    view = map_read_only(arena_fd, 4 * PAGE)
    assert (len(view), view.format, view.itemsize) == (4 * PAGE, "B", 1)
    os.pwrite(arena_fd, b"later", PAGE)
    assert view[PAGE : PAGE + 5] == b"later"


def test_the_arena_stays_mapped_until_the_last_view_of_it_is_gone(arena_fd: int) -> None:
    os.pwrite(arena_fd, b"there", PAGE)
    view = map_read_only(arena_fd, 4 * PAGE)
    part = view[PAGE : PAGE + 5].toreadonly()
    del view
    gc.collect()
    assert mappings(arena_fd) == 1
    assert part == b"there"
    del part
    gc.collect()
    assert mappings(arena_fd) == 0


def test_the_arena_is_mapped_though_its_descriptor_is_closed(arena_fd: int) -> None:
    os.pwrite(arena_fd, b"there", 0)
    copy = os.dup(arena_fd)
    view = map_read_only(copy, 4 * PAGE)
    os.close(copy)
    assert view[:5] == b"there"


def test_what_can_not_be_mapped_is_an_error() -> None:
    read_end, write_end = os.pipe()
    with pytest.raises(OSError, match="memory cannot be mapped"):
        map_read_only(read_end, PAGE)
    os.close(read_end)
    os.close(write_end)


WRITES = {
    "through the view": "view[0] = 1",
    "past the view": "ctypes.memset(ctypes.addressof(view.obj), 1, 1)",
}
PROGRAM = """
import ctypes, os, resource, sys
from async_cache.memory.mapping import map_read_only
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
view = map_read_only(int(sys.argv[2]), int(sys.argv[3]))
assert view[0] == 0
print("mapped", flush=True)
exec(sys.argv[1])
"""


@pytest.mark.parametrize("how", WRITES)
def test_whoever_writes_to_the_arena_dies(how: str) -> None:
    arena = Arena(4 * PAGE)
    readable = os.open(f"/proc/self/fd/{arena.fd}", os.O_RDONLY)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, WRITES[how], str(readable), str(4 * PAGE)],
            pass_fds=[readable],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.stdout == "mapped\n", done.stderr
        assert done.returncode == -signal.SIGSEGV
        assert os.pread(arena.fd, 1, 0) == b"\0"
    finally:
        os.close(readable)
        arena.close()
