"""One block of shared memory, and which parts of it are free.

The memory is a memfd, so that other processes can map it: its size is sealed, and so is any new writable mapping.
Extents are in bytes and multiples of a page, so that blocks suit O_DIRECT and registration with a GPU or NIC.
"""

import ctypes
import fcntl
import mmap
import os
import weakref
from bisect import bisect_left, insort
from collections.abc import Iterable

_MADV_POPULATE_WRITE = 23  # Linux 5.14
_F_ADD_SEALS = 1033
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_FUTURE_WRITE = 0x1, 0x2, 0x4, 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value


class Arena:
    """The memory itself: `fd` to map it elsewhere, `view` to use it here."""

    def __init__(self, size_bytes: int):
        self.size_bytes = size_bytes
        self.fd = os.memfd_create("async_cache", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size_bytes)
            self._map = mmap.mmap(self.fd, size_bytes)
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
            self._seal_new_writers()
        except BaseException:
            os.close(self.fd)
            raise
        self.view = memoryview(self._map)

    def _seal_new_writers(self) -> None:
        try:
            fcntl.fcntl(self.fd, _F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        except OSError:  # before Linux 5.1: other processes are trusted to map read-only
            return

    def populate(self, begin: int, end: int) -> None:
        """Fault the pages in, so that no request pays for it. Blocks, without the interpreter's lock."""
        start = ctypes.c_char.from_buffer(self._map, begin)  # which keeps it mapped, also where the arena is closed
        if _libc.madvise(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(end - begin), _MADV_POPULATE_WRITE):
            os.posix_fallocate(self.fd, begin, end - begin)

    def export(self, offset: int, size_bytes: int) -> "ctypes.Array[ctypes.c_ubyte]":
        """A buffer of its own over a range: it lives until the last view or array made from it is gone."""
        return (ctypes.c_ubyte * size_bytes).from_buffer(self._map, offset)

    def close(self) -> None:
        """Unmap, unless somebody still looks at it: then the last one does by letting go."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        try:
            self.view.release()
            self._map.close()
        except BufferError:
            return


def map_read_only(fd: int, size_bytes: int) -> memoryview:
    """Another process's memory. It stays mapped until the last view of it is gone.

    The pages can not be written to, whatever the view says: torch warns of tensors over a view that is read-only.
    """
    address = _libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, f"memory can not be mapped: {os.strerror(error)}")
    array = (ctypes.c_ubyte * size_bytes).from_address(address)
    weakref.finalize(array, _libc.munmap, address, size_bytes).atexit = False
    return memoryview(array).cast("B")


class Extents:
    """The free ranges of [0, size): best fit, neighbours merged at once.

    Blocks of one size come back to back from the same extent; a freed hole is taken again by what fits it best.
    """

    def __init__(self, size_bytes: int):
        self.size_bytes = size_bytes
        self.free_bytes = 0
        self._length_at: dict[int, int] = {}  # begin -> length
        self._begin_of: dict[int, int] = {}  # end -> begin
        self._begins: dict[int, dict[int, None]] = {}  # length -> begins
        self._lengths: list[int] = []  # the keys of _begins, ascending
        if size_bytes:
            self.free(0, size_bytes)

    def allocate(self, size_bytes: int, count: int) -> list[int]:
        """Offsets of up to `count` blocks, fewer if there is no room."""
        offsets: list[int] = []
        while len(offsets) < count:
            i = bisect_left(self._lengths, size_bytes)
            if i == len(self._lengths):
                break
            begins = self._begins[self._lengths[i]]
            begin, _ = begins.popitem()  # the last, without a walk over what was removed before it
            begins[begin] = None
            blocks = min(count - len(offsets), self._lengths[i] // size_bytes)
            self._take(begin, blocks * size_bytes)
            offsets.extend(range(begin, begin + blocks * size_bytes, size_bytes))
        return offsets

    def around(self, begin: int, end: int) -> tuple[int, int]:
        """A range that is not free, grown by the free ranges that touch it."""
        return self._begin_of.get(begin, begin), end + self._length_at.get(end, 0)

    def free(self, begin: int, size_bytes: int) -> None:
        """Give a range back."""
        end = begin + size_bytes
        before = self._begin_of.get(begin)
        if before is not None:
            self._remove(before)
            begin = before
        after = self._length_at.get(end)
        if after is not None:
            self._remove(end)
            end += after
        self._add(begin, end - begin)

    def free_all(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Give ranges, as (begin, bytes), back: a row of them costs little more than one."""
        begin = end = 0
        for first, size_bytes in sorted(ranges):
            if first != end:
                if end > begin:
                    self.free(begin, end - begin)
                begin = first
            end = first + size_bytes
        if end > begin:
            self.free(begin, end - begin)

    def _take(self, begin: int, size_bytes: int) -> None:
        length = self._length_at[begin]
        self._remove(begin)
        if size_bytes < length:
            self._add(begin + size_bytes, length - size_bytes)

    def _add(self, begin: int, length: int) -> None:
        self.free_bytes += length
        self._length_at[begin] = length
        self._begin_of[begin + length] = begin
        begins = self._begins.get(length)
        if begins is None:
            begins = self._begins[length] = {}
            insort(self._lengths, length)
        begins[begin] = None

    def _remove(self, begin: int) -> None:
        length = self._length_at.pop(begin)
        self.free_bytes -= length
        del self._begin_of[begin + length]
        begins = self._begins[length]
        del begins[begin]
        if not begins:
            del self._begins[length]
            del self._lengths[bisect_left(self._lengths, length)]

    def check_integrity(self) -> None:
        """Free ranges lie within, do not touch each other, and every index of them agrees."""
        ranges = sorted(self._length_at.items())
        assert sum(length for _, length in ranges) == self.free_bytes
        assert all(b + length < ranges[i + 1][0] for i, (b, length) in enumerate(ranges[:-1]))
        assert all(b >= 0 and length > 0 and b + length <= self.size_bytes for b, length in ranges)
        assert self._begin_of == {b + length: b for b, length in ranges}
        assert sorted((length, b) for length, begins in self._begins.items() for b in begins) == sorted(
            (length, b) for b, length in ranges
        )
        assert self._lengths == sorted(self._begins)


class Gaps:
    """What would be free if more ranges were: nothing is freed."""

    def __init__(self, extents: Extents):
        self._extents = extents
        self._end_of: dict[int, int] = {}
        self._begin_of: dict[int, int] = {}

    def add(self, begin: int, end: int) -> tuple[int, int]:
        """The gap that this range would leave, with all that touches it."""
        first, last = self._extents.around(begin, end)
        first, last = self._begin_of.pop(begin, first), self._end_of.pop(end, last)
        self._end_of[first], self._begin_of[last] = last, first
        return first, last
