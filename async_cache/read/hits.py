"""How much of a prompt is cached, for those who only want to know: no lease, no load, no promise."""

import asyncio
from contextlib import closing

from async_cache.errors import CacheClosedError
from async_cache.l1.store import L1Store
from async_cache.l2.guard.guards import Guards
from async_cache.l2.guard.meter import expected_load_seconds
from async_cache.l2.tombstones import Tombstones
from async_cache.prompt import coverage
from async_cache.prompt.layout import Prompt
from async_cache.read.loads import Loader
from async_cache.read.lookup import ask
from async_cache.read.search import Search
from async_cache.values import LookupHits, Shortfall


async def count_hits(prompt: Prompt, l1: L1Store, guards: Guards, loader: Loader, tombstones: Tombstones) -> LookupHits:
    """Count what a prefetch of this prompt would find. What it pins is unpinned before it returns."""
    if not prompt.hashed:
        await asyncio.to_thread(prompt.hash)
        if l1.closed:
            raise CacheClosedError("the cache was closed")
    layout, hashes, there = prompt.layout, prompt.chunk_hashes, guards.current
    resident: list[int] = []
    here: list[int] = []
    with closing(Search(layout, hashes, there, tombstones)) as search:
        full, table = layout.objects.full_mask, loader.in_flight()
        for begin, end in search.parts():
            some = [entry.present if (entry := l1.find(h)) is not None else 0 for h in hashes[begin:end]]
            resident += some
            if table:
                loads = map(table.get, hashes[begin:end])
                some = [mask | (load.wanted if load is not None else 0) for mask, load in zip(some, loads, strict=True)]
            here += some
            if some.count(full) < len(some):
                search.ask({n: lacks for n, mask in enumerate(some, begin) if (lacks := full & ~mask)})
        if search.found is None:
            search.found = await ask(there, search.asked, tombstones)
            if l1.closed:
                raise CacheClosedError("the cache was closed")
        found = search.found
        for _ in found.touch_prefix(hashes):
            await asyncio.sleep(0)
        for number, mask in found.masks().items():
            here[number] |= mask
        length = coverage.lengths(layout, here)[-1]
        needed = coverage.needed(layout, length)
        to_load = {n: lacks for n in range(length) if (lacks := needed[n] & ~resident[n])}
        sizes = layout.objects.sizes
        sources = [(guard, sum(map(sizes.__getitem__, part.values()))) for guard, part in found.sources(to_load)]
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
        expected_load_seconds=expected_load_seconds([(guard.meter, size) for guard, size in sources if size]),
    )
