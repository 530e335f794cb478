"""Which entries leave for a block: the oldest, and none in vain."""

from collections.abc import Callable, Collection, Iterator, Mapping

from async_cache.l1.entry import Entry
from async_cache.l1.shares import Shares
from async_cache.memory.extents import Extents, Gaps

_CONSIDERED = 4  # times the room that is needed: so much of what is oldest may turn out to lie side by side
_MAX_STEPS = 4096  # through memory for one block, where it is fragmented


class Victims:
    """Chooses, in the order of the shares, which entries leave together a gap that is long enough; evicts nothing."""

    def __init__(self, shares: Shares, extents: Extents, index: Mapping[bytes, Entry], are_left: Callable[[], bool]):
        self._shares = shares
        self._extents = extents
        self._index = index
        self._are_left = are_left
        self.entry_at: dict[int, Entry] | None = None
        """Whose block lies at an offset: None until sizes turn out to be mixed, then kept by who changes that."""

    def of(self, owner: str) -> Iterator[Entry]:
        """The entries that may be evicted for an owner, in order. What is kept comes back when it is let go."""
        if not self._are_left():
            return
        for share, entry in self._shares.victims(owner):
            if entry.leases or entry.pins:
                share.policy.suspend(entry)
            else:
                yield entry
                if not self._are_left():
                    return

    def for_block(self, size_bytes: int, owner: str) -> Collection[Entry]:
        """The entries that leave room for a block of an owner; none where no gap would be long enough."""
        return self._oldest_together(size_bytes, owner) or self._oldest_and_behind(size_bytes, owner)

    def _oldest_together(self, size: int, owner: str) -> Collection[Entry]:
        """The oldest entries that lie side by side and leave room for a block; none if they are too scattered."""
        gaps = Gaps(self._extents)
        tried: list[Entry] = []
        considered = 0
        for entry in self.of(owner):
            tried.append(entry)
            blocks = entry.blocks()
            for begin, length in blocks:
                first, last = gaps.add(begin, begin + length)
                if last - first >= size:
                    if len(tried) == 1:
                        return tried
                    return [e for e in tried if any(b < first + size and first < b + n for b, n in e.blocks())]
            considered += blocks[0][1]
            if considered >= _CONSIDERED * size:
                break
        return ()

    def _oldest_and_behind(self, size: int, owner: str) -> Collection[Entry]:
        """The oldest entry that leaves room for a block together with what lies behind it; none if there is none."""
        if self.entry_at is None:
            self.entry_at = self._blocks_in_index()
        entry_at, steps = self.entry_at, 0
        for entry in self.of(owner):
            for begin, length in entry.blocks():
                row = {entry: None}
                first, last = self._extents.around(begin, begin + length)
                while last - first < size:
                    after = entry_at.get(last)
                    if after is None or after.leases or after.pins or not self._shares.may_leave(after, owner):
                        break
                    row[after] = None
                    length = next(n for b, n in after.blocks() if b == last)
                    last = self._extents.around(last, last + length)[1]
                else:
                    return row
                steps += len(row)
            if steps >= _MAX_STEPS:
                break
        return ()

    def _blocks_in_index(self) -> dict[int, Entry]:
        return {offset: entry for entry in self._index.values() for offset, _ in entry.blocks()}

    def check_integrity(self) -> None:
        """Assert that it is known where blocks lie."""
        assert self.entry_at is None or self.entry_at == self._blocks_in_index()
