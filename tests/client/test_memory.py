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
from contract.support import make_prompt

from async_cache import connect
from async_cache.client import memory
from async_cache.client.memory import Block, Segment
from async_cache.memory.arena import Arena
from async_cache.memory.mapping import map_read_only

from .servers import SECONDS, serve_in_process, short_directory, until

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


async def test_blocks_are_written_to_the_file_at_their_offsets(segment: Segment) -> None:
    blocks = segment.blocks(2 * PAGE, 3)
    assert sorted(offset for offset, _ in blocks) == [0, 2 * PAGE, 4 * PAGE]
    for offset, block in blocks:
        view = memoryview(block).cast("B")
        assert (len(view), view.readonly, bytes(view)) == (2 * PAGE, False, bytes(2 * PAGE))
        view[:] = bytes([offset // PAGE + 1]) * len(view)
        assert os.pread(segment.fd, 2 * PAGE, offset) == bytes(view)


async def test_pages_of_a_window_are_never_given_back(segment: Segment) -> None:
    window = segment.window(3 * PAGE)
    assert window is not None and (len(window), window.readonly) == (3 * PAGE, False)
    (offset, block), (_, other) = segment.blocks(2 * PAGE, 2)
    for each in (block, other):
        memoryview(each).cast("B")[:] = b"x" * (2 * PAGE)
    assert offset == 0 and bytes(window) == b"x" * (3 * PAGE)
    del block, other, each
    gc.collect()
    while segment.give_back():
        pass
    assert bytes(window) == b"x" * (3 * PAGE)
    assert os.pread(segment.fd, 8 * PAGE, 0) == b"x" * (3 * PAGE) + bytes(5 * PAGE)
    assert segment.window(100 * PAGE) is not None


async def test_there_are_no_more_blocks_than_fit(segment: Segment) -> None:
    held = segment.blocks(3 * PAGE, 5)
    assert len(held) == 2
    assert segment.blocks(3 * PAGE, 1) == []
    assert len(segment.blocks(PAGE, 5)) == 2


async def test_a_segment_without_a_size_has_no_blocks() -> None:
    segment = Segment()
    assert segment.blocks(PAGE, 1) == []
    segment.close()


async def test_a_block_is_free_again_only_when_no_view_is_left(segment: Segment) -> None:
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


async def test_an_array_over_it_keeps_its_block(segment: Segment) -> None:
    [(_, block)] = segment.blocks(8 * PAGE, 1)
    array = numpy.frombuffer(memoryview(block).cast("B")[:100], dtype=numpy.uint8)[50:]
    del block
    assert segment.blocks(PAGE, 1) == []
    del array
    gc.collect()
    assert len(segment.blocks(8 * PAGE, 1)) == 1


async def test_blocks_are_freed_from_any_thread(segment: Segment) -> None:
    for _ in range(50):
        held = [[block] for block in segment.blocks(PAGE, 8)]
        assert len(held) == 8
        threads = [threading.Thread(target=each.clear) for each in held]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(segment.blocks(PAGE, 9)) == 8


async def test_only_what_was_written_to_takes_memory() -> None:
    segment = Segment()
    segment.grow(2**40)
    assert os.fstat(segment.fd).st_blocks == 0
    blocks = segment.blocks(2**30, 3)
    memoryview(blocks[2][1]).cast("B")[: 2 * PAGE] = bytes(2 * PAGE)
    assert os.fstat(segment.fd).st_blocks * 512 == 2 * PAGE
    segment.close()


async def test_views_keep_the_memory_of_a_closed_segment(segment: Segment) -> None:
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


# Giving memory back.


def resident(fd: int) -> int:
    """The bytes of a memory file that are really there."""
    return os.fstat(fd).st_blocks * 512


def fill(block: Block) -> None:
    memoryview(block).cast("B")[:] = b"x" * len(block)


async def test_what_is_free_is_given_back_a_part_at_a_time_and_reads_as_zeros(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_GIVEN_BACK_BYTES", 2 * PAGE)
    server = map_read_only(segment.fd, 8 * PAGE)
    blocks = [block for _, block in segment.blocks(PAGE, 8)]
    for block in blocks:
        fill(block)
    kept = blocks.pop(3)
    blocks.clear()
    del block
    assert resident(segment.fd) == 8 * PAGE
    left = []
    while segment.give_back():
        left.append(resident(segment.fd) // PAGE)
    assert left == [6, 5, 3, 1]
    assert bytes(server) == bytes(3 * PAGE) + b"x" * PAGE + bytes(4 * PAGE), "and the server meets no fault"
    assert bytes(kept) == b"x" * PAGE
    segment._extents.check_integrity()


async def test_a_segment_that_is_idle_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch, segment: Segment) -> None:
    monkeypatch.setattr(memory, "IDLE_SECONDS", 0.0)
    blocks = [block for _, block in segment.blocks(PAGE, 8)]
    for block in blocks:
        fill(block)
    kept = blocks[:2]
    del blocks, block
    await until(lambda: resident(segment.fd) == 2 * PAGE)
    assert {bytes(block) for block in kept} == {b"x" * PAGE}
    kept.clear()
    await until(lambda: resident(segment.fd) == 0)
    await until(lambda: segment._timer is None)
    assert len(segment.blocks(PAGE, 9)) == 8


async def test_a_segment_that_is_used_keeps_its_memory(segment: Segment) -> None:
    fill(segment.blocks(PAGE, 1)[0][1])
    segment._look()
    assert resident(segment.fd) == PAGE
    segment._look()
    assert resident(segment.fd) == 0


@pytest.mark.parametrize("size_bytes", [4 * PAGE, 16 * PAGE])
async def test_a_segment_keeps_its_size(segment: Segment, size_bytes: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, size_bytes)


# The arena.


def shared_mappings() -> set[str]:
    """The memory files of caches that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/memfd:async_cache" in line}


async def test_a_client_that_closes_unmaps_all_at_once_but_what_is_looked_at(no_collection: None) -> None:
    prompt = make_prompt(3)
    with short_directory() as directory, serve_in_process(f"unix://{directory}/s"):
        before = shared_mappings()
        client = connect(f"unix://{directory}/s")
        async with client:
            async with client.store(prompt) as writer:
                for chunk in writer:
                    chunk.commit()
            await client.prefetch(prompt, request_id="r").load_done
            async with client.read("r") as lease:
                view = lease[0].views[0]
                assert view is not None
                part = view[:1]
            kept = client.memory[:1]
            assert len(shared_mappings() - before) == 2
        del writer, chunk, lease, view, part
        assert len(shared_mappings() - before) == 1, "the arena is looked at"
        assert kept[0] == kept[0]
        del kept
        assert shared_mappings() == before
        del client


async def test_a_connection_that_is_lost_unmaps_all_at_once(no_collection: None) -> None:
    with short_directory() as directory:
        before = shared_mappings()
        with serve_in_process(f"unix://{directory}/s") as process:
            client = await connect(f"unix://{directory}/s").open()
            assert len(shared_mappings() - before) == 2
            process.kill()
            process.wait(SECONDS)
            await until(lambda: shared_mappings() == before)
        await client.close()


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


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
            timeout=100,
        )
        assert done.stdout == "mapped\n", done.stderr
        assert done.returncode == -signal.SIGSEGV
        assert os.pread(arena.fd, 1, 0) == b"\0"
    finally:
        os.close(readable)
        arena.close()
