"""What will be asked for again, and soon, stays: a policy for chunks that form a tree.

A chunk serves nobody without those before it in its prompt, so what leaves is always a leaf. Which one is decided by
what keeping it is expected to be worth (`reuse`), and that is learned from the paths of requests through the tree.

A *branch* is the path of one request, less the head that later requests took over. All its chunks were used last at
the same time, by the same request; they differ in what was before. So a request costs a few steps for each branch that
it crosses, hardly any for a chunk, and what is remembered of a chunk is eight bytes of its digest. That is remembered
for longer than the chunk stays: one that comes back is known, and that it came back is a lesson.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from random import Random
from typing import Generic, TypeVar

from async_cache.retention.branches import (
    DIGEST_BYTES,
    HELD,
    SHOWN,
    SUSPENDED,
    Branch,
    Member,
    Run,
    common,
    extend,
    judge,
)
from async_cache.retention.reuse import BIN_ENDS, NO_GAP, ReuseModel, cut_of, gap_of
from async_cache.values import Removal

REMEMBERED = 4  # times the chunks that are there: so many that left are remembered,
MIN_REMEMBERED = 100_000  # or so many

_LESSON_EVERY = 2  # branches that come through a bin unused: one of so many is a lesson, of that weight
_LESSON_POWER = 0.3  # of the number of chunks is the weight of a lesson: they are not independent
_AGED_AT_ONCE = 8  # branches in each bin: what is older than its bin for a while is only judged too well
_LONGEST_PATH = 8192  # chunks: what lies behind is known, but not as a part of the path
_STALE = 1024  # entries of the heap beyond those in use

T = TypeVar("T", bound=Member)


class PrefixPolicy(Generic[T]):
    """An eviction policy that learns which paths are asked for again. `clock` tells the time in seconds."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._model = ReuseModel()
        self._random = Random(0)
        self._heads: dict[bytes, Branch] = {}  # by its first digest
        self._hanging: dict[bytes, int] = {}  # the number of branches with members that have this digest before them
        self._held: dict[bytes, Branch] = {}  # by the digest of the deepest member, on which others hang
        self._heap: list[tuple[float, int, Branch]] = []
        self._entries = 0
        self._by_bin: list[deque[Branch]] = [deque() for _ in BIN_ENDS]
        self._by_age: deque[Branch] = deque()
        self._members = 0
        self._remembered = 0
        self._last: Branch | None = None

    def __len__(self) -> int:
        """The number of chunks that it knows: those that are there, and those that it remembers."""
        return self._members + self._remembered

    @property
    def lessons(self) -> int:
        """How often it has learned something."""
        return self._model.lessons

    # What it is told.

    def asked(self, path: Sequence[bytes], tokens: int, chunk_tokens: int, output_tokens: int | None = None) -> None:
        """A request asked for all chunks on a path from the root, of so many tokens, and put out so many."""
        if not path or len(set(path)) < len(path):  # an engine's own digests need not be chained
            return
        path = path[:_LONGEST_PATH]
        now = self._clock()
        self._age(now)
        digests = b"".join([chunk_hash[:DIGEST_BYTES] for chunk_hash in path])
        branch = Branch(digests, 0, b"", [], now, tokens, output_tokens, 0)
        place = 0
        while place < len(path):
            owner = self._heads.get(digests[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES])
            if owner is None:
                extend(branch.runs, place, place + 1, 1, NO_GAP)
                place += 1
            else:
                place = self._take_over(owner, branch, place)
                branch.new_tokens = max(tokens - place * chunk_tokens, 0)
        if tokens < len(path) * chunk_tokens:
            last = branch.runs[-1]
            branch.runs[-1:] = [Run(last.begin, last.end - 1, last.touches, last.gap)] * (last.end - last.begin > 1)
            branch.runs.append(Run(last.end - 1, last.end, last.touches, last.gap, True))
        judge(branch)
        self._heads[digests[:DIGEST_BYTES]] = branch
        self._remembered += len(path) - branch.members
        self._by_bin[0].append(branch)
        self._by_age.append(branch)
        self._last = branch
        self._push(branch)
        self._forget()

    def _take_over(self, owner: Branch, branch: Branch, begin: int) -> int:
        """The head of a branch that is on the path of another one becomes a part of that; where it ends."""
        digests = owner.digests
        if owner.begin != begin:
            self._root(owner, begin, branch.digests[(begin - 1) * DIGEST_BYTES : begin * DIGEST_BYTES])
        shared = common(digests, branch.digests, begin * DIGEST_BYTES) // DIGEST_BYTES
        end, left = begin + shared, len(owner) - shared
        gap = gap_of(branch.used - owner.used)
        for run in owner.runs:
            if run.begin >= end:
                break
            until = min(run.end, end)
            self._model.learn(run.kind, owner.bin, True, (until - run.begin) ** _LESSON_POWER)
            extend(branch.runs, run.begin, until, run.touches + 1, gap)
        branch.turn = owner.turn + 1 if left <= 1 else 0
        if left and owner.run_at(end - 1).touches == owner.run_at(end).touches:
            owner.cut = cut_of(left)
        self._behead(owner)
        if owner.members:
            self._unhang(owner.parent)
        self._remembered -= shared - self._move(owner, branch, shared)
        owner.digests = digests[shared * DIGEST_BYTES :]
        owner.begin, owner.parent = end, digests[(shared - 1) * DIGEST_BYTES : shared * DIGEST_BYTES]
        if left:
            owner.runs = [run for run in owner.runs if run.end > end]
            owner.runs[0].begin = end
            self._heads[owner.digests[:DIGEST_BYTES]] = owner
            if owner.members:
                self._hang(owner.parent)
            judge(owner)
            if owner.entry != SUSPENDED:
                self._push(owner)
        else:
            owner.dropped, owner.entry = True, HELD
        return end

    def _behead(self, branch: Branch) -> None:
        """Let a branch be found no more by its first chunk, unless another one is."""
        if self._heads.get(branch.digests[:DIGEST_BYTES]) is branch:
            del self._heads[branch.digests[:DIGEST_BYTES]]

    def _move(self, owner: Branch, branch: Branch, shared: int) -> int:
        """The members among the first chunks of one branch become those of another one; their number."""
        item, last, moved = owner.first, branch.deepest, 0
        whole = owner.members and owner.place_of(owner.deepest.chunk_hash) == owner.begin + owner.members - 1
        while item is not None and moved < shared:
            if not whole and owner.place_of(item.chunk_hash) >= owner.begin + shared:
                break
            item.node, last, item = branch, item, item.newer
            moved += 1
        if moved:
            owner.first.older = branch.deepest
            if branch.deepest is None:
                branch.first = owner.first
            else:
                branch.deepest.newer = owner.first
            branch.deepest, last.newer, owner.first = last, None, item
            if item is None:
                owner.deepest = None
            else:
                item.older = None
            owner.members -= moved
            branch.members += moved
        return moved

    def use(self, item: T, before: T | None = None) -> None:
        """An item, known or not, was used just now."""
        if item.node is None:
            self.enter(item, None)
        elif item.node.entry == SUSPENDED:
            self._push(item.node)

    def enter(self, item: T, parent: T | None, kept: bool = False) -> None:
        """An item came, which is right behind another one, if that is there."""
        branch, place = self._branch_for(item.chunk_hash, parent)
        older = branch.deepest
        while older is not None and older is not parent and branch.place_of(older.chunk_hash) > place:
            older = older.older
        newer = branch.first if older is None else older.newer
        item.node, item.older, item.newer = branch, older, newer
        if older is None:
            branch.first = item
        else:
            older.newer = item
        branch.members += 1
        self._members += 1
        self._remembered -= 1
        if branch.members == 1:
            self._hang(branch.parent)
        if newer is not None:
            newer.older = item
            return
        branch.deepest = item
        if branch.entry <= HELD or older is None or branch.run_at(place).begin == place:
            self._push(branch)

    def _branch_for(self, chunk_hash: bytes, parent: T | None) -> tuple[Branch, int]:
        """The branch that a chunk is in, if need be a new one, and its place there."""
        digest = chunk_hash[:DIGEST_BYTES]
        front: Branch | None = parent.node if parent is not None else None
        begin = front.place_of(parent.chunk_hash) + 1 if front is not None and parent is not None else 0
        if front is not None:
            at = (begin - front.begin) * DIGEST_BYTES
            if front.digests[at : at + DIGEST_BYTES] == digest:
                return front, begin
        known = self._heads.get(digest)
        if known is not None and parent is not None and not known.parent:
            self._root(known, begin, parent.chunk_hash[:DIGEST_BYTES])
        for branch in (front, known, self._last):
            if branch is not None and (place := branch.place_of(chunk_hash)) >= 0:
                return branch, place
        self._remembered += 1
        if front is not None and begin == front.begin + len(front):
            front.digests += digest
            extend(front.runs, begin, begin + 1, 1, NO_GAP)
            judge(front)
            return front, begin
        before = parent.chunk_hash[:DIGEST_BYTES] if parent is not None else b""
        branch = Branch(digest, begin, before, [Run(begin, begin + 1, 1, NO_GAP)], self._clock(), 0, None, 0)
        judge(branch)
        self._heads[digest] = branch
        self._by_bin[0].append(branch)
        self._by_age.append(branch)
        return branch, begin

    def _root(self, branch: Branch, begin: int, parent: bytes) -> None:
        """Note where a branch begins that came with nothing before it."""
        if branch.members:
            self._unhang(branch.parent)
            self._hang(parent)
        for run in branch.runs:
            run.begin += begin - branch.begin
            run.end += begin - branch.begin
        branch.begin, branch.parent = begin, parent

    def suspend(self, item: T) -> None:
        """An item must stay for now, and need not be among the victims until the next use of one of its branch."""
        if item.node is not None and item.node.deepest is item:
            item.node.entry = SUSPENDED

    def left(self, item: T, removal: Removal) -> None:
        """An item, known or not, has gone."""
        branch, older, newer = item.node, item.older, item.newer
        if branch is None:
            return
        place = branch.place_of(item.chunk_hash)
        if older is not None:
            older.newer = newer
        else:
            branch.first = newer
        if newer is not None:
            newer.older = older
        else:
            branch.deepest = older
        item.node = item.older = item.newer = None
        branch.members -= 1
        self._members -= 1
        self._remembered += 1
        if not branch.members:
            branch.entry = HELD
            self._unhang(branch.parent)
        elif newer is None and (
            branch.entry in (HELD, SUSPENDED) or (branch.entry > HELD and branch.run_at(place).begin == place)
        ):
            self._push(branch)

    # What it is asked.

    def admits(self, chunk_hash: bytes) -> bool:
        """Whether a chunk on the path that was asked for last is worth as much as what would leave for it."""
        branch = self._last
        if branch is None or (place := branch.place_of(chunk_hash)) < 0:
            return True
        first = self._first()
        return first is None or self._model.worth(branch.run_at(place).kind, branch.bin) >= self._heap[0][0]

    def victims(self) -> Iterator[T]:
        """Iterate over all items in the order in which they should go. Those that came may leave."""
        shown: list[Branch] = []
        leaves: list[tuple[float, int, Branch, T]] = []  # a heap of what would be leaves if those that came had left
        stuck: dict[bytes, tuple[Branch, T]] = {}  # by its digest, what would be none
        stayed: dict[bytes, int] = {}  # how many of the branches that hang on a digest have come
        later: list[tuple[Branch, T]] = []  # what lies before an item that is suspended
        seen: set[int] = set()
        numbers = count()

        def offer(branch: Branch, item: T) -> None:
            digest = item.chunk_hash[:DIGEST_BYTES]
            if self._hanging.get(digest, 0) > stayed.get(digest, 0):
                stuck[digest] = branch, item
            else:
                heappush(leaves, (self._worth(branch, item), next(numbers), branch, item))

        def is_left(branch: Branch) -> bool:
            return branch.members > 0 and branch.entry in (HELD, SUSPENDED) and id(branch) not in seen

        def show(branch: Branch) -> None:
            seen.add(id(branch))
            branch.entry = SHOWN
            shown.append(branch)
            offer(branch, branch.deepest)

        first = self._first()
        if first is not None:
            yield first
            if first.node is None:
                first = None  # it has left
        try:
            while True:
                if not self._clean() and not leaves:  # digests that are not chained may hang on one another
                    if later:
                        offer(*later.pop())
                    elif (left := next(filter(is_left, self._by_age), None)) is not None:
                        show(left)
                    elif stuck:
                        heappush(leaves, (0.0, next(numbers), *stuck.popitem()[1]))
                    else:
                        return
                    continue
                if self._heap and (not leaves or self._heap[0][0] < leaves[0][0]):
                    show(heappop(self._heap)[2])
                    continue
                _, _, branch, item = heappop(leaves)
                older, parent = item.older, branch.parent
                if item is not first:
                    yield item
                if branch.entry == SUSPENDED:
                    if older is not None:
                        later.append((branch, older))
                    continue
                if older is not None:
                    offer(branch, older)
                    continue
                stayed[parent] = stayed.get(parent, 0) + (branch.members > 0)
                if self._hanging.get(parent, 0) <= stayed[parent]:
                    if parent in stuck:
                        offer(*stuck.pop(parent))
                    elif (behind := self._held_by(parent)) is not None:
                        show(behind)
        finally:
            for branch in shown:
                if branch.entry == SHOWN:
                    self._push(branch)

    def _worth(self, branch: Branch, item: T) -> float:
        return self._model.worth(branch.run_at(branch.place_of(item.chunk_hash)).kind, branch.bin)

    # The heap of leaves.

    def _push(self, branch: Branch) -> None:
        """Give a branch an entry that says what its deepest member is worth now, unless others hang on that."""
        branch.entry = HELD
        if branch.deepest is None:
            return
        digest = branch.deepest.chunk_hash[:DIGEST_BYTES]
        if digest in self._hanging:
            self._held[digest] = branch
            return
        self._entries += 1
        branch.entry = self._entries
        heappush(self._heap, (self._worth(branch, branch.deepest), branch.entry, branch))
        if len(self._heap) > 2 * len(self._heads) + _STALE:
            self._heap = [entry for entry in self._heap if entry[1] == entry[2].entry]
            heapify(self._heap)

    def _clean(self) -> bool:
        """Let the heap begin with an entry that holds, and say whether there is one."""
        while self._heap and self._heap[0][1] != self._heap[0][2].entry:
            heappop(self._heap)
        return bool(self._heap)

    def _first(self) -> T | None:
        """The leaf that should leave first, whose entry the heap begins with then; None if there is none."""
        while self._clean():
            branch = self._heap[0][2]
            leaf: T = branch.deepest
            if leaf.chunk_hash[:DIGEST_BYTES] not in self._hanging:
                return leaf
            heappop(self._heap)
            self._push(branch)  # others came to hang on it
        return None

    def _hang(self, parent: bytes) -> None:
        if parent:
            self._hanging[parent] = self._hanging.get(parent, 0) + 1

    def _unhang(self, parent: bytes) -> None:
        if parent:
            left = self._hanging.pop(parent, 0) - 1  # none: the digests are not chained
            if left > 0:
                self._hanging[parent] = left
            elif (branch := self._held_by(parent)) is not None:
                self._push(branch)

    def _held_by(self, digest: bytes) -> Branch | None:
        """The branch that is held since others hang on its deepest member, which this is."""
        branch = self._held.pop(digest, None)
        if branch is not None and branch.entry == HELD and branch.deepest is not None:
            return branch if branch.deepest.chunk_hash[:DIGEST_BYTES] == digest else None
        return None

    # Time.

    def _age(self, now: float) -> None:
        """Let branches come into the next bin, unused."""
        for bin, branches in enumerate(self._by_bin[:-1]):
            latest = now - BIN_ENDS[bin]
            for _ in range(_AGED_AT_ONCE):
                if not branches or branches[0].used > latest:
                    break
                branch = branches.popleft()
                if branch.dropped:
                    continue
                if self._random.random() * _LESSON_EVERY < 1:
                    for run in branch.runs:
                        weight = _LESSON_EVERY * (run.end - run.begin) ** _LESSON_POWER
                        self._model.learn(run.kind, bin, False, weight)
                branch.bin = bin + 1
                self._by_bin[bin + 1].append(branch)
                if branch.entry > HELD:
                    self._push(branch)

    def _forget(self) -> None:
        """Remember no more than there is room for: the oldest go."""
        most = max(MIN_REMEMBERED, REMEMBERED * self._members)
        for _ in range(_AGED_AT_ONCE):
            if self._remembered <= most or not self._by_age:
                break
            branch = self._by_age.popleft()
            if branch.dropped:
                continue
            self._remembered -= len(branch)
            if branch.members:  # what is there cannot be forgotten
                self._remembered += branch.members
                kept = max(branch.place_of(branch.deepest.chunk_hash) + 1 - branch.begin, 1)
                self._remembered += kept - branch.members
                branch.digests = branch.digests[: kept * DIGEST_BYTES]
                branch.runs = [run for run in branch.runs if run.begin < branch.begin + kept]
                branch.runs[-1].end = branch.begin + kept
                self._by_age.append(branch)
            else:
                self._behead(branch)
                branch.dropped = True

    def check_integrity(self) -> None:
        """Assert that branches share no chunk, know their members, and have an entry or a reason to have none."""
        branches = list(self._heads.values())
        hanging: dict[bytes, int] = {}
        for branch in branches:
            members = []
            item = branch.first
            while item is not None:
                assert item.node is branch and (item.newer is None or item.newer.older is item)
                members.append(branch.place_of(item.chunk_hash))
                item = item.newer
            assert members == sorted(set(members)) and -1 not in members and len(members) == branch.members
            assert (branch.deepest is None) == (not members) and (not members or branch.deepest.newer is None)
            assert [run.begin for run in branch.runs[1:]] == [run.end for run in branch.runs[:-1]]
            assert branch.runs[0].begin == branch.begin and branch.runs[-1].end == branch.begin + len(branch)
            assert not branch.dropped and branch is self._heads[branch.digests[:DIGEST_BYTES]]
            if members and branch.parent:
                hanging[branch.parent] = hanging.get(branch.parent, 0) + 1
            if members and branch.entry == HELD:
                digest = branch.deepest.chunk_hash[:DIGEST_BYTES]
                assert digest in self._hanging and self._held[digest] is branch
        entries = {number: branch for _, number, branch in self._heap}
        assert all(branch.entry <= HELD or entries[branch.entry] is branch for branch in branches)
        assert hanging == self._hanging
        digests = b"".join(branch.digests for branch in branches)
        each = [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]
        assert len(set(each)) == len(each)
        assert self._members == sum(branch.members for branch in branches)
        assert self._remembered == len(each) - self._members
