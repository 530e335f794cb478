"""The shared memory, and the account of what is free in it."""

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from async_cache.memory.arena import Arena
from async_cache.memory.extents import Extents, Gaps
from async_cache.prompt.objects import PAGE_BYTES

SIZE = 8 * PAGE_BYTES


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(SIZE)
    made.seal()
    yield made
    made.close()


def in_another_process(program: str, arena: Arena) -> str:
    """What a program prints that is given the arena as `fd`, and its size as `size`."""
    preamble = "import mmap, os, sys; fd, size = map(int, sys.argv[1:])\n"
    command = [sys.executable, "-c", preamble + program, str(arena.fd), str(arena.size_bytes)]
    return subprocess.run(command, pass_fds=[arena.fd], capture_output=True, text=True, check=True).stdout.strip()


# The memory.


def test_another_process_sees_what_is_written_here(arena: Arena) -> None:
    arena.view[PAGE_BYTES : PAGE_BYTES + 5] = b"bytes"
    read = "print(mmap.mmap(fd, size, access=mmap.ACCESS_READ)[mmap.PAGESIZE:][:5].decode())"
    assert in_another_process(read, arena) == "bytes"


@pytest.mark.parametrize(
    "misuse",
    [
        "mmap.mmap(fd, size)",
        "mmap.mmap(os.open(f'/proc/self/fd/{fd}', os.O_RDWR), size)",
        "os.write(fd, b'overwritten')",
        "os.ftruncate(fd, size // 2)",
        "os.ftruncate(fd, size * 2)",
    ],
)
def test_another_process_can_neither_write_to_it_nor_resize_it(arena: Arena, misuse: str) -> None:
    arena.view[:5] = b"bytes"
    assert in_another_process(f"try: {misuse}\nexcept PermissionError: print('refused')", arena) == "refused"
    arena.view[5:10] = b"still"  # while this one goes on
    assert bytes(arena.view[:10]) == b"bytesstill"


def test_it_begins_at_a_page(arena: Arena) -> None:
    assert ctypes.addressof(arena.export(0, 1)) % PAGE_BYTES == 0


