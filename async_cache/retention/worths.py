"""The leaves of a tree of branches, the least worth first.

What a leaf is worth is rounded to one of a few hundred ranks, sixteen to each doubling, and the leaves of one rank are
in the order in which they came to it. So a step costs the same however many there are. A leaf is ranked when somebody
asks for one, with all that came, or have aged, since.
"""

from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Generic, TypeVar

from async_cache.retention.branches import DIGEST_BYTES, HELD, SHOWN, SUSPENDED, WAITING, Branch, Member, Place, Run
from async_cache.retention.reuse import RANKS, ReuseModel, rank_of
from async_cache.retention.ring import Ring

_MOST_WAITING = 256  # branches
_JUDGED_AT_ONCE = 8  # runs of one

T = TypeVar("T", bound=Member)


class Leaves(Generic[T]):
    """The branches whose deepest member may leave, by what that is worth, and which of the others hang on what.

    `all_branches` gives all that there are, and some that are over.
    """

    def __init__(self, model: ReuseModel, all_branches: Callable[[], Iterable[Branch]]):
        self._model = model
        self.all_branches = all_branches
        self._rings: dict[int, Ring[Branch]] = {}
        self._filled = 0  # by bit, the ranks of which there may be leaves
        self._hanging: dict[bytes, int] = {}  # the number of branches with members that have this digest before them
        self._held: dict[bytes, Branch] = {}  # by the digest of the deepest member, on which others hang
        self._waiting: list[Branch] = []  # to be ranked; those that are among the leaves may be so already
        self._by_use: Ring[Place] = Ring()  # all that have members, and are not suspended
        self.as_lru = False
        """Whether that leaves first that was used first, whatever it is worth."""
        self._judged: tuple[Branch | None, int] = None, 0  # the one that came first, by so many lessons

    def __del__(self) -> None:
        """Part the branches from their places, which know each other: nobody else would."""
        for place in self._by_use:
            place.branch.place = None

    def rank(self, branch: Branch, item: T) -> int:
        """The rank of a member."""
        return self._rank_of(branch, branch.run_at(branch.place_of(item.chunk_hash))[0])

    def _rank_of(self, branch: Branch, run: Run) -> int:
        """The rank of a run. What only turns of a session have used goes first once that has ended."""
        assert run.kind is not None
        rank = self._model.rank(run.kind, branch.bin)
        if branch.told is None or run.touches > branch.turn + 1:  # others than its own turns have used it
            return rank
        returns, within_seconds = branch.told
        if not returns:
            return rank - RANKS
        return max(rank, rank_of(1 / within_seconds)) if within_seconds else rank

    def push(self, branch: Branch) -> None:
        """Have a branch be ranked by what its deepest member is worth, unless others hang on that."""
        if branch.deepest is None:
            self.take(branch)
            return
        if branch.place is None:
            branch.place = Place(branch)
            self._by_use.use(branch.place, self._by_use.oldest() if branch.rank == SUSPENDED else None)
        digest = branch.deepest.chunk_hash[:DIGEST_BYTES]
        if digest in self._hanging:
            self.take(branch)
            self._held[digest] = branch
            return
        if branch.rank != WAITING:
            self._waiting.append(branch)
        if branch.rank < 0:
            branch.rank = WAITING
        if len(self._waiting) >= _MOST_WAITING:
            self._rank_all()

    def _rank_all(self) -> None:
        """Rank all branches that wait for it, together."""
        waiting, self._waiting = self._waiting, []
        waiting = [branch for branch in waiting if branch.rank >= 0 or branch.rank == WAITING]
        runs = [branch.run_at(branch.place_of(branch.deepest.chunk_hash))[0] for branch in waiting]
        self._model.judge([run.kind for run in runs if run.kind is not None])
        for branch, run in zip(waiting, runs, strict=True):
            self._enter(branch, self._rank_of(branch, run))

    def _enter(self, branch: Branch, rank: int) -> None:
        """Have a branch be among the leaves of a rank, and of no other."""
        if rank == branch.rank:
            return
        self.take(branch)
        ring = self._rings.get(rank)
        if ring is None:
            ring = self._rings[rank] = Ring()
        ring.use(branch)
        branch.rank = rank
        self._filled |= 1 << rank

    def take(self, branch: Branch, why: int = HELD) -> None:
        """A branch is not among the leaves for now."""
        if branch.rank >= 0:
            self._rings[branch.rank].discard(branch)
        branch.rank = why
        if branch.place is not None and (why == SUSPENDED or not branch.members):
            self._by_use.discard(branch.place)
            branch.place = None

    def lowest(self) -> Branch | None:
        """The branch of the lowest rank; None if there is none."""
        if self._waiting:
            self._rank_all()
        while self._filled:
            lowest = self._filled & -self._filled
            branch = self._rings[lowest.bit_length() - 1].oldest()
            if branch is not None:
                return branch
            self._filled ^= lowest
        return None

    def first(self) -> Branch | None:
        """The branch whose deepest member should leave first, judged anew; None if there is none."""
        if self._waiting:
            self._rank_all()
        if self.as_lru and (place := self._by_use.oldest()) is not None and place.branch.rank >= 0:
            return place.branch
        while (branch := self.lowest()) is not None:
            leaf, judged = branch.deepest, (branch, self._model.lessons)
            if leaf.chunk_hash[:DIGEST_BYTES] not in self._hanging:
                if judged == self._judged:
                    return branch
                next_runs = branch.runs[-_JUDGED_AT_ONCE:]  # that may leave now
                self._model.judge([run.kind for run in next_runs if run.kind is not None])
                if self.rank(branch, leaf) <= branch.rank:
                    self._judged = judged
                    return branch
            self.push(branch)  # others came to hang on it, or what was learned since speaks for it
        return None

    # What hangs on what.

    def hang(self, parent: bytes) -> None:
        """A branch with members has this digest before it."""
        if parent:
            self._hanging[parent] = self._hanging.get(parent, 0) + 1

    def unhang(self, parent: bytes) -> None:
        """A branch less hangs on that; with the last one, what was held for them is a leaf again."""
        if parent:
            left = self._hanging.pop(parent, 0) - 1  # none: the digests are not chained
            if left > 0:
                self._hanging[parent] = left
            elif (branch := self._held_by(parent)) is not None:
                self.push(branch)

    def _held_by(self, digest: bytes) -> Branch | None:
        """The branch that is held since others hang on its deepest member, which this is."""
        branch = self._held.pop(digest, None)
        if branch is not None and branch.rank == HELD and branch.deepest is not None:
            return branch if branch.deepest.chunk_hash[:DIGEST_BYTES] == digest else None
        return None

    # All that may leave.

    def victims(self) -> Iterator[T]:
        """Iterate over all members in the order in which they should go. Those that came may leave."""
        leaf: T | None = None
        while leaf is None and (first := self.first()) is not None:
            leaf = first.deepest
            assert leaf is not None
            yield leaf
            if leaf.node is None:
                leaf = None  # it has left
        walk: _Walk[T] = _Walk(self)
        try:
            yield from walk.victims(leaf)
        finally:
            for branch in walk.shown:
                if branch.rank == SHOWN:
                    self.push(branch)

    def check_integrity(self, branches: Iterable[Branch]) -> None:
        """Assert that all of these branches are where they belong, and no others are among the leaves."""
        hanging: dict[bytes, int] = {}
        ranked: set[int] = set()
        waiting = set(map(id, self._waiting))
        for branch in branches:
            if branch.members and branch.parent:
                hanging[branch.parent] = hanging.get(branch.parent, 0) + 1
            if branch.rank >= 0:
                assert branch.members and branch.newer is not None and self._filled >> branch.rank & 1
                ranked.add(id(branch))
            elif branch.rank == WAITING:
                assert branch.members and id(branch) in waiting
            elif branch.members and branch.rank == HELD:
                digest = branch.deepest.chunk_hash[:DIGEST_BYTES]
                assert digest in self._hanging and self._held[digest] is branch
        assert hanging == self._hanging
        in_use = {id(place.branch) for place in self._by_use}
        assert in_use == {id(branch) for branch in branches if branch.members and branch.rank != SUSPENDED}
        assert ranked == {id(branch) for ring in self._rings.values() for branch in ring}


