"""How much of a prompt, or of several, is cached, for those who only want to know: no lease, no load, no promise."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import compress
from operator import not_

from async_cache.aio.slices import InTurns, turn
from async_cache.aio.worker import Worker
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
from async_cache.read.lookup import ask
from async_cache.read.misses import Misses
from async_cache.read.request import Request
from async_cache.read.search import Search
from async_cache.values import LookupHits, Shortfall

_FIRST = 256  # chunks, by which most prompts that are not cached are known
_TOUCHED_AT_ONCE = 2048  # chunks, in a few milliseconds
_AT_ONCE = 8192  # chunks in L1, or objects in L2: a millisecond or two, then the loop has its turn


async def count_hits(
    prompt: Prompt | Parts,
    l1: L1Store,
    guards: Guards,
    loader: Loader,
    tombstones: Tombstones,
    hashing: Worker,
    why: Misses,
) -> LookupHits:
    """Count what a prefetch of this prompt, or of these, would find. What it pins is unpinned before it returns."""
    if not prompt.hashed:
        await hashing.run(prompt.hash)
        if l1.closed:
            raise CacheClosedError("the cache was closed")
    if isinstance(prompt, Prompt):
        counted = await _count_at_hand(prompt, l1, guards.current, loader, tombstones, why)
        if counted is not None:
            return counted
    layout, hashes, there = prompt.layout, prompt.chunk_hashes, guards.current
    # One that nobody knows, for what would be promised.
    request = Request("", prompt, 0, range(layout.world_size), 0.0, asyncio.get_running_loop())
    full, sizes = layout.objects.full_mask, layout.objects.sizes
    resident: list[int] = []
    here: list[int] = []
    with closing(Search(layout, hashes, there, tombstones, prompt.salt, one_run=len(request.runs) == 1)) as search:
        left = _AT_ONCE
        for begin, end in search.parts():
            if left <= 0:
                await turn()
                left = _AT_ONCE
            some = [entry.present if (entry := l1.find(h)) is not None else 0 for h in hashes[begin:end]]
            resident += some
            if table := loader.in_flight():
                loads = map(table.get, hashes[begin:end])
                some = [mask | (load.wanted if load is not None else 0) for mask, load in zip(some, loads, strict=True)]
            here += some
            left -= end - begin
            if some.count(full) < len(some):
                missing = {n: lacks for n, mask in enumerate(some, begin) if (lacks := full & ~mask)}
                if (found := search.ask(missing)) is not None:
                    search.wait()
                    await found.hear()
                    search.ask(missing)
                left -= len(missing) * full.bit_count()
        if search.found is None:
            search.found = await ask(there, search.asked, tombstones)
        search.leave_out_removed(search.asked.masks)
        found = search.found
        for _ in found.touch_prefix(hashes):
            await asyncio.sleep(0)
        if l1.closed:
            raise CacheClosedError("the cache was closed")
        async for numbers in InTurns(list(search.asked.masks), _AT_ONCE):
            for number in numbers:
                here[number] |= found.mask_of(number)
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
                    source_bytes[guard.meter] += sum(map(sizes.__getitem__, masks.values()))
    while found.letting_go:  # noqa: ASYNC110 (each turn unpins some of it)
        await asyncio.sleep(0)
    request.from_l2 = list(to_load)
    misses = {}
    for number, (asked, length) in enumerate(zip(prompt.parts, lengths, strict=True)):
        if length < len(asked):
            missed = why.missed(asked.chunk_hashes, length, failed=found.failed)
            misses[number] = Miss(Shortfall.BACKEND_ERROR if found.failed else None, missed)
    expected = expected_load_seconds(list(source_bytes.items()))
    return hits_of(request, Promised(lengths, misses, to_load, expected), adviser=None)


async def _count_at_hand(
    prompt: Prompt, l1: L1Store, guards: Sequence[Guard], loader: Loader, tombstones: Tombstones, why: Misses
) -> LookupHits | None:
    """The same where each chunk is whole or not there at all, and nobody has to be waited for to know; else None.

    It ends with the first chunk that is missing, and takes a microsecond for each before. Nothing is pinned.
    """
    layout, hashes, index = prompt.layout, prompt.chunk_hashes, l1.index
    full, most = layout.objects.full_mask, layout.objects.chunks_with(_AT_ONCE)
    if len(guards) > 1 or layout.objects.windows:
        return None
    length = here = 0
    while length < len(hashes):
        some = hashes[length : length + most] if length else hashes[:_FIRST]
        resident = [entry is not None and entry.present == full for entry in map(index.get, some)]
        found = len(some)
        if asked := list(compress(some, map(not_, resident))):
            if tombstones or not (index.keys().isdisjoint(asked) and loader.in_flight().keys().isdisjoint(asked)):
                return None
            stored = guards[0].present_nowait(layout, asked, full) if guards else [False] * len(asked)
            if stored is None:
                return None
            if not all(stored):
                found = some.index(asked[stored.index(False)])
        length += found
        here += resident[:found].count(True)
        if found < len(some):
            break
        if length < len(hashes):
            await turn()
            if l1.closed:
                raise CacheClosedError("the cache was closed")
    for end in range(length, 0, -_TOUCHED_AT_ONCE) if here < length else ():  # the head last
        guards[0].touch_prefix(hashes[max(0, end - _TOUCHED_AT_ONCE) : end])
        if end > _TOUCHED_AT_ONCE:
            await turn()
            if l1.closed:
                raise CacheClosedError("the cache was closed")
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
        missed=why.missed(hashes, length, failed=False) if length < len(hashes) else None,
        base_tokens=prompt.base_tokens,
    )
