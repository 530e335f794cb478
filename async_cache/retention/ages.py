"""Branches by how long ago they were used: in bins of time, each longer than the one before."""

from collections import deque
from collections.abc import Iterator
from itertools import chain

from async_cache.retention.branches import Branch
from async_cache.retention.reuse import BIN_ENDS, BINS

_AGED_AT_ONCE = 8  # branches in each bin: what is older than its bin for a while is only judged too well


class Ages:
    """All branches, in each bin the one first that was used first; those that are over, until it is their turn."""

    def __init__(self) -> None:
        self._by_bin: list[deque[Branch]] = [deque() for _ in range(BINS)]
        self._settled: list[deque[Branch]] = [deque() for _ in range(BINS)]  # nothing of these can be forgotten
        self._all = [self._by_bin]

    def __iter__(self) -> Iterator[Branch]:
        return (branch for branches in chain(self._by_bin, self._settled) for branch in branches if not branch.is_over)

    def enter(self, branch: Branch) -> None:
        """A branch was used just now."""
        self._by_bin[branch.bin].append(branch)

    def enter_first(self, branch: Branch) -> None:
        """A branch enters before all others of its bin: it was used before these."""
        self._by_bin[branch.bin].appendleft(branch)

    def latest_first(self) -> Iterator[Branch]:
        """Iterate over all branches, from the one that was used last to the one that was used first, roughly."""
        return (
            branch
            for branches in chain(*zip(self._by_bin, self._settled, strict=True))
            for branch in reversed(branches)
        )

    def pass_on(self, now: float) -> Iterator[Branch]:
        """Let branches come into the next bin, unused. Iterates over these."""
        for by_bin in self._all:
            for bin, latest in enumerate(BIN_ENDS):
                branches = by_bin[bin]
                if not branches or branches[0].used > now - latest:
                    continue
                for _ in range(_AGED_AT_ONCE):
                    if not branches or branches[0].used > now - latest:
                        break
                    branch = branches[0]
                    if branch.is_over:
                        branches.popleft()
                    elif bin + 1 == BINS:
                        break
                    else:
                        by_bin[bin + 1].append(branches.popleft())
                        branch.bin = bin + 1
                        yield branch

    def take_oldest(self) -> Branch | None:
        """Take out the branch that was used first, among those that are not settled; None if there is none."""
        for branches in reversed(self._by_bin):
            while branches:
                branch = branches.popleft()
                if not branch.is_over:
                    return branch
        return None

    def settle(self, branch: Branch) -> None:
        """The branch that was just taken out comes back, and ages, but is not taken out any more."""
        branch.settled = True
        self._settled[branch.bin].append(branch)
        self._all = [self._by_bin, self._settled]
