"""Who waits until what was committed before is stored, all of it or that of some owners.

Each flush begins an epoch, and a chunk is of the epoch in which it began to wait. A flush waits for those of its own
epoch and before: it is over when the oldest that is left is newer. So a chunk that is stored costs the same, however
many flushes there are.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Collection


class Flush:
    """Somebody waits for the chunks of an epoch and before, of these owners or of all (None)."""

    __slots__ = ("done", "epoch", "owners")

    def __init__(self, epoch: int, owners: frozenset[str] | None):
        self.epoch, self.owners = epoch, owners
        self.done = asyncio.Event()


class Flushes:
    """The flushes that wait, and how many chunks are left of each epoch."""

    def __init__(self) -> None:
        self._epoch = 0
        self._left: dict[str | None, dict[int, int]] = {}  # by owner, and of all; the epochs in order
        self._waiting: dict[frozenset[str] | None, OrderedDict[Flush, None]] = {}  # the first to be over first

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def began(self, owner: str) -> int:
        """A chunk begins to wait: its epoch."""
        for whose in (None, owner):
            left = self._left.setdefault(whose, {})
            left[self._epoch] = left.get(self._epoch, 0) + 1
        return self._epoch

    def ended(self, owner: str, epoch: int) -> None:
        """A chunk waits no more."""
        for whose in (None, owner):
            left = self._left[whose]
            left[epoch] -= 1
            if not left[epoch]:
                del left[epoch]
                if not left:
                    del self._left[whose]
                if self._waiting:
                    self._look(whose)

    def _look(self, whose: str | None) -> None:
        """End the flushes of this owner's chunks, or of all, that wait for nothing any more."""
        for owners, flushes in list(self._waiting.items()):
            if (owners is None) if whose is None else (owners is not None and whose in owners):
                while flushes and not self._is_left(next(iter(flushes))):
                    flushes.popitem(last=False)[0].done.set()
                if not flushes:
                    del self._waiting[owners]

    def _is_left(self, flush: Flush) -> bool:
        firsts = (next(iter(left)) for left in self._counts(flush))
        return any(first <= flush.epoch for first in firsts)

    def _counts(self, flush: Flush) -> list[dict[int, int]]:
        owners: Collection[str | None] = (None,) if flush.owners is None else flush.owners
        return [self._left[owner] for owner in owners if owner in self._left]

    def begin(self, owners: Collection[str] | None) -> Flush:
        """Wait, from now on, until `done`; whoever waits no longer must `leave`."""
        flush = Flush(self._epoch, frozenset(owners) if owners is not None else None)
        self._epoch += 1
        if self._is_left(flush):
            self._waiting.setdefault(flush.owners, OrderedDict())[flush] = None
        else:
            flush.done.set()
        return flush

    def left(self, flush: Flush) -> int:
        """How many chunks it waits for still."""
        return sum(count for counts in self._counts(flush) for epoch, count in counts.items() if epoch <= flush.epoch)

    def leave(self, flush: Flush) -> None:
        """Wait no longer."""
        flushes = self._waiting.get(flush.owners)
        if not flush.done.is_set() and flushes is not None:
            del flushes[flush]
            if not flushes:
                del self._waiting[flush.owners]

    @property
    def chunks(self) -> int:
        """How many chunks wait."""
        return sum(self._left.get(None, {}).values())

    def end_all(self) -> None:
        """Nothing is stored any more: nobody waits."""
        for flushes in self._waiting.values():
            for flush in flushes:
                flush.done.set()
        self._waiting.clear()
