"""`Core`: the parts of an open cache, wired up."""

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain, filterfalse
from operator import attrgetter, is_

import msgspec

from async_cache.aio.ending import to_its_end
from async_cache.aio.sweeper import Sweeper
from async_cache.aio.worker import Worker
from async_cache.config import CacheConfig
from async_cache.errors import CacheClosedError
from async_cache.events import Events
from async_cache.handles.prefetch import Prefetch
from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.l2.backend import Backend
from async_cache.l2.guard import Guard
from async_cache.l2.guard.guards import Guards
from async_cache.l2.opening import open_all
from async_cache.l2.tombstones import Tombstones
from async_cache.ledger.ledger import Ledger
from async_cache.ledger.roots import Roots
from async_cache.memory.arena import Arena
from async_cache.memory.filled import filled_arena
from async_cache.observe import Observers
from async_cache.prompt.arguments import Wanted
from async_cache.prompt.layout import Prompt
from async_cache.prompt.parts import Parts
from async_cache.read.explain import Explainer
from async_cache.read.filling import Filling
from async_cache.read.hits import HitCounter
from async_cache.read.listing import Listing
from async_cache.read.load import ChunkLoad
from async_cache.read.loads import Loader
from async_cache.read.misses import Misses
from async_cache.read.prefetch import PrefetchController
from async_cache.read.streams import Streams
from async_cache.retention.policies import make_policy
from async_cache.retention.quotas import Bounds
from async_cache.tracing import Tracing
from async_cache.values import CacheStats, LoadResult, LookupHits
from async_cache.write.backends import Backends
from async_cache.write.moves import Moves
from async_cache.write.removal import Remover
from async_cache.write.retained import Retentions
from async_cache.write.writeback import Writeback
from async_cache.write.writing import Writing

log = logging.getLogger(__name__)

