"""How much of a prompt is cached, for those who only want to know: no lease, no load, no promise."""

import asyncio

from async_cache.errors import CacheClosedError
from async_cache.l1.store import L1Store
from async_cache.l2.guard.guards import Guards
from async_cache.l2.guard.meter import expected_load_seconds
from async_cache.l2.tombstones import Tombstones
from async_cache.prompt import coverage
from async_cache.prompt.layout import Prompt
from async_cache.read.loads import Loader
from async_cache.read.lookup import Asked, ask, ask_nowait
from async_cache.read.misses import Misses
from async_cache.values import LookupHits, Shortfall


async def count_hits(
    prompt: Prompt, l1: L1Store, guards: Guards, loader: Loader, tombstones: Tombstones, misses: Misses
) -> LookupHits:
    """Count what a prefetch of this prompt would find. What it pins is unpinned before it returns."""
    if not prompt.hashed:
        await asyncio.to_thread(prompt.hash)
        if l1.closed:
            raise CacheClosedError("the cache was closed")
    layout, hashes = prompt.layout, prompt.chunk_hashes
    resident = [entry.present if (entry := l1.find(h)) is not None else 0 for h in hashes]
    table = loader.in_flight()
    here = [
        mask | (load.wanted if (load := table.get(h)) is not None else 0)
        for h, mask in zip(hashes, resident, strict=True)
    ]
    missing = {n: lacks for n, mask in enumerate(here) if (lacks := layout.objects.full_mask & ~mask)}
    asked = Asked(layout, hashes, missing)
    there = guards.current
    with ask_nowait(there, asked, tombstones) or await ask(there, asked, tombstones) as found:
        if l1.closed:
            raise CacheClosedError("the cache was closed")
        found.touch_prefix(hashes)
        for number, mask in found.masks().items():
            here[number] |= mask
        length = coverage.lengths(layout, here)[-1]
        needed = coverage.needed(layout, length)
        to_load = {n: lacks for n in range(length) if (lacks := needed[n] & ~resident[n])}
        sizes = layout.objects.sizes
        sources = [(guard, sum(sizes[mask] for mask in part.values())) for guard, part in found.sources(to_load)]
    return LookupHits(
        request_id="",
        start_chunk=0,
        chunks=length,
        tokens=length * layout.chunk_tokens,
        l1_chunks=length - len(to_load),
        l2_chunks=len(to_load),
        found_chunks=length,
        shortfall=Shortfall.BACKEND_ERROR if length < len(hashes) and found.failed else None,
        load_bytes=sum(layout.objects.sizes[mask] for mask in to_load.values()),
        expected_load_seconds=expected_load_seconds([(guard.meter, size) for guard, size in sources if size]),
        missed=misses.missed(hashes, length, failed=found.failed) if length < len(hashes) else None,
    )
