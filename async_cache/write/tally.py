"""What is counted of the write-back of one owner, so that a flush of its own tells of nobody else."""

from collections.abc import Collection, Iterable, Iterator

from msgspec import Struct


class Tally(Struct):
    """Chunks of one owner that wait, that were written, dropped and refused, and what its last flush told of these."""

    pending: int = 0
    written: int = 0
    dropped: int = 0
    refused: int = 0
    told: tuple[int, int, int] = (0, 0, 0)


class Tallies:
    """The tallies of those owners who are told of their own only. Others are counted together, elsewhere."""

    def __init__(self) -> None:
        self._of: dict[str, Tally] = {}
        self.find = self._of.get
        """The tally of an owner, or None."""

    def keep(self, owners: Iterable[str], pending: Iterable[str]) -> None:
        """Count for these owners from now on; `pending`: the owner of each chunk that waits."""
        new = {owner: Tally() for owner in owners if owner not in self._of}
        self._of.update(new)
        for owner in pending if new else ():
            if owner in new:
                new[owner].pending += 1

    def pending(self, owners: Collection[str]) -> int:
        """How many chunks of these owners wait."""
        return sum(tally.pending for tally in self._those_of(owners))

    def dropped(self, owners: Collection[str]) -> int:
        """How many chunks of these owners were dropped."""
        return sum(tally.dropped for tally in self._those_of(owners))

    def take(self, owners: Collection[str]) -> tuple[int, int, int]:
        """How many chunks of these owners were written, dropped and refused since this was asked last."""
        written = dropped = refused = 0
        for tally in self._those_of(owners):
            before, tally.told = tally.told, (tally.written, tally.dropped, tally.refused)
            written += tally.written - before[0]
            dropped += tally.dropped - before[1]
            refused += tally.refused - before[2]
        return written, dropped, refused

    def _those_of(self, owners: Collection[str]) -> Iterator[Tally]:
        return filter(None, map(self.find, owners))
