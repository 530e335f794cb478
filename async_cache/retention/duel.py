"""Would `lru` have found more? So that a policy that learns does not stay behind for long.

What `lru` would have is what was used last, up to so many chunks: so all it takes to know what it would have found is
since when. That is read off counts of chunks by the time of their last use, in some hundreds of slots.
"""

from bisect import bisect_right

_SLOTS = 256  # of what is there, each has one part
_BEHIND = 0.001  # of what was asked for: that much less may be found,
_SLACK = 32  # and so many chunks
_PAST = 256  # times what is there: once so much was asked for, what was before counts half


class Duel:
    """What was found, against what `lru` would have found.

    `is_behind` tells to do as `lru` does, until as much again was asked for as before: so what is lost stays a small
    part of all, and who has learned meanwhile is tried again.
    """

    def __init__(self) -> None:
        self.is_behind = False
        self._begins = [0.0]  # of each slot, in seconds
        self._counts = [0]
        self._there = 0  # chunks that `lru` would have
        self._asked = self._until = 0
        self._lost = 0  # chunks that `lru` would have found, less those that were found

    def has(self, used: float, chunks: int) -> bool:
        """Whether `lru` would have chunks that were used last at a time. They are used again now."""
        slot = bisect_right(self._begins, used) - 1
        if slot < 0:
            return False
        self._counts[slot] -= chunks
        self._there -= chunks
        return True

    def asked(self, chunks: int, now: float, there: int, *, is_full: bool) -> None:
        """A request asked for so many chunks. So many are there, of all requests, and more than these have no room."""
        begins, counts = self._begins, self._counts
        counts[-1] += chunks
        self._there += chunks
        if counts[-1] * _SLOTS > there and now > begins[-1]:
            begins.append(now)
            counts.append(0)
        while is_full and self._there > there and len(counts) > 1:
            self._there -= counts.pop(0)
            begins.pop(0)

    def score(self, asked: int, found: int, lru_found: int, there: int) -> None:
        """Of so many chunks so many were found, and so many would have been."""
        self._asked += asked
        self._lost += lru_found - found
        if self._asked > _PAST * there:
            self._asked, self._lost, self._until = self._asked // 2, self._lost // 2, self._until // 2
        if self.is_behind:
            if self._asked >= self._until:
                self.is_behind, self._lost = False, 0
        elif self._lost > _BEHIND * self._asked + _SLACK:
            self.is_behind, self._until = True, 2 * self._asked