_layout_of = attrgetter("layout")


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
            lambda entry: self.writeback.enqueue(entry),
            Bounds(config.parsed_quotas, lambda quota: quota.l1_bytes),
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
        self.listing = Listing(self.l1, self.guards, self.roots)
        filling = Filling()
        self.writing = Writing(self.l1, self.writeback, self.sweeper, self.hashing, config, self.roots, filling)
        self.misses = Misses(self.l1, self.ledger, tombstones, filling)
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
            filling,
        )
        self.requests = self.controller.requests
        self.streams = Streams(self.requests, self.loader, self.l1)
        self.hit_counter = HitCounter(self.l1, self.guards, self.loader, tombstones, self.misses)
        self.explainer = Explainer(self.l1, self.guards, self.loader, tombstones, self.hashing, self.misses, self.roots)
        self.retentions = Retentions(self.l1, self.guards, self.sweeper, self.hashing, config)
        self.remover = Remover(
            self.l1, self.guards, self.loader, self.writeback, tombstones, self.hashing, self.retentions.removed
        )
        moves = Moves(self.l1, self.roots, self.ledger, self.observers)
        self.backends = Backends(
            self.guards, self.writeback, tombstones, config, self.ledger, moves, self.retentions.join, self._forget
        )
        self.sweeping = asyncio.create_task(self.sweeper.run())

    def _forget(self, guard: Guard) -> None:
        self.loader.forget(guard)
        self.retentions.leave(guard)

    def reconfigure(self, config: CacheConfig) -> None:
        """Go by other settings from now on: by those of them that are live."""
        self.config = config
        parts = self.controller, self.loader, self.writing, self.writeback, self.backends, self.retentions
        for part in (*parts, *self.guards):
            part.reconfigure(config)
        self.l1.rooms.bound(config.parsed_quotas)

    def divide(self, parts: Mapping[str, tuple[Collection[str], int]], common_bytes: int) -> None:
        """Tell owners apart, by the names of parts: what each has of L1, and what of its chunks is not written yet.

        Of a part so many bytes are kept from others (see `l1.shares`), and `common_bytes` of those of all others.
        """
        clock = asyncio.get_running_loop().time
        make = partial(make_policy, self.config.policy, clock)
        self.l1.divide(parts, common_bytes, make)
        self.writeback.tell_apart(owner for owners, _ in parts.values() for owner in owners)

    async def close(self) -> None:
        """Close, in this order: no more requests, what is pending written, no more tasks, the tiers."""
        timeout = self.config.close_timeout_seconds
        self.l1.closed = True  # no writer opens any more
        await self.controller.close()
        await self.remover.close()
        await self.backends.close()
        await self.retentions.close()
        self.writing.close()
        await self._write_back(timeout)
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

    async def _write_back(self, timeout_seconds: float) -> None:
        """Write back what is pending; what cannot be is gone with the cache, and said."""
        dropped = self.writeback.dropped
        pending = (await self.writeback.flush(timeout_seconds)).pending
        lost = pending + self.writeback.dropped - dropped
        if lost:
            log.warning(
                "chunks that were committed are not in L2 as the cache closes: %d, %d of them for want of time "
                "(close_timeout_seconds = %g)",
                lost,
                pending,
                timeout_seconds,
            )

    def _close_blocking(self) -> None:
        """Close what may take its time: to unmap gigabytes does."""
        self.hashing.close(wait=True)
        self.arena.close()

    def start(self, wanted: Wanted) -> Prefetch:
        """Begin a request, in the span of whoever calls, where it names none. Raises RequestConflictError."""
        if self.tracing is not None and wanted.traceparent is None:
            wanted.traceparent = self.tracing.here()
        return self.controller.start(wanted)

    async def warm(self, begun: Prefetch) -> LoadResult:
        """Wait for a request that was begun to load what it asks for, and let go of it, whatever comes."""
        try:
            return msgspec.structs.replace(await begun.load_done, request_id="")
        finally:
            self.requests.end(begun.request_id)

    def fits(self, prompt: Prompt) -> bool:
        """Whether the chunks of a prompt that are in memory have its layout.

        They do where their hashes were made here. A server asks, to which clients send hashes.
        """
        hashes, coming = prompt.chunk_hashes, self.loader.in_flight()
        there: Iterable[Entry | ChunkLoad] = filter(None, map(self.l1.find, hashes))
        if coming:
            there = chain(there, filter(None, map(coming.get, hashes)))
        # Most often all have the very layout of the prompt: no step of Python is taken for those.
        others = {id(layout): layout for layout in filterfalse(partial(is_, prompt.layout), map(_layout_of, there))}
        return all(layout.same_bytes(prompt.layout) for layout in others.values())

    async def hashed(self, prompt: Prompt | Parts) -> None:
        """Have the hashes of a prompt made, in a thread if they are not. Raises CacheClosedError."""
        if not prompt.hashed:
            await self.hashing.run(prompt.hash)
            if self.l1.closed:
                raise CacheClosedError("the cache was closed")

    async def count_hits(self, prompt: Prompt | Parts) -> LookupHits:
        """Count how much of a prompt, or of several, is cached now."""
        await self.hashed(prompt)
        return await self.hit_counter.count(prompt)

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
        self.retentions.check_integrity()


async def open_core(config: CacheConfig, backends: Sequence[Backend], told: AbstractContextManager[object]) -> Core:
    """Make the arena, and open the backends; nothing is left if one fails. `told` says where their errors come from.

    Raises as `AsyncCache.open`.
    """
    tracing = Tracing() if config.traces else None
    arena = await filled_arena(config.l1_bytes)
    try:
        for backend in backends:
            backend.register(arena.fd, arena.view)
        with told:
            await open_all(backends, config)
        arena.seal()  # not before: what is registered may have been mapped by a process of a backend
    except BaseException:
        arena.close()
        raise
    core = Core(config, arena, backends, tracing)
    try:
        await core.retentions.recover()
    except BaseException:
        await to_its_end(asyncio.create_task(core.close()))
        raise
    return core
