"""Which parts of a memory are free: a free list of extents, in bytes and multiples of a page."""

from bisect import bisect_left, insort
from collections.abc import Iterable


class Extents:
    """The free list of [0, size) as ranges: best fit, neighbours merged at once.

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

    def ranges(self) -> list[tuple[int, int]]:
        """The free ranges, as (begin, end), ascending."""
        return sorted((begin, begin + length) for begin, length in self._length_at.items())

    def free(self, begin: int, size_bytes: int) -> None:
        """Free a range, which merges with the free ranges that touch it."""
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
        """Free ranges, as (begin, bytes): a row of them costs little more than one."""
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
        """Assert that free ranges lie within, do not touch each other, and that every index of them agrees."""
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