class _Walk(Generic[T]):
    """From the leaves up: what would be a leaf if all that came had left."""

    def __init__(self, leaves: Leaves[T]):
        self.shown: list[Branch] = []
        self._seen: set[int] = set()
        self._of = leaves
        self._next: list[tuple[int, int, Branch, T]] = []  # a heap, by rank
        self._stuck: dict[bytes, tuple[Branch, T]] = {}  # by its digest, what would be none
        self._stayed: dict[bytes, int] = {}  # how many of the branches that hang on a digest have come
        self._numbers = count()

    def _offer(self, branch: Branch, item: T) -> None:
        digest = item.chunk_hash[:DIGEST_BYTES]
        if self._of._hanging.get(digest, 0) > self._stayed.get(digest, 0):
            self._stuck[digest] = branch, item
        else:
            rank = self._of.rank(branch, item)
            heappush(self._next, (rank, next(self._numbers), branch, item))

    def _show(self, branch: Branch) -> None:
        self._of.take(branch, SHOWN)
        self.shown.append(branch)
        self._seen.add(id(branch))
        self._offer(branch, branch.deepest)

    def victims(self, came: T | None) -> Iterator[T]:
        """Iterate over all members but one, which came already."""
        later: list[tuple[Branch, T]] = []  # what lies before an item that is suspended
        while True:
            lowest = self._of.lowest()
            if lowest is not None and (not self._next or lowest.rank < self._next[0][0]):
                self._show(lowest)
                continue
            if not self._next:  # digests that are not chained may hang on one another
                if later:
                    self._offer(*later.pop())
                elif (left := self._left()) is not None:
                    self._show(left)
                elif self._stuck:
                    heappush(self._next, (0, next(self._numbers), *self._stuck.popitem()[1]))
                else:
                    return
                continue
            _, _, branch, item = heappop(self._next)
            older, parent = item.older, branch.parent
            if item is not came:
                yield item
            if branch.rank == SUSPENDED:
                if older is not None:
                    later.append((branch, older))
            elif older is not None:
                self._offer(branch, older)
            else:
                self._through(branch, parent)

    def _through(self, branch: Branch, parent: bytes) -> None:
        """All members of a branch have come: so may what it hangs on, if it was the last to do so."""
        self._stayed[parent] = self._stayed.get(parent, 0) + (branch.members > 0)
        if self._of._hanging.get(parent, 0) <= self._stayed[parent]:
            if parent in self._stuck:
                self._offer(*self._stuck.pop(parent))
            elif (behind := self._of._held_by(parent)) is not None:
                self._show(behind)

    def _left(self) -> Branch | None:
        """A branch with members that has not come, and is not among the leaves."""
        waiting = (b for b in self._of.all_branches() if b.members and b.rank in (HELD, SUSPENDED))
        return next((branch for branch in waiting if id(branch) not in self._seen), None)
