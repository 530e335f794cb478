"""`Core`: the parts of an open cache, wired up."""

import asyncio
from collections.abc import Sequence
from functools import partial

from async_cache.aio.sweeper import Sweeper
from async_cache.config import CacheConfig
from async_cache.handles.lease import Entered, ReadChunk
from async_cache.l1.store import L1Store
from async_cache.l2.backend import Backend
from async_cache.l2.guard import Guard
from async_cache.l2.tombstones import Tombstones
from async_cache.memory.arena import Arena
from async_cache.observe import Observers
from async_cache.prompt.layout import Prompt
from async_cache.read.counting import count_hits
from async_cache.read.loads import Loader
from async_cache.read.prefetch import PrefetchController
from async_cache.retention.lru import LeastRecentlyUsed
from async_cache.values import CacheStats, LookupHits
from async_cache.write.removal import Remover
from async_cache.write.writeback import Writeback
from async_cache.write.writing import Writing


class Core:
    """What `AsyncCache` delegates to. `close` ends it in order."""

    def __init__(self, config: CacheConfig, arena: Arena, backends: Sequence[Backend]):
        self.config, self.arena = config, arena
        self.observers = Observers()
        self.guards = [Guard.of(backend, config) for backend in backends]
        self.l1 = L1Store(arena, LeastRecentlyUsed(), lambda entry: self.writeback.evicted(entry), self.observers)
        self.writeback = Writeback(self.l1, self.guards, config)
        self.loader = Loader(self.l1, self.guards, config)
        self.tombstones = tombstones = Tombstones()
        self.sweeper = Sweeper()
        self.controller = PrefetchController(
            self.l1, self.guards, self.loader, self.sweeper, tombstones, config, self.observers
        )
        self.requests = self.controller
        self.writing = Writing(self.l1, self.writeback, self.sweeper, config)
        self.remover = Remover(self.l1, self.guards, self.loader, self.writeback, tombstones, config)
        self.sweeping = asyncio.create_task(self.sweeper.run())

    async def close(self) -> None:
        """In this order: no more requests, what is pending written, no more tasks, tiers closed."""
        timeout = self.config.close_timeout_seconds
        self.l1.closed = True  # no writer opens any more
        await self.controller.close()
        await self.remover.close()
        self.writing.close()
        await self.writeback.flush(timeout)
        await self.writeback.close()
        self.sweeping.cancel()
        await asyncio.wait((self.sweeping,))
        await asyncio.gather(*(guard.close(timeout) for guard in self.guards))
        await self.loader.close()
        await self.remover.empty_l1()
        self.l1.close()
        await asyncio.to_thread(self.arena.close)  # to unmap gigabytes takes its time

    def fits(self, prompt: Prompt) -> bool:
        """Whether the chunks of a prompt that are in memory have its layout.

        They have, where their hashes were made with it: this is for a server, to which hashes are told.
        """
        layout = prompt.layout
        known = [*map(self.l1.index.get, prompt.chunk_hashes), *map(self.loader.table.get, prompt.chunk_hashes)]
        return all(it is None or it.layout.same_bytes(layout) for it in known)

    async def count_hits(self, prompt: Prompt) -> LookupHits:
        return await count_hits(prompt, self.l1, self.guards, self.loader, self.tombstones)

    async def enter_read(self, request_id: str, rank: int, reader: int) -> Entered:
        """Begin to read, once the load is done."""
        request = await self.controller.enter(request_id, rank, reader)
        layout, start, entries = request.prompt.layout, request.start_chunk, request.entries
        memory = memoryview(self.arena.view)  # of its own, which lives as long as the lease
        chunks = tuple(
            ReadChunk(
                start + n,
                entry.offset(rank) if (entry := entries[n]) is not None and entry.ranks >> rank & 1 else None,
                rank,
                needed,
                layout,
                memory,
            )
            for n, needed in enumerate(request.needed)
        )
        return Entered(
            await request.result.wait(),
            layout,
            chunks,
            partial(self.controller.leave, request),
            partial(self.controller.unenter, request, rank, reader),
        )

    def stats(self) -> CacheStats:
        self.writing.reclaim()
        l1, controller = self.l1, self.controller
        return CacheStats(
            requests=len(controller.requests),
            leases=l1.leases,
            leased_bytes=l1.leased_bytes,
            reserved_bytes=l1.reserved_bytes,
            quarantined_bytes=l1.quarantined_bytes,
            l1_used_bytes=l1.used_bytes,
            l1_capacity_bytes=self.arena.size_bytes,
            l1_chunks=len(l1.index),
            loads=self.loader.loads,
            shared_loads=self.loader.shared_loads,
            swept_results=controller.results.swept,
            swept_leases=controller.leases.swept,
            swept_reservations=self.writing.swept,
            writebacks_pending=self.writeback.pending,
            writebacks_dropped=self.writeback.dropped,
            backends={g.backend.name: usage for g in self.guards if (usage := g.usage()) is not None},
        )

    def check_integrity(self) -> None:
        self.l1.check_integrity()
        self.loader.check_integrity()
        self.writeback.check_integrity()
        self.controller.check_integrity()
