"""How much of a prompt is cached, for those who only want to know: no lease, no load, no promise."""

import asyncio
from collections import Counter
from contextlib import closing

from async_cache.aio.worker import Worker
from async_cache.errors import CacheClosedError
from async_cache.l1.store import L1Store
from async_cache.l2.guard.guards import Guards
from async_cache.l2.guard.meter import Meter, expected_load_seconds
from async_cache.l2.tombstones import Tombstones
from async_cache.prompt import coverage
from async_cache.prompt.layout import Prompt
from async_cache.read.loads import Loader
from async_cache.read.lookup import ask
from async_cache.read.misses import Misses
from async_cache.read.search import Search
from async_cache.values import LookupHits, Shortfall

_AT_ONCE = 8192  # chunks in L1, or objects in L2: a millisecond or two, then the loop has its turn


async def count_hits(
    prompt: Prompt,
    l1: L1Store,
    guards: Guards,
    loader: Loader,
    tombstones: Tombstones,
    hashing: Worker,
    misses: Misses,
) -> LookupHits:
    """Count what a prefetch of this prompt would find. What it pins is unpinned before it returns."""
    if not prompt.hashed:
        await hashing.run(prompt.hash)
        if l1.closed:
            raise CacheClosedError("the cache was closed")
    layout, hashes, there = prompt.layout, prompt.chunk_hashes, guards.current
    full, sizes = layout.objects.full_mask, layout.objects.sizes
    resident: list[int] = []
    here: list[int] = []
    with closing(Search(layout, hashes, there, tombstones)) as search:
        left = _AT_ONCE
        for begin, end in search.parts():
            if left <= 0:
                await asyncio.sleep(0)
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
                search.ask(missing)
                left -= len(missing) * full.bit_count()
        if search.found is None:
            search.found = await ask(there, search.asked, tombstones)
        found = search.found
        for _ in found.touch_prefix(hashes):
            await asyncio.sleep(0)
        if l1.closed:
            raise CacheClosedError("the cache was closed")
        asked = list(search.asked.masks)
        for begin in range(0, len(asked), _AT_ONCE):
            if begin:
                await asyncio.sleep(0)
            for number in asked[begin : begin + _AT_ONCE]:
                here[number] |= found.mask_of(number)
        length = coverage.lengths(layout, here)[-1]
        needed = coverage.needed(layout, length)
        to_load: dict[int, int] = {}
        source_bytes: Counter[Meter] = Counter()
        for begin in range(0, length, _AT_ONCE):
            if begin:
                await asyncio.sleep(0)
            numbers = range(begin, min(begin + _AT_ONCE, length))
            part = {n: lacks for n in numbers if (lacks := needed[n] & ~resident[n])}
            to_load |= part
            for guard, masks in found.sources(part):
                if masks:
                    source_bytes[guard.meter] += sum(map(sizes.__getitem__, masks.values()))
    while found.letting_go:  # noqa: ASYNC110 (each turn unpins some of it)
        await asyncio.sleep(0)
    return LookupHits(
        request_id="",
        start_chunk=0,
        chunks=length,
        tokens=length * layout.chunk_tokens,
        l1_chunks=length - len(to_load),
        l2_chunks=len(to_load),
        found_chunks=length,
        shortfall=Shortfall.BACKEND_ERROR if length < len(hashes) and found.failed else None,
        load_bytes=sum(map(sizes.__getitem__, to_load.values())),
        expected_load_seconds=expected_load_seconds(list(source_bytes.items())),
        missed=misses.missed(hashes, length, failed=found.failed) if length < len(hashes) else None,
    )
