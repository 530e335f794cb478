"""Branches by how long ago they were used: in order, and in bins of time, each longer than the one before."""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain

from async_cache.retention.branches import Branch
from async_cache.retention.reuse import BIN_ENDS, BINS

_AGED_AT_ONCE = 8  # branches in each bin: what is older than its bin for a while is only judged too well
_SWEPT_AT_ONCE = 4
_LAST = BINS - 1


class Order:
    """Branches in the order in which they came. Those that are over are swept out, some with each that comes."""

    def __init__(self, is_over: Callable[[Branch | bytes], bool]) -> None:
        self._is_over = is_over
        self._swept: deque[Branch | bytes] = deque()
        self._rest: deque[Branch | bytes] = deque()  # all of them later than these

    def __iter__(self) -> Iterator[Branch | bytes]:
        return chain(self._swept, self._rest)

    def __reversed__(self) -> Iterator[Branch | bytes]:
        return chain(reversed(self._rest), reversed(self._swept))

    def enter(self, branch: Branch | bytes) -> None:
        """A branch came just now."""
        self._rest.append(branch)
        for _ in range(min(_SWEPT_AT_ONCE, len(self._rest))):
            if not self._is_over(swept := self._rest.popleft()):
                self._swept.append(swept)
        if not self._rest:
            self._swept, self._rest = self._rest, self._swept

    def enter_first(self, branch: Branch) -> None:
        """A branch comes before all others."""
        (self._swept or self._rest).appendleft(branch)

    def take_oldest(self) -> Branch | bytes | None:
        """Take out the branch that came first; None if there is none."""
        while branches := self._swept or self._rest:
            if not self._is_over(branch := branches.popleft()):
                return branch
        return None


class Ages:
    """Branches that age, those with members and those that are lessons: in each bin, the one first that was used first.

    What is neither any more drops out when it is its turn.
    """

    def __init__(self) -> None:
        self._by_bin: list[deque[Branch]] = [deque() for _ in range(_LAST)]

    def enter(self, branch: Branch, now: float) -> None:
        """A branch ages from now on, whenever it was used."""
        branch.bin = bin_at(now - branch.used)
        branch.ages = branch.bin < _LAST
        if branch.ages:
            self._by_bin[branch.bin].append(branch)

    def pass_on(self, now: float) -> Iterator[Branch]:
        """Let branches come into the next bin, unused. Iterates over these."""
        for bin, (branches, end) in enumerate(zip(self._by_bin, BIN_ENDS, strict=False)):
            latest = now - end
            if not branches or branches[0].used > latest:
                continue
            for _ in range(_AGED_AT_ONCE):
                branch = branches.popleft()
                if branch.members or (branch.lesson and branch.digests):
                    branch.bin = bin + 1
                    if bin + 1 < _LAST:
                        self._by_bin[bin + 1].append(branch)
                    else:
                        branch.ages = False
                    yield branch
                else:
                    branch.ages = False
                if not branches or branches[0].used > latest:
                    break


def bin_at(age_seconds: float) -> int:
    """The bin of what was used so long ago."""
    return min(bisect_right(BIN_ENDS, age_seconds), _LAST)
