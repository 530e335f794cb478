"""`Core`: the parts of an open cache, wired up."""

import asyncio
from collections.abc import Sequence

from async_cache.aio.sweeper import Sweeper
from async_cache.aio.worker import Worker
from async_cache.config import CacheConfig
from async_cache.errors import CacheClosedError
from async_cache.events import Events
from async_cache.l1.store import L1Store
from async_cache.l2.backend import Backend
from async_cache.l2.guard import Guard
from async_cache.l2.guard.guards import Guards
from async_cache.l2.tombstones import Tombstones
from async_cache.ledger.ledger import Ledger
from async_cache.ledger.roots import Roots
from async_cache.memory.arena import Arena
from async_cache.observe import Observers
from async_cache.prompt.layout import Prompt
from async_cache.read.explain import Explainer
from async_cache.read.hits import count_hits
from async_cache.read.listing import Listing
from async_cache.read.loads import Loader
from async_cache.read.misses import Misses
from async_cache.read.prefetch import PrefetchController
from async_cache.retention.policies import make_policy
from async_cache.tracing import Tracing
from async_cache.values import CacheStats, LookupHits
from async_cache.write.backends import Backends
from async_cache.write.removal import Remover
from async_cache.write.writeback import Writeback
from async_cache.write.writing import Writing


class Core:
    """The parts to which `AsyncCache` delegates, and a server beside it. `close` ends them in order."""

    def __init__(self, config: CacheConfig, arena: Arena, backends: Sequence[Backend], tracing: Tracing | None = None):
        self.config, self.arena = config, arena
        self.observers = Observers()
        self.ledger = Ledger(config.explain_chunks, self.observers, self._owner_of)
        self.tracing = tracing
        if tracing is not None:
            self.observers.add(tracing)
        self.events = Events(self.observers, self.ledger)
        self.roots = Roots()
        self.guards = Guards([Guard.of(backend, config, self.ledger) for backend in backends])
        self.l1 = L1Store(
            arena,
            make_policy(config.policy, asyncio.get_running_loop().time),
            lambda entry: self.writeback.evicted(entry),
            self.observers,
            self.ledger,
        )
        self.writeback = Writeback(self.l1, self.guards, self.observers, config)
        self.tombstones = tombstones = Tombstones()
        self.hashing = Worker("async_cache hashing")
        self.loader = Loader(
            self.l1,
            self.guards,
            tombstones,
            config,
            lambda *arrived: self.controller.arrived(*arrived),
            self.writeback.promote,
        )
        self.sweeper = Sweeper()
        self.listing = Listing(self.l1, self.roots)
        self.writing = Writing(self.l1, self.writeback, self.sweeper, self.hashing, config, self.roots)
        self.misses = Misses(self.l1, self.ledger, tombstones, self.writing.filling)
        self.controller = PrefetchController(
            self.l1,
            self.guards,
            self.loader,
            self.sweeper,
            self.hashing,
            tombstones,
            self.observers,
            config,
            self.misses,
            self.roots,
        )
        self.requests = self.controller.requests
        self.explainer = Explainer(self.l1, self.guards, self.loader, tombstones, self.hashing, self.misses, self.roots)
        self.remover = Remover(self.l1, self.guards, self.loader, self.writeback, tombstones, self.hashing)
        self.backends = Backends(self.guards, self.writeback, tombstones, config, self.ledger, self.loader.forget)
        self.sweeping = asyncio.create_task(self.sweeper.run())

    def reconfigure(self, config: CacheConfig) -> None:
        """Go by other settings from now on: by those of them that are live."""
        self.config = config
        for part in (self.controller, self.loader, self.writing, self.writeback, self.backends, *self.guards):
            part.reconfigure(config)

    async def close(self) -> None:
        """Close, in this order: no more requests, what is pending written, no more tasks, the tiers."""
        timeout = self.config.close_timeout_seconds
        self.l1.closed = True  # no writer opens any more
        await self.controller.close()
        await self.remover.close()
        await self.backends.close()
        self.writing.close()
        await self.writeback.flush(timeout)
        await self.writeback.close()
        self.sweeping.cancel()
        self.events.close(CacheClosedError("the cache was closed"))
        self.ledger.close()  # what leaves from here on need not be explained
        await asyncio.wait((self.sweeping,))
        await asyncio.gather(*(guard.close(timeout) for guard in self.guards))
        await self.loader.close()
        await self.remover.empty_l1()
        self.l1.close()
        await asyncio.to_thread(self._close_blocking)

    def _close_blocking(self) -> None:
        """Close what may take its time: to unmap gigabytes does."""
        self.hashing.close(wait=True)
        self.arena.close()

    def fits(self, prompt: Prompt) -> bool:
        """Whether the chunks of a prompt that are in memory have its layout.

        They do where their hashes were made here. A server asks, to which clients send hashes.
        """
        layout = prompt.layout
        known = [*map(self.l1.find, prompt.chunk_hashes), *map(self.loader.in_flight().get, prompt.chunk_hashes)]
        return all(it is None or it.layout.same_bytes(layout) for it in known)

    async def count_hits(self, prompt: Prompt) -> LookupHits:
        """Count how much of a prompt is cached now."""
        return await count_hits(prompt, self.l1, self.guards, self.loader, self.tombstones, self.hashing, self.misses)

    def _owner_of(self, chunk_hash: bytes) -> str | None:
        entry = self.l1.find(chunk_hash)
        return entry.owner if entry is not None else None

    def stats(self) -> CacheStats:
        """Count what is held now, and what was done since the cache was opened."""
        self.writing.reclaim()
        l1, requests = self.l1, self.requests
        return CacheStats(
            requests=len(requests),
            leases=l1.leases,
            leased_bytes=l1.leased_bytes,
            reserved_bytes=l1.reserved_bytes,
            quarantined_bytes=l1.quarantined_bytes,
            l1_used_bytes=l1.used_bytes,
            l1_capacity_bytes=self.arena.size_bytes,
            l1_chunks=len(l1.index),
            loads=self.loader.loads,
            shared_loads=self.loader.shared_loads,
            swept_results=requests.swept_results,
            swept_leases=requests.swept_leases,
            swept_reservations=self.writing.swept,
            writebacks_pending=self.writeback.pending,
            writebacks_dropped=self.writeback.dropped,
            backends={g.name: usage for g in self.guards if (usage := g.usage()) is not None},
        )

    def check_integrity(self) -> None:
        """Assert that the records do not contradict each other."""
        self.l1.check_integrity()
        self.loader.check_integrity()
        self.writeback.check_integrity()
        self.controller.check_integrity()
