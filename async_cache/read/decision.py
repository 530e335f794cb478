"""How a request is decided: what is found, in L1 and in L2, and what of it is promised.

What is decided, is decided in one step of the loop, unless something has to be waited for, or it is very much. What is
held between two steps is the request's, which may end at each of them. All that is promised is leased in L1, on its way
there, or pinned in L2 with room reserved for it, before anybody is told.
"""

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial

from async_cache.aio.slices import Wait, slices, turn
from async_cache.aio.worker import Worker
from async_cache.l1.store import L1Store
from async_cache.l2.guard import Guard
from async_cache.l2.guard.guards import Guards
from async_cache.l2.tombstones import Tombstones
from async_cache.ledger.roots import Roots
from async_cache.read.answers import Miss, Promised
from async_cache.read.filling import Filling
from async_cache.read.load import ChunkLoad
from async_cache.read.loads import Loader
from async_cache.read.lookup import Found, Sources, ask
from async_cache.read.misses import Misses
from async_cache.read.plan import Plan, Planner
from async_cache.read.request import Request
from async_cache.read.search import Search
from async_cache.values import Shortfall

_LOOKED_UP_AT_ONCE = 8192  # chunks in L1, or objects in L2, in a step of the loop: a millisecond or two
_CAUGHT_UP_AT_ONCE = 4096  # chunks


class _Tally:
    """What is loaded for a promise, by chunk, and what was on its way for others; as long as it is `length` chunks."""

    __slots__ = ("length", "loaded", "more_bytes", "shared")

    def __init__(self, length: int) -> None:
        self.length = length
        self.loaded: dict[int, int] = {}
        self.shared: dict[int, int] = {}
        self.more_bytes: dict[Guard, int] = {}  # of what is not queued yet, by where it comes from

    def load(self, to_load: Mapping[int, int], sources: Sources, sizes: Mapping[int, int]) -> None:
        """Count what is about to be loaded: what was before is queued by now."""
        loaded = self.loaded
        if loaded:  # where the promise became shorter, a chunk may come to be in a window
            to_load = {number: mask | loaded.get(number, 0) for number, mask in to_load.items()}
        loaded.update(to_load)
        self.more_bytes = dict.fromkeys(self.more_bytes, 0)
        for guard, masks in sources:
            if masks:
                self.more_bytes[guard] = sum(map(sizes.__getitem__, masks.values()))

    def keep(self, needed: Sequence[int]) -> None:
        """Count only what is needed, by chunk."""
        self.loaded, self.shared = (
            {number: need for number, mask in masks.items() if number < len(needed) and (need := mask & needed[number])}
            for masks in (self.loaded, self.shared)
        )


