"""How much of a prompt, or of several, is cached, for those who only want to know: no lease, no load, no promise."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import compress
from operator import not_

from async_cache.aio.slices import InTurns, turn
from async_cache.errors import CacheClosedError
from async_cache.l1.store import L1Store
from async_cache.l2.guard import Guard
from async_cache.l2.guard.guards import Guards
from async_cache.l2.guard.meter import Meter, expected_load_seconds
from async_cache.l2.tombstones import Tombstones
from async_cache.prompt import coverage
from async_cache.prompt.layout import Prompt
from async_cache.prompt.parts import Parts
from async_cache.read.answers import Miss, Promised, hits_of
from async_cache.read.loads import Loader
from async_cache.read.lookup import Found, ask
from async_cache.read.misses import Misses
from async_cache.read.request import Request
from async_cache.read.search import Search
from async_cache.values import LookupHits, Shortfall

_FIRST = 256  # chunks, by which most prompts that are not cached are known
_TOUCHED_AT_ONCE = 2048  # chunks, in a few milliseconds
_AT_ONCE = 8192  # chunks in L1, or objects in L2: a millisecond or two, then the loop has its turn


class HitCounter:
    """Counts what a prefetch would find.

    A prompt whose chunks are each whole or not there at all is counted `_at_hand`, where nobody has to be waited for.
    Any other, and several, are searched for as a prefetch would, and what that pins is unpinned before it returns.
    """

    def __init__(self, l1: L1Store, guards: Guards, loader: Loader, tombstones: Tombstones, misses: Misses):
        self._l1 = l1
        self._guards = guards
        self._loader = loader
        self._tombstones = tombstones
        self._misses = misses

    async def count(self, prompt: Prompt | Parts) -> LookupHits:
        """Count what a prefetch of this prompt, or of these, would find. It has its hashes."""
        if isinstance(prompt, Prompt):
            counted = await self._at_hand(prompt, self._guards.current)
            if counted is not None:
                return counted
        guards = self._guards.current
        # One that nobody knows, for what would be promised.
        request = Request("", prompt, 0, range(prompt.layout.world_size), 0.0, asyncio.get_running_loop())
        one_run = len(request.runs) == 1
        with closing(
            Search(prompt.layout, request.hashes, guards, self._tombstones, prompt.salt, one_run=one_run)
        ) as search:
            resident, here = await self._search(search)
            if search.found is None:
                search.found = await ask(guards, search.asked, self._tombstones)
            found = search.found
            await self._add_found(search, found, here)
            promised = await self._promise(request, found, resident, here)
        while found.letting_go:  # noqa: ASYNC110 (each turn unpins some of it)
            await asyncio.sleep(0)
        return hits_of(request, promised, adviser=None)

    def _check_open(self) -> None:
        if self._l1.closed:
            raise CacheClosedError("the cache was closed")

    # Searched for.

    async def _search(self, search: Search) -> tuple[list[int], list[int]]:
        """By chunk, what is in L1, and that with what is on its way there; ask what L2 has at hand of the rest."""
        hashes, objects, find = search.asked.hashes, search.asked.layout.objects, self._l1.find
        resident: list[int] = []
        here: list[int] = []
        left = _AT_ONCE
        for begin, end in search.parts():
            if left <= 0:
                await turn()
                left = _AT_ONCE
            some = [entry.present if (entry := find(h)) is not None else 0 for h in hashes[begin:end]]
            resident += some
            if table := self._loader.in_flight():
                loads = map(table.get, hashes[begin:end])
                some = [mask | (load.wanted if load is not None else 0) for mask, load in zip(some, loads, strict=True)]
            here += some
            left -= end - begin
            if some.count(objects.full_mask) < len(some):
                missing = {n: lacks for n, mask in enumerate(some, begin) if (lacks := objects.full_mask & ~mask)}
                if (found := search.ask(missing)) is not None:
                    search.wait()
                    await found.hear()
                    search.ask(missing)
                left -= len(missing) * objects.full_mask.bit_count()
        return resident, here

    async def _add_found(self, search: Search, found: Found, here: list[int]) -> None:
        """Add to what is here what was found in L2, and say that it is of use."""
        search.leave_out_removed(search.asked.masks)
        for _ in found.touch_prefix(search.asked.hashes):
            await asyncio.sleep(0)
        self._check_open()
        async for numbers in InTurns(list(search.asked.masks), _AT_ONCE):
            for number in numbers:
                here[number] |= found.mask_of(number)

    async def _promise(self, request: Request, found: Found, resident: Sequence[int], here: Sequence[int]) -> Promised:
        """Give a request what would be promised of what is here."""
        layout = request.prompt.layout
        lengths = [coverage.lengths(layout, coverage.run_of(run, here))[-1] for run in request.runs]
        request.promise(lengths, coverage.needed_of(layout, request.runs, lengths))
        needed = request.needed
        to_load: dict[int, int] = {}
        source_bytes: Counter[Meter] = Counter()
        async for numbers in InTurns(range(len(needed)), _AT_ONCE):
            part = {n: lacks for n in numbers if (lacks := needed[n] & ~resident[n])}
            to_load |= part
            for guard, masks in found.sources(part):
                if masks:
                    source_bytes[guard.meter] += sum(map(layout.objects.sizes.__getitem__, masks.values()))
        request.from_l2 = list(to_load)
        expected = expected_load_seconds(list(source_bytes.items()))
        return Promised(lengths, dict(self._misses_of(request, found)), to_load, expected)

    def _misses_of(self, request: Request, found: Found) -> Iterator[tuple[int, Miss]]:
        for number, (prompt, length) in enumerate(zip(request.prompt.parts, request.lengths, strict=True)):
            if length < len(prompt):
                missed = self._misses.missed(prompt.chunk_hashes, length, failed=found.failed)
                yield number, Miss(Shortfall.BACKEND_ERROR if found.failed else None, missed)

    # At hand.

    async def _at_hand(self, prompt: Prompt, guards: Sequence[Guard]) -> LookupHits | None:
        """The same where nobody has to be waited for to know; else None. It takes a microsecond for a chunk.

        It ends with the first chunk that is missing, and pins nothing.
        """
        layout, hashes = prompt.layout, prompt.chunk_hashes
        full, most = layout.objects.full_mask, layout.objects.chunks_with(_AT_ONCE)
        if len(guards) > 1 or layout.objects.windows:
            return None
        length = here = 0
        while length < len(hashes):
            some = hashes[length : length + most] if length else hashes[:_FIRST]
            resident = [entry is not None and entry.present == full for entry in map(self._l1.index.get, some)]
            found = self._whole(prompt, guards, some, resident)
            if found is None:
                return None
            length += found
            here += resident[:found].count(True)
            if found < len(some):
                break
            if length < len(hashes):
                await turn()
                self._check_open()
        if here < length:
            await self._touch(guards[0], hashes[:length])
        load_bytes = (length - here) * layout.objects.sizes[full]
        return LookupHits(
            request_id="",
            start_chunk=0,
            chunks=length,
            tokens=length * layout.chunk_tokens,
            l1_chunks=here,
            l2_chunks=length - here,
            found_chunks=length,
            load_bytes=load_bytes,
            expected_load_seconds=expected_load_seconds([(guards[0].meter, load_bytes)] if load_bytes else []),
            missed=self._misses.missed(hashes, length, failed=False) if length < len(hashes) else None,
            base_tokens=prompt.base_tokens,
        )

    def _whole(
        self, prompt: Prompt, guards: Sequence[Guard], hashes: Sequence[bytes], resident: Sequence[bool]
    ) -> int | None:
        """How many of these chunks are whole, until the first that is not there; None if that cannot be said at once.

        `resident`: which of them are whole in L1.
        """
        asked = list(compress(hashes, map(not_, resident)))
        if not asked:
            return len(hashes)
        loads = self._loader.in_flight()
        if self._tombstones or not (self._l1.index.keys().isdisjoint(asked) and loads.keys().isdisjoint(asked)):
            return None
        if not guards:
            return hashes.index(asked[0])
        stored = guards[0].present_nowait(prompt.layout, asked, prompt.layout.objects.full_mask)
        if stored is None:
            return None
        return len(hashes) if all(stored) else hashes.index(asked[stored.index(False)])

    async def _touch(self, guard: Guard, hashes: Sequence[bytes]) -> None:
        """Say that these chunks are of use, the head last."""
        for end in range(len(hashes), 0, -_TOUCHED_AT_ONCE):
            guard.touch_prefix(hashes[max(0, end - _TOUCHED_AT_ONCE) : end])
            if end > _TOUCHED_AT_ONCE:
                await turn()
                self._check_open()
