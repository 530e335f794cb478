"""Where the chunks of a prompt are, and why they are not: for those who ask, and not on the way of any request.

Nothing is leased or loaded, and what a backend pins to say what it has is unpinned at once. A prompt is looked at in
slices, between which the loop has its turn, so that its length holds up nobody.
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import reduce
from itertools import compress, groupby, repeat
from operator import or_

from async_cache.aio.slices import InTurns
from async_cache.aio.worker import Worker
from async_cache.errors import CacheClosedError
from async_cache.l1.store import L1Store
from async_cache.l2.guard import Guard
from async_cache.l2.guard.guards import Guards
from async_cache.l2.tombstones import Tombstones
from async_cache.ledger.ledger import Left
from async_cache.ledger.roots import Root, Roots, differences
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.prompt.objects import ChunkObjects
from async_cache.read.load import ChunkLoad
from async_cache.read.loads import Loader
from async_cache.read.lookup import Asked, Sources, alike, ask, fastest_first
from async_cache.read.misses import Misses
from async_cache.values import ChunkState, Elsewhere, Explanation, Removal, Span

_OBJECTS_AT_ONCE = 1024  # in a millisecond or so
_TOGETHER_SECONDS = 1.0  # chunks that left within this are one span
_MOST_ELSEWHERE = 64  # roots that are tried

Told = tuple[ChunkState, str | None, float | None, Removal | None]
"""What is to be said of a chunk: its state, which backend, for how many seconds it has been gone, and why."""
_IN_L1: Told = (ChunkState.L1, None, None, None)
_THERE = (ChunkState.L1, ChunkState.L2, ChunkState.LOADING)


class Explainer:
    """Explains prompts, from what the tiers have and the ledger remembers."""

    def __init__(
        self,
        l1: L1Store,
        guards: Guards,
        loader: Loader,
        tombstones: Tombstones,
        hashing: Worker,
        misses: Misses,
        roots: Roots,
    ):
        self._l1 = l1
        self._guards = guards
        self._loader = loader
        self._tombstones = tombstones
        self._hashing = hashing
        self._misses = misses
        self._roots = roots

    async def explain(self, prompt: Prompt) -> Explanation:
        """Say of every chunk of a prompt where it is, or why it is not there. Raises CacheClosedError."""
        if not prompt.hashed:
            await self._hashing.run(prompt.hash)
        spans = Spans()
        async for part in self._parts(prompt):
            spans.add(part)
        made = spans.end()
        missing = next((span for span in made if span.state not in _THERE), None)
        missed = None
        if missing is not None:
            unknown = missing.state is ChunkState.UNKNOWN
            missed = self._misses.missed(prompt.chunk_hashes, missing.start_chunk, failed=unknown)
        return Explanation(
            chunks=len(prompt),
            tokens=len(prompt) * prompt.layout.chunk_tokens,
            spans=tuple(made),
            elsewhere=tuple([found async for found in self._elsewhere(prompt)]),
            missed=missed,
        )

    async def _parts(self, prompt: Prompt) -> AsyncIterator[list[Told]]:
        chunks = prompt.layout.objects.chunks_with(_OBJECTS_AT_ONCE)
        async for hashes in InTurns(prompt.chunk_hashes, chunks):
            yield await self._part(prompt.layout, hashes)

    async def _part(self, layout: ModelLayout, hashes: Sequence[bytes]) -> list[Told]:
        guards, full, failed = self._guards.current, layout.objects.full_mask, False
        have, loading = self._here(hashes)
        if any(have):
            lacking = {n: full & ~mask for n, mask in enumerate(have) if mask != full}
        else:
            lacking = dict.fromkeys(range(len(hashes)), full)
        for n, load in loading.items():
            lacking[n] = lacking.get(n, 0) & ~load.wanted
        asked = Asked(layout, hashes, {n: mask for n, mask in lacking.items() if mask} if loading else lacking)
        sources = self._at_hand(guards, asked)
        if sources is None:
            with await ask(guards, asked, self._tombstones) as found:
                sources, failed = found.sources(found.masks()), found.failed
            have, loading = self._here(hashes)  # as they are now
        if self._l1.closed:
            raise CacheClosedError("the cache was closed")
        told: list[Told | None] = list(map({full: _IN_L1}.get, have))
        partly = set(loading)
        if not {0, full}.issuperset(have):
            partly |= {n for n, mask in enumerate(have) if mask and mask != full}
        for guard, part in sources:
            in_l2 = ChunkState.L2, guard.name, None, None
            for n, mask in part.items():
                if mask == full:
                    told[n] = told[n] or in_l2
                elif mask:
                    partly.add(n)
        for n in partly:
            told[n] = told[n] or _where(layout.objects, have[n], loading.get(n), n, sources)
        missing = [h for h, where in zip(hashes, told, strict=True) if where is None] if any(told) else hashes
        why_not = _each_missing(self._misses.states(missing, failed=failed))
        return [where or next(why_not) for where in told]

    def _here(self, hashes: Sequence[bytes]) -> tuple[list[int], dict[int, ChunkLoad]]:
        """What L1 has of each chunk, and what is on its way, by number."""
        have = [entry.present if entry is not None else 0 for entry in map(self._l1.find, hashes)]
        table = self._loader.in_flight()
        return have, {n: table[h] for n, h in enumerate(hashes) if h in table} if table else {}

    def _at_hand(self, guards: Sequence[Guard], asked: Asked) -> Sources | None:
        """Where what is asked for is; None if that cannot be said without waiting. Nothing is pinned."""
        sources: list[tuple[Guard, dict[int, int]]] = []
        lacking: Mapping[int, int] = asked.masks
        for guard in fastest_first(guards, asked):
            if sources:
                lacking = {n: mask for n, mask in lacking.items() if n not in sources[-1][1]}
            part: dict[int, int] = {}
            for mask, numbers in alike(lacking):
                hashes = [asked.hashes[n] for n in numbers] if len(numbers) < len(asked.hashes) else asked.hashes
                present = guard.present_nowait(asked.layout, hashes, mask)
                if present is None:
                    return None
                part |= dict.fromkeys(compress(numbers, present), mask)
            if self._tombstones:
                part = {n: mask for n, mask in part.items() if asked.hashes[n] not in self._tombstones}
            sources.append((guard, part))
        return sources

    # The same tokens elsewhere.

    async def _elsewhere(self, prompt: Prompt) -> AsyncIterator[Elsewhere]:
        for root in self._roots.beside(prompt)[:_MOST_ELSEWHERE]:
            if await self._count(prompt, root, most_chunks=1):
                chunks = await self._count(prompt, root)
                layout = root.layout
                yield Elsewhere(layout.model, layout.revision, root.adapter, differences(prompt, root), chunks)

    async def _count(self, prompt: Prompt, root: Root, most_chunks: int | None = None) -> int:
        """How many chunks of the same tokens are there under another root, from the first one on."""
        other = prompt.under(root.layout, root.adapter, most_chunks)
        if other is None or other.root != root.digest:
            return 0
        if not other.hashed:
            await self._hashing.run(other.hash)
        count = 0
        async for part in self._parts(other):
            there = next((n for n, (state, *_) in enumerate(part) if state not in _THERE), len(part))
            count += there
            if there < len(part):
                break
        return count


def _where(objects: ChunkObjects, have: int, load: ChunkLoad | None, n: int, sources: Sources) -> Told | None:
    """Where chunk `n` is of which L1 or backends may have a part, or a load brings one; None: it is not there."""
    loading = load.wanted & ~have if load is not None else 0
    stored = reduce(or_, (part.get(n, 0) for _, part in sources), 0)
    for need in (objects.full_mask, objects.prefix_mask):  # in front of a window, a chunk may do without a part
        if need and not need & ~have:
            return _IN_L1
        if need and not need & ~(have | loading | stored):
            if loading and load is not None:
                return ChunkState.LOADING, load.batches[-1].guard.name if load.batches else None, None, None
            return ChunkState.L2, next(guard.name for guard, part in sources if part.get(n)), None, None
    return None


def _each_missing(states: Sequence[ChunkState | Left]) -> Iterator[Told]:
    """What is to be said of chunks that are not there: the same object for those side by side that are alike."""
    for _, same in groupby(states, id):
        state, *others = same
        told = (
            (ChunkState.REMOVED, state.backend, state.seconds_ago, state.removal)
            if isinstance(state, Left)
            else (state, None, None, None)
        )
        yield from repeat(told, 1 + len(others))


class Spans:
    """Chunks of which the same is to be said, together. Those that were removed left at about the same time."""

    def __init__(self) -> None:
        self._made: list[Span] = []
        self._alike: Told | None = None  # what is to be said of the first chunk of the last span
        self._latest: Told | None = None  # and of its last one
        self._begin = self._end = 0

    def add(self, told: Sequence[Told]) -> None:
        """Say something of the next chunks."""
        for chunk in told:
            if chunk is not self._latest:
                self._latest = chunk
                if not self._belongs(chunk):
                    self._close()
                    self._alike = chunk
            self._end += 1

    def _belongs(self, chunk: Told) -> bool:
        if self._alike is None:
            return False
        state, backend, seconds, removal = self._alike
        if (state, backend, removal) != (chunk[0], chunk[1], chunk[3]):
            return False
        return seconds is None or abs((chunk[2] or 0.0) - seconds) <= _TOGETHER_SECONDS

    def _close(self) -> None:
        if self._alike is not None:
            state, backend, seconds, removal = self._alike
            self._made.append(Span(self._begin, self._end - self._begin, state, backend, seconds, removal))
            self._begin = self._end

    def end(self) -> list[Span]:
        """All of them, in order."""
        self._close()
        self._alike = self._latest = None
        return self._made
