"""What will be asked for again, and soon, stays: a policy for chunks that form a tree.

A chunk serves nobody without those before it in its prompt, so what leaves is always a leaf. Which one is decided by
what keeping it is expected to be worth (`reuse`), and that is learned from the paths of requests through the tree.

A *branch* is the path of one request, less the head that later requests took over. All its chunks were used last at
the same time, by the same request; they differ in what was before. So a request costs a few steps for each branch that
it crosses, hardly any for a chunk, and what is remembered of a chunk is four bytes of its digest. That is remembered
for longer than the chunk stays: one that comes back is known, and that it came back is a lesson.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from random import Random
from typing import Generic, TypeVar

from async_cache.retention.ages import Ages, Order, bin_at
from async_cache.retention.branches import DIGEST_BYTES, HELD, SUSPENDED, WAITING, Branch, Member, Run, common
from async_cache.retention.duel import Duel
from async_cache.retention.recall import branches_of, pack, pieces_of, unpack
from async_cache.retention.reuse import NO_GAP, ReuseModel, cut_of, gap_of, octave_of, output_of
from async_cache.retention.worths import Leaves
from async_cache.values import Removal

REMEMBERED = 4  # times the chunks that are there: so many that left are remembered,
MIN_REMEMBERED = 100_000  # or so many

_LESSONS = 1_000_000  # for so many, every branch is one; then fewer and fewer,
_LEAST_LESSONS = 0.125  # down to this part of them
_FORGOTTEN_AT_ONCE = 8  # branches
_LONGEST_PATH = 8192  # chunks: what lies behind is known, but not as a part of the path
_RECALLED_CHUNKS = 131_072  # after a restart: those of the branches used last. The order of use has as many
_RECALLED_SECONDS = 600.0  # for which what comes back after a restart finds its branch
_IDLE_SECONDS = 30.0  # between two requests: longer pauses are counted as one of these, as they cost no memory

T = TypeVar("T", bound=Member)


class PrefixPolicy(Generic[T]):
    """An eviction policy that learns which paths are asked for again.

    `clock` tells the time in seconds. By `seed` it is decided which branches are lessons.
    """

    def __init__(self, clock: Callable[[], float], seed: int = 0):
        self._clock, self._latest = clock, clock()
        self._now = 0.0  # seconds, without the rest of long pauses
        self._model = ReuseModel()
        self._random = Random(seed)
        self._heads: dict[bytes, Branch | bytes] = {}  # by its first digest; packed, where nobody waits for it
        self._ages = Ages()
        self._in_order = Order(self._is_over)
        self._settled: set[Branch] = set()  # those with nothing that can be forgotten, which are not in order any more
        self._leaves: Leaves[T] = Leaves(self._model, self._branches)
        self._members = 0
        self._remembered = 0
        self._last: Branch | None = None
        self._duel = Duel()
        self._is_full = False  # something had to leave, or was not admitted
        self._recalled: dict[bytes, Branch] = {}  # by digest, after a restart: the branch of what may come back

    def __len__(self) -> int:
        """The number of chunks that it knows: those that are there, and those that it remembers."""
        return self._members + self._remembered

    @property
    def lessons(self) -> int:
        """How often it has learned something."""
        return self._model.lessons

    # What it is told of requests.

    def asked(self, path: Sequence[bytes], tokens: int, chunk_tokens: int, output_tokens: int | None = None) -> None:
        """A request asked for all chunks on a path from the root, of so many tokens, and put out so many."""
        if not path or len(set(path)) < len(path):  # an engine's own digests need not be chained
            return
        path = path[:_LONGEST_PATH]
        self._pass_time()
        for aged in self._ages.pass_on(self._now):
            self._learn_unused(aged)
        each = [chunk_hash[:DIGEST_BYTES] for chunk_hash in path]
        digests, heads = b"".join(each), self._heads
        branch = Branch(digests, 0, b"", [], self._now, octave_of(tokens), *output_of(output_tokens), 0)
        place = found = lru_found = 0
        while place < len(path):
            begin = place
            while place < len(path) and each[place] not in heads:
                place += 1
            if place > begin:
                branch.extend(place - begin, 1, NO_GAP)
                continue
            known = heads[each[place]]
            owner = self._opened(known) if isinstance(known, bytes) else known
            place = self._take_over(owner, branch, begin)
            if owner is not known:
                self._pack(owner)
            found = branch.members if found == begin else found
            had = self._duel.has(owner.used, place - begin)
            lru_found = place if had and lru_found == begin else lru_found
            branch.new = octave_of(max(tokens - place * chunk_tokens, 0))
        if tokens < len(path) * chunk_tokens:
            branch.part_tail()
        branch.judge(self._model)
        before, self._last = self._last, branch
        if before is not None:
            self._pack(before)
        self._heads[digests[:DIGEST_BYTES]] = branch
        self._remembered += len(path) - branch.members
        self._begin(branch)
        self._fight(len(path), found, lru_found)
        self._leaves.push(branch)
        self._forget()

    def _fight(self, asked: int, found: int, lru_found: int) -> None:
        """Do as `lru` does where that would have found more."""
        self._duel.asked(asked, self._now, self._members, is_full=self._is_full)
        if self._is_full:
            self._duel.score(asked, found, lru_found, self._members)
            self._leaves.as_lru = self._duel.is_behind

    def hint(
        self,
        path: Sequence[bytes],
        output_tokens: int | None = None,
        returns: bool | None = None,
        within_seconds: float | None = None,
    ) -> None:
        """An engine tells how a request went on. What only turns of a session have used goes first once it has ended.

        What others have used as well is judged as before.
        """
        branch = self._branch_at_end(path)
        if branch is None:
            return
        if output_tokens is not None:
            branch.output, branch.output_bins = output_of(output_tokens)
            branch.judge(self._model)
        if returns is not None:
            branch.told = returns, within_seconds
        if branch.rank >= 0:
            self._leaves.push(branch)

    def _branch_at_end(self, path: Sequence[bytes]) -> Branch | None:
        """The branch that the last chunk of a path is in."""
        if not path:
            return None
        if self._last is not None and self._last.place_of(path[-1]) >= 0:
            return self._last
        digests = b"".join([chunk_hash[:DIGEST_BYTES] for chunk_hash in path])
        begin = 0
        while (owner := self._heads.get(digests[begin : begin + DIGEST_BYTES])) is not None:
            owner = unpack(owner) if isinstance(owner, bytes) else owner
            begin += common(owner.digests, digests, begin)
            if begin >= len(digests):
                return owner
        return None

    def _take_over(self, owner: Branch, branch: Branch, begin: int) -> int:
        """The head of a branch that is on the path of another one becomes a part of that; where it ends."""
        digests = owner.digests
        if owner.begin != begin:
            self._root(owner, begin, branch.digests[(begin - 1) * DIGEST_BYTES : begin * DIGEST_BYTES])
        shared = common(digests, branch.digests, begin * DIGEST_BYTES) // DIGEST_BYTES
        left = len(owner) - shared
        self._take_runs(owner, branch, shared)
        branch.turn = owner.turn + 1 if left <= 1 else 0
        if left and owner.run_at(begin + shared)[0].touches == owner.run_at(begin + shared - 1)[0].touches:
            owner.cut = cut_of(left)
        self._behead(owner)
        if owner.members:
            self._leaves.unhang(owner.parent)
        self._remembered -= shared - self._move(owner, branch, shared)
        if self._recalled:
            self._recall(branch, digests[: shared * DIGEST_BYTES])
        owner.digests = digests[shared * DIGEST_BYTES :]
        owner.begin, owner.parent = begin + shared, digests[(shared - 1) * DIGEST_BYTES : shared * DIGEST_BYTES]
        if left:
            owner.cut_runs(left, head=False)
            self._heads[owner.digests[:DIGEST_BYTES]] = owner
            if owner.members:
                self._leaves.hang(owner.parent)
            if owner.members or owner.lesson:
                owner.judge(self._model)
            if owner.rank != SUSPENDED:
                self._leaves.push(owner)
        else:
            self._leaves.take(owner)
            owner.runs = owner.runs[:1] if owner.members else []
            if not owner.members:
                self._settled.discard(owner)
        return owner.begin

    def _take_runs(self, owner: Branch, branch: Branch, shared: int) -> None:
        """What is known of the first chunks of a branch, and that they were used, is known of those of another one."""
        age = branch.used - owner.used
        gap = gap_of(age)
        chunks = []
        for run in owner.runs:
            taken = min(run.chunks, shared)
            if taken <= 0:
                break
            if run.kind is not None:
                chunks.append((run.kind, taken))
            branch.extend(taken, run.touches + 1, gap)
            shared -= taken
        if owner.lesson and chunks:
            self._model.learn(chunks, owner.bin if owner.ages else bin_at(age), used=True)

    def _recall(self, branch: Branch, digests: bytes) -> None:
        """What comes back of these chunks after a restart is in another branch than it was."""
        for digest in _each(digests):
            if digest in self._recalled:
                self._recalled[digest] = branch

    def _pack(self, branch: Branch) -> None:
        """Keep of a branch what it takes to know it again, unless it has members, or is a lesson."""
        head = branch.digests[:DIGEST_BYTES]
        is_idle = not (branch.members or branch.lesson or self._recalled)
        if is_idle and self._heads.get(head) is branch:
            packed = self._heads[head] = pack(branch)
            self._in_order.enter(packed)
            branch.digests, branch.runs = b"", []

    def _opened(self, packed: bytes) -> Branch:
        """The branch that was packed, in its place and not judged yet."""
        branch = self._heads[packed[:DIGEST_BYTES]] = unpack(packed)
        return branch

    def _unpack(self, packed: bytes) -> Branch:
        """The branch that was packed, to which something comes back."""
        branch = self._opened(packed)
        branch.judge(self._model)
        self._in_order.enter(branch)
        return branch

    def _is_over(self, branch: Branch | bytes) -> bool:
        """Whether nothing is left of a branch, or of what was packed."""
        if isinstance(branch, bytes):
            return self._heads.get(branch[:DIGEST_BYTES]) is not branch
        return branch.is_over

    def _branches(self) -> Iterator[Branch]:
        """All branches that are not packed, and some that are over."""
        return (branch for branch in chain(self._in_order, self._settled) if isinstance(branch, Branch))

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

    # What it is told of items.

    def use(self, item: T, before: T | None = None) -> None:
        """An item, known or not, was used just now."""
        if item.node is None:
            self.enter(item, None)
        elif item.node.rank == SUSPENDED:
            self._leaves.push(item.node)

    def use_all(self, items: Iterable[T]) -> None:
        """Each of these was used just now."""
        branch: Branch | None = None
        for item in items:
            if item.node is None or item.node is not branch:
                self.use(item)
                branch = item.node

    def enter(self, item: T, parent: T | None, kept: bool = False) -> None:
        """An item came, which is right behind another one, if that is there."""
        branch, place = self._branch_for(item.chunk_hash, parent)
        older = branch.deepest
        if older is not parent and older is not None and branch.place_of(branch.first.chunk_hash) > place:
            older = None  # as after a restart, where the end comes back first
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
            self._leaves.hang(branch.parent)
            if not branch.ages:
                self._ages.enter(branch, self._now)
        if newer is not None:
            newer.older = item
            return
        branch.deepest = item
        if branch.rank != WAITING and (branch.rank < 0 or older is None or branch.run_at(place)[1]):
            self._leaves.push(branch)

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
        if isinstance(known, bytes):
            known = self._unpack(known)
        if known is not None and parent is not None and not known.parent:
            self._root(known, begin, parent.chunk_hash[:DIGEST_BYTES])
        for branch in (front, known, self._recalled.pop(digest, None), self._last):
            if branch is not None and (place := branch.place_of(chunk_hash)) >= 0:
                return branch, place
        self._remembered += 1
        if front is not None and begin == front.begin + len(front):
            front.digests += digest
            front.extend(1, 1, NO_GAP)
            front.judge(self._model)
            return front, begin
        before = parent.chunk_hash[:DIGEST_BYTES] if parent is not None else b""
        branch = Branch(digest, begin, before, [Run(1, 1, NO_GAP)], self._now, octave_of(0), *output_of(None), 0)
        branch.judge(self._model)
        self._heads[digest] = branch
        self._begin(branch)
        return branch, begin

    def _begin(self, branch: Branch) -> None:
        """A branch was used just now. One of some is a lesson as long as it lasts: fewer, the more was learned."""
        lessons = self._model.lessons
        branch.lesson = self._random.random() * lessons < max(_LESSONS, _LEAST_LESSONS * lessons)
        self._in_order.enter(branch)
        if branch.lesson or branch.members:
            self._ages.enter(branch, self._now)

    def _root(self, branch: Branch, begin: int, parent: bytes) -> None:
        """Note where a branch begins that came with nothing before it."""
        if branch.members:
            self._leaves.unhang(branch.parent)
            self._leaves.hang(parent)
        branch.begin, branch.parent = begin, parent

    def suspend(self, item: T) -> None:
        """An item must stay for now, and need not be among the victims until the next use of one of its branch."""
        if item.node is not None and item.node.deepest is item:
            self._leaves.take(item.node, SUSPENDED)

    def resume(self, item: T) -> None:
        """An item may leave again; so may what lies before it."""
        if item.node is not None and item.node.rank == SUSPENDED:
            self._leaves.push(item.node)

    def left(self, item: T, removal: Removal) -> None:
        """An item, known or not, has gone."""
        branch, older, newer = item.node, item.older, item.newer
        if branch is None:
            return
        begins_run = branch.run_at(branch.place_of(item.chunk_hash))[1]
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
        self._is_full |= removal is Removal.CAPACITY
        self._remembered += 1
        if not branch.members:
            self._leaves.take(branch)
            self._leaves.unhang(branch.parent)
            if branch in self._settled:
                self._drop(branch)
            elif branch is not self._last:
                self._pack(branch)
        elif newer is None and (branch.rank in (HELD, SUSPENDED) or (branch.rank >= 0 and begins_run)):
            self._leaves.push(branch)

    # What it is asked.

    def admits(self, chunk_hash: bytes) -> bool:
        """Whether a chunk on the path that was asked for last is worth as much as what would leave for it."""
        self._is_full = True
        branch = self._last
        if self._duel.is_behind or branch is None or (place := branch.place_of(chunk_hash)) < 0:
            return True
        first, kind = self._leaves.first(), branch.run_at(place)[0].kind
        return first is None or kind is None or self._model.rank(kind, branch.bin) >= first.rank

    def victims(self) -> Iterator[T]:
        """Iterate over all items in the order in which they should go. Those that came may leave."""
        return self._leaves.victims()

    # What outlives a restart.

    def learned(self) -> Iterator[bytes]:
        """What it has learned, and what it knows of the branches that were used last."""
        yield self._model.learned()
        branches, chunks = [], 0
        for known in reversed(self._in_order):
            if self._is_over(known):
                continue
            branch = unpack(known) if isinstance(known, bytes) else known
            chunks += len(branch)
            if chunks > _RECALLED_CHUNKS:
                break
            if branch.digests:
                branches.append(branch)
        yield from pieces_of(branches, self._now)

    def recall(self, pieces: Iterable[bytes]) -> Iterator[None]:
        """Go on from what one like this has learned, before anything else is known. Each piece is a step."""
        learned = iter(pieces)
        self._model.recall(next(learned, b""))
        yield
        for piece in learned:
            for branch in branches_of(piece, self._now):
                head = branch.digests[:DIGEST_BYTES]
                if head in self._heads:
                    continue
                branch.judge(self._model)
                self._heads[head] = branch
                self._in_order.enter_first(branch)
                self._remembered += len(branch)
                self._recalled |= dict.fromkeys(_each(branch.digests), branch)
            yield

    # Time.

    def _pass_time(self) -> None:
        """The time that passes is that in which somebody may have wanted the memory: nights cost nothing."""
        latest = self._clock()
        self._now += min(latest - self._latest, _IDLE_SECONDS)
        self._latest = latest
        if self._recalled and self._now > _RECALLED_SECONDS:
            self._recalled = {}

    def _learn_unused(self, branch: Branch) -> None:
        """A branch has come into its bin, unused in the one before."""
        if branch.lesson:
            chunks = [(run.kind, run.chunks) for run in branch.runs if run.kind is not None]
            self._model.learn(chunks, branch.bin - 1, used=False)
        if branch.rank >= 0:
            self._leaves.push(branch)

    def _forget(self) -> None:
        """Remember no more than there is room for: the oldest go."""
        most = max(MIN_REMEMBERED, REMEMBERED * self._members)
        for _ in range(_FORGOTTEN_AT_ONCE):
            if self._remembered <= most or (branch := self._in_order.take_oldest()) is None:
                return
            if isinstance(branch, bytes):
                branch = self._opened(branch)
            if not branch.members:
                self._drop(branch)
                continue
            kept = max(branch.place_of(branch.deepest.chunk_hash) + 1 - branch.begin, 1)  # that cannot be forgotten
            if kept < len(branch):
                self._remembered -= len(branch) - kept
                branch.digests = branch.digests[: kept * DIGEST_BYTES]
                branch.cut_runs(kept, head=True)
                branch.tail = False
            self._settled.add(branch)

    def _drop(self, branch: Branch) -> None:
        """Forget a branch that has no members."""
        self._behead(branch)
        self._settled.discard(branch)
        self._remembered -= len(branch)
        branch.digests, branch.runs = b"", []

    def check_integrity(self) -> None:
        """Assert that branches share no chunk, and know their members and where these are."""
        packed = [unpack(of) for of in self._heads.values() if isinstance(of, bytes)]
        branches = [branch for branch in self._heads.values() if isinstance(branch, Branch)]
        for branch in branches:
            members = []
            item = branch.first
            while item is not None:
                assert item.node is branch and (item.newer is None or item.newer.older is item)
                members.append(branch.place_of(item.chunk_hash))
                item = item.newer
            assert members == sorted(set(members)) and -1 not in members and len(members) == branch.members
            assert (branch.deepest is None) == (not members) and (not members or branch.deepest.newer is None)
            assert sum(run.chunks for run in branch.runs) == len(branch) > 0
            assert all(run.chunks > 0 and run.kind is not None for run in branch.runs)
            assert branch is self._heads[branch.digests[:DIGEST_BYTES]]
        known = [branch for branch in chain(self._in_order, self._settled) if not self._is_over(branch)]
        assert sorted(map(id, known)) == sorted(map(id, self._heads.values()))
        self._leaves.check_integrity(branches)
        digests = b"".join(branch.digests for branch in (*branches, *packed))
        each = _each(digests)
        assert len(set(each)) == len(each)
        assert self._members == sum(branch.members for branch in branches)
        assert self._remembered == len(each) - self._members


def _each(digests: bytes) -> list[bytes]:
    return [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]