class Decider:
    """Takes requests to their promise, step by step."""

    def __init__(
        self,
        l1: L1Store,
        guards: Guards,
        loader: Loader,
        tombstones: Tombstones,
        planner: Planner,
        hashing: Worker,
        misses: Misses,
        roots: Roots,
        filling: Filling,
    ):
        self._l1 = l1
        self._guards = guards
        self._loader = loader
        self._tombstones = tombstones
        self._planner = planner
        self._hashing = hashing
        self._misses = misses
        self._roots = roots
        self._filling = filling

    def is_all_in_l1(self, request: Request) -> bool:
        """Decide a request of which L1 has everything, in the shortest way; whether that is so."""
        hashes, find = request.hashes, self._l1.find
        if not hashes or find(hashes[-1]) is None or len(hashes) > _LOOKED_UP_AT_ONCE:
            return False
        layout = request.prompt.layout
        full = layout.objects.full_mask
        entries = [entry for entry in map(find, hashes) if entry is not None and entry.present == full]
        if len(entries) < len(hashes):
            return False
        self._l1.uses.lease(entries)
        request.entries = [*entries]
        request.promise_all()
        return True

    def steps(self, request: Request) -> Generator[Wait, None, Promised]:
        """Decide what is promised. Each step says what to wait for before the next."""
        if not request.prompt.hashed:
            yield partial(self._hashing.run, request.prompt.hash)
        layout, hashes = request.prompt.layout, request.hashes
        guards, tombstones, runs = self._guards.current, self._tombstones, request.runs
        if request.waits_until is not None and self._filling.any_of(hashes):
            yield partial(self._filling.none_of, hashes, request.waits_until)
        request.search = search = Search(
            layout, hashes, guards, tombstones, request.prompt.salt, one_run=len(runs) == 1
        )
        yield from self._find(request, search)
        if search.found is None:
            yield partial(self._ask, search)
        elif not (search.asked.masks or request.loads):
            request.promise_all()
            return Promised(request.lengths)
        assert search.found is not None
        return (yield from self._promise(request, search, search.found))

    async def _ask(self, search: Search) -> None:
        search.found = await ask(self._guards.current, search.asked, self._tombstones)

    # What is found.

    def _find(self, request: Request, search: Search) -> Iterator[Wait]:
        """Lease what L1 has, join what is on its way there, and ask what L2 has at hand; each step is bounded."""
        hashes, find, entries = request.hashes, self._l1.find, request.entries
        full, left = request.prompt.layout.objects.full_mask, _LOOKED_UP_AT_ONCE
        for begin, end in search.parts():
            if left <= 0:
                yield turn
                left = _LOOKED_UP_AT_ONCE
            some = list(map(find, hashes[begin:end]))
            incomplete: Sequence[int] = range(begin, end)
            if any(some):
                self._l1.uses.lease(filter(None, some))
                incomplete = [n for n, entry in enumerate(some, begin) if entry is None or entry.present != full]
            entries += some
            left -= end - begin
            if incomplete:
                missing = self._missing(request, hashes, incomplete)
                if (found := search.ask(missing)) is not None:
                    yield found.hear
                    search.ask(missing)
                left -= len(incomplete) * full.bit_count()

    def _missing(self, request: Request, hashes: Sequence[bytes], incomplete: Sequence[int]) -> dict[int, int]:
        """The objects that are neither in L1 nor on their way there, by chunk; takes shares of what is on its way."""
        full, entries, table = request.prompt.layout.objects.full_mask, request.entries, self._loader.in_flight()
        if not (table or any(map(entries.__getitem__, incomplete))):
            return dict.fromkeys(incomplete, full)
        missing = {}
        for number in incomplete:
            lacks, entry, load = full, entries[number], table.get(hashes[number])
            if entry is not None:
                lacks &= ~entry.present
            if load is not None:
                _join(request, number, load)
                lacks &= ~load.wanted
            if lacks:
                missing[number] = lacks
        return missing

    def _catch_up(self, request: Request, search: Search, found: Found, numbers: Collection[int]) -> None:
        """Lease and join what has come of these chunks while others had their turn, and forget what was deleted.

        A hash that somebody made up may have come with another layout: what was found of it must not get a room beside
        that, and counts as not there.
        """
        hashes, find, table, layout = request.hashes, self._l1.find, self._loader.in_flight(), request.prompt.layout
        search.leave_out_removed(numbers)
        others = set()
        for number in numbers:
            chunk_hash = hashes[number]
            entry, load = find(chunk_hash), table.get(chunk_hash)
            if entry is not None and request.entries[number] is None:
                if entry.layout.same_bytes(layout):
                    self._l1.uses.lease((entry,))
                    request.entries[number] = entry
                else:
                    others.add(number)
            if load is not None:
                if load.layout.same_bytes(layout):
                    _join(request, number, load)
                else:
                    others.add(number)
        if others:
            found.leave_out([hashes[number] for number in others], others)

    # What is promised.

    def _promise(self, request: Request, search: Search, found: Found) -> Generator[Wait, None, Promised]:
        """Make sure of the longest prefixes that there are, or that L1 has room for.

        Of very much, what has its room is handed to the loader while that of the rest is made.
        """
        if len(request.entries) > _LOOKED_UP_AT_ONCE:
            yield turn  # to look up the last of them took this one
        for _ in found.touch_prefix(request.prompt.chunk_hashes, request.start_chunk):
            yield turn
        if request.task is not None:
            for numbers in slices(list(search.asked.masks), _CAUGHT_UP_AT_ONCE):
                self._catch_up(request, search, found, numbers)
                if len(numbers) == _CAUGHT_UP_AT_ONCE:
                    yield turn
        if not (request.loads or any(request.entries) or any(found.masks().values())):
            nothing = request.lengths
            return Promised(nothing, dict(self._misses_of(request, found, nothing)))
        plan = yield from self._planner.plan(request, found)
        request.promise(plan.lengths, plan.needed)
        tally = _Tally(plan.length)
        for numbers in slices(sorted(request.loads), _CAUGHT_UP_AT_ONCE) if request.loads else ():
            self._count_shared(request, tally, numbers)
            if len(numbers) == _CAUGHT_UP_AT_ONCE:
                yield turn
        in_steps = len(request.entries) >= _CAUGHT_UP_AT_ONCE
        while True:
            numbers = self._planner.next(request, plan)
            if in_steps:
                yield turn
                self._catch_up(request, search, found, numbers)
                self._planner.look_again(request, found, plan, numbers)
                request.promise(plan.lengths, plan.needed)
                self._count_shared(request, tally, numbers)
            to_load = self._planner.reserve(request, plan, numbers)
            request.promise(plan.lengths, plan.needed)
            sources = found.sources(to_load)
            tally.load(to_load, sources, request.prompt.layout.objects.sizes)
            if not plan.to_load and not (to_load and in_steps):  # else what is said of it has a step to itself
                break
            if to_load:
                self._load(request, found, sources, to_load)
                self._loader.begin_soon()
                in_steps = True
        promised = self._promised(request, found, plan, tally)
        self._load(request, found, sources, to_load)
        return promised

    def _count_shared(self, request: Request, tally: _Tally, numbers: Iterable[int]) -> None:
        """Count what is on its way already of these chunks; leave that of which nothing is needed."""
        table, hashes, unneeded = self._loader.in_flight(), request.hashes, []
        for number in request.loads.intersection(numbers):
            mask = _waits_for(request, number)
            if mask:
                tally.shared[number] = mask
                for batch in table[hashes[number]].batches:
                    tally.more_bytes.setdefault(batch.guard, 0)
            else:
                unneeded.append(number)
        if unneeded:
            request.loads.difference_update(unneeded)
            self._loader.release(request, [hashes[number] for number in unneeded])

    def _load(self, request: Request, found: Found, sources: Sources, to_load: Mapping[int, int]) -> None:
        """Hand what has its room to the loader."""
        if to_load:
            for prompt in request.prompt.parts:
                self._roots.note(prompt)
            self._loader.add(request, request.hashes, found, sources)
            request.loads.update(to_load)

    def _promised(self, request: Request, found: Found, plan: Plan, tally: _Tally) -> Promised:
        """What is promised, now that all of it is held."""
        length, hashes = plan.length, request.hashes
        if length < tally.length:  # others have taken the room of the rest, or the rest itself
            self._count_shared(request, tally, list(request.loads))
            tally.keep(plan.needed)
        request.release(self._l1, plan.needed)
        shared, loaded = tally.shared, tally.loaded
        loads: Mapping[int, int] = loaded
        if shared:
            for number in shared.keys() & loaded.keys():
                shared[number] &= ~loaded[number]
            self._loader.shared_loads += sum(map(int.bit_count, shared.values()))
            loads = {number: loaded.get(number, 0) | shared.get(number, 0) for number in {**shared, **loaded}}
        request.from_l2 = sorted(loads) or ()
        misses = dict(self._misses_of(request, found, plan.found)) if length < len(hashes) or len(plan.runs) > 1 else {}
        return Promised(plan.found, misses, loads, self._loader.expected_seconds(tally.more_bytes))

    def _misses_of(self, request: Request, found: Found, exist: Sequence[int]) -> Iterator[tuple[int, Miss]]:
        """Why less is promised of a prompt than it asks for, by its number; so many chunks of each exist."""
        prompts = enumerate(zip(request.prompt.parts, request.runs, request.lengths, exist, strict=True))
        for part, (prompt, run, length, there) in prompts:
            if there < len(run):
                at = request.start_chunk + there
                missed = self._misses.missed(prompt.chunk_hashes, at, failed=found.failed)
                reason = request.reasons.get(run[there], Shortfall.BACKEND_ERROR if found.failed else None)
                yield part, Miss(reason if length == there else Shortfall.MEMORY, missed)
            elif length < there:
                yield part, Miss(Shortfall.MEMORY)


def _join(request: Request, number: int, load: ChunkLoad) -> None:
    request.loads.add(number)
    load.shares[request] = number


def _waits_for(request: Request, number: int) -> int:
    """The objects of a chunk that are needed and not in L1 yet."""
    needed, entry = request.needed, request.entries[number]
    mask = needed[number] & request.local_mask if number < len(needed) else 0
    return mask & ~entry.present if entry is not None else mask