def test_what_is_populated_takes_memory_and_keeps_its_bytes(arena: Arena) -> None:
    arena.view[PAGE_BYTES] = 7
    arena.populate(0, SIZE // 2)
    assert resident_pages(arena) == [True] * 4 + [False] * 4
    assert arena.view[PAGE_BYTES] == 7
    arena.populate(SIZE // 2, SIZE)
    assert all(resident_pages(arena))


def resident_pages(arena: Arena) -> list[bool]:
    pages = (ctypes.c_ubyte * (SIZE // PAGE_BYTES))()
    whole = arena.export(0, SIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.byref(whole), ctypes.c_size_t(SIZE), pages) == 0
    return [bool(page & 1) for page in pages]


def test_closing_it_twice_does_no_harm_and_a_view_that_is_left_stays_good(arena: Arena) -> None:
    view = arena.view[:5]
    view[:] = b"bytes"
    arena.close()
    arena.close()
    assert bytes(view) == b"bytes"
    view.release()


# What is free.


def test_blocks_of_one_size_lie_back_to_back() -> None:
    extents = Extents(100)
    assert extents.allocate(10, 4) == [0, 10, 20, 30]
    assert extents.allocate(10, 9) == [40, 50, 60, 70, 80, 90]
    assert extents.allocate(10, 1) == []


def test_a_hole_is_taken_by_what_fits_it_best() -> None:
    extents = Extents(100)
    extents.allocate(100, 1)
    for begin, size in [(0, 30), (40, 10), (60, 20)]:
        extents.free(begin, size)
    assert [extents.allocate(size, 1) for size in (10, 20, 30)] == [[40], [60], [0]]


def test_neighbours_merge_whatever_the_order_in_which_they_are_freed() -> None:
    extents = Extents(50)
    blocks = extents.allocate(10, 5)
    for begin in (blocks[0], blocks[2], blocks[4], blocks[3], blocks[1]):
        extents.free(begin, 10)
    assert extents.allocate(50, 1) == [0]


def test_without_memory_nothing_is_allocated() -> None:
    extents = Extents(0)
    assert extents.allocate(1, 1) == []
    extents.check_integrity()


class ExtentsMachine(RuleBasedStateMachine):
    """Against a model that has one flag for each byte."""

    SIZE = 60
    blocks = Bundle("blocks")

    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents(self.SIZE)
        self.free = [True] * self.SIZE

    def runs(self) -> list[tuple[int, int]]:
        """(begin, end) of what is free."""
        edges = [i for i in range(self.SIZE + 1) if (i > 0 and self.free[i - 1]) != (i < self.SIZE and self.free[i])]
        return list(zip(edges[::2], edges[1::2], strict=True))

    @rule(target=blocks, size=st.integers(1, 20), count=st.integers(1, 6))
    def allocate(self, size: int, count: int) -> object:
        room = sum((end - begin) // size for begin, end in self.runs())
        offsets = self.extents.allocate(size, count)
        assert len(offsets) == min(count, room)
        for begin in offsets:
            assert all(self.free[begin : begin + size])
            self.free[begin : begin + size] = [False] * size
        return multiple(*((begin, size) for begin in offsets))

    @rule(block=consumes(blocks))
    def give_back(self, block: tuple[int, int]) -> None:
        begin, size = block
        self.extents.free(begin, size)
        self.free[begin : begin + size] = [True] * size

    @precondition(lambda self: not all(self.free))
    @rule(data=st.data())
    def imagine_more_gaps(self, data: st.DataObject) -> None:
        gaps, free = Gaps(self.extents), list(self.free)
        taken = [i for i, is_free in enumerate(free) if not is_free]
        for begin in data.draw(st.lists(st.sampled_from(taken), unique=True)):
            first, last = gaps.add(begin, begin + 1)
            free[begin] = True
            assert first <= begin < last and all(free[first:last])
            assert (first == 0 or not free[first - 1]) and (last == self.SIZE or not free[last])

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.extents.check_integrity()
        assert self.extents.free_bytes == sum(self.free)
        for begin, end in self.runs():
            assert self.extents.around(end, end) == (begin, end)


TestExtents = ExtentsMachine.TestCase
TestExtents.settings = settings(max_examples=50, deadline=None, derandomize=True)


def test_an_arena_that_is_closed_while_it_is_populated_stays_mapped_until_that_ends():
    for _ in range(5):
        arena = Arena(64 * 2**20)
        with ThreadPoolExecutor(1) as executor:
            populating = executor.submit(arena.populate, 0, arena.size_bytes)
            time.sleep(0.002)
            arena.close()
            populating.result()


@pytest.mark.parametrize("when", ["before the system is asked", "while it allocates"])
def test_where_the_kernel_cannot_populate_no_other_file_is_written_to(monkeypatch, tmp_path, when):
    """The arena is closed meanwhile, and a file gets the number of its descriptor."""
    arena = Arena(SIZE)
    taken, allocate = [], os.posix_fallocate

    def close():
        fd = arena.fd
        arena.close()
        taken.append((tmp_path / "file").open("wb"))
        assert taken[0].fileno() == fd

    class Libc:
        @staticmethod
        def madvise(*_):
            if when == "before the system is asked":
                close()
            return -1

    def fallocate(fd, begin, size_bytes):
        close()
        assert fd != taken[0].fileno()
        allocate(fd, begin, size_bytes)

    monkeypatch.setattr("async_cache.memory.arena._libc", Libc)
    monkeypatch.setattr(os, "posix_fallocate", fallocate if when == "while it allocates" else pytest.fail)
    arena.populate(0, SIZE)
    taken[0].close()
    assert not (tmp_path / "file").stat().st_size
