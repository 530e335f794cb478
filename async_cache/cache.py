"""`AsyncCache`: owns the tiers, the tasks and the sweepers of one process, and delegates the rest."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Literal, Self

from async_cache.arguments import check_prompt, check_request_id, check_seconds, check_tier, ranks_of, start_of
from async_cache.config import CacheConfig
from async_cache.counting import count_hits
from async_cache.errors import BackendError, CacheClosedError, ConfigError
from async_cache.l1.arena import Arena
from async_cache.l1.eviction import LeastRecentlyUsed
from async_cache.l1.store import L1Store
from async_cache.l2.backend import Backend
from async_cache.l2.guard import Breaker, Guard
from async_cache.l2.registry import from_url
from async_cache.layout import PAGE_BYTES, Prompt, check_index
from async_cache.loads import Loader
from async_cache.prefetch import PrefetchController
from async_cache.promise import Prefetch
from async_cache.reading import Entered, ReadChunk, ReadLease
from async_cache.removal import Hidden, Remover
from async_cache.sweeper import Sweeper
from async_cache.values import CacheStats, Deleted, FlushResult, LoadResult, LookupHits
from async_cache.writeback import Writeback
from async_cache.writing import Writer

_POPULATE_BYTES = 64 * 2**20  # of the arena in one step
_MAX_REQUEST_ID = 1024  # a server puts its tenant and namespace before a client's, which has up to 256


class AsyncCache:
    """The embedded cache: NEW -> OPEN -> CLOSED, by `async with` or by `open` and `close`.

    `backends` are ready-made ones, the fastest first, in place of those that `config.l2` names. All methods are to be
    called from the loop that opened it.
    """

    def __init__(self, config: CacheConfig | None = None, backends: Iterable[Backend] | None = None):
        self._config = config if config is not None else CacheConfig()
        if not isinstance(self._config, CacheConfig):
            raise TypeError(f"config must be a CacheConfig, not {type(config).__name__}")
        made = [from_url(url) for url in self._config.l2] if backends is None else list(backends)
        for backend in made:
            if not isinstance(backend, Backend):
                raise TypeError(f"a backend must be a Backend, not {type(backend).__name__}")
        if len({backend.name for backend in made}) < len(made):
            raise ConfigError("two backends have the same name")
        if self._config.l1_bytes < PAGE_BYTES:
            raise ConfigError(f"l1_bytes must be at least a page of {PAGE_BYTES}")
        self._backends = made
        self._core: _Core | None = None
        self._used = False
        self._closing: asyncio.Task[None] | None = None

    # Life.

    async def open(self) -> Self:
        """Make the arena and open the backends. Raises what a backend raises that can not be opened."""
        if self._used:
            raise CacheClosedError("a cache is opened once")
        self._used = True
        try:
            arena = Arena(self._config.l1_bytes // PAGE_BYTES * PAGE_BYTES)
        except OSError as error:
            raise ConfigError(f"l1_bytes {self._config.l1_bytes}: {error.strerror}") from error
        try:
            for begin in range(0, arena.size_bytes, _POPULATE_BYTES):
                await asyncio.to_thread(arena.populate, begin, min(begin + _POPULATE_BYTES, arena.size_bytes))
            await self._open_backends()
        except BaseException:
            arena.close()
            raise
        self._core = _Core(self._config, arena, self._backends)
        return self

    async def _open_backends(self) -> None:
        openings: dict[Backend, asyncio.Task[None]] = {}
        try:
            for backend in self._backends:
                openings[backend] = opening = asyncio.create_task(backend.open())
                await asyncio.wait((opening,), timeout=self._config.load_timeout_seconds)
                if not opening.done():
                    raise BackendError(f"{backend.name} was not open within {self._config.load_timeout_seconds} s")
                opening.result()
        except BaseException:
            for opening in openings.values():
                opening.cancel()
            ends = [*openings.values(), *(asyncio.create_task(backend.close()) for backend in openings)]
            for end in ends:
                end.add_done_callback(lambda end: end.cancelled() or end.exception())  # looked at: one error is enough
            _, stuck = await asyncio.wait(ends, timeout=self._config.close_timeout_seconds)
            for end in stuck:
                end.cancel()
            raise

    async def close(self) -> None:
        """End all requests, write back what is pending (for a bounded time), close the backends; idempotent.

        Whoever waits for a future or a query gets CacheClosedError.
        """
        core, self._core = self._core, None
        if core is not None:
            self._closing = asyncio.create_task(core.close())
        if self._closing is not None:
            await asyncio.shield(self._closing)  # to the end, also where the caller is cancelled

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def _open(self) -> "_Core":
        if self._core is None:
            raise CacheClosedError("the cache is closed" if self._used else "the cache is not open: use `async with`")
        return self._core

    # Prefetching.

    def prefetch(
        self,
        prompt: Prompt,
        *,
        request_id: str | None = None,
        skip_tokens: int = 0,
        ranks: Sequence[int] | None = None,
        deadline_seconds: float | None = None,
    ) -> Prefetch:
        """Look a prompt up and load what is cached of it; returns at once.

        `skip_tokens`: what the engine holds itself; its whole chunks are neither looked up nor counted.
        `ranks`: those to load here, all if None; the others are only checked for existence.
        `deadline_seconds` runs from this call.
        Raises RequestConflictError if the id is in use for something else.
        """
        core = self._open
        check_prompt(prompt)
        if request_id is not None:
            check_request_id(request_id, _MAX_REQUEST_ID)
        check_seconds("deadline_seconds", deadline_seconds)
        start_chunk, here = start_of(prompt, skip_tokens), ranks_of(prompt, ranks)
        return core.controller.start(prompt, request_id, start_chunk, here, deadline_seconds)

    async def lookup(self, prompt: Prompt) -> LookupHits:
        """How much of a prompt is cached now: no lease, no load, no promise."""
        core = self._open
        check_prompt(prompt)
        return await core.count_hits(prompt)

    async def query_lookup_hits(self, request_id: str) -> LookupHits:
        """Await `lookup_done`; by any number of callers, any number of times. Raises UnknownRequestError."""
        return await self._open.controller.query_lookup_hits(check_request_id(request_id, _MAX_REQUEST_ID))

    async def query_status(self, request_id: str) -> LoadResult:
        """Await `load_done` and claim the result, which is handed out once. Raises UnknownRequestError."""
        return await self._open.controller.query_status(check_request_id(request_id, _MAX_REQUEST_ID))

    def unclaim(self, request_id: str) -> None:
        """Give back a result that was claimed for somebody who does not know of it: it is handed out once more."""
        self._open.controller.unclaim(check_request_id(request_id, _MAX_REQUEST_ID))

    async def renew(self, request_id: str) -> None:
        """Let the request's time begin anew. Raises UnknownRequestError."""
        self._open.controller.renew(check_request_id(request_id, _MAX_REQUEST_ID))

    async def end_request(self, request_id: str) -> None:
        """Give back all that the request holds; cancels it if it runs. Unknown ids are fine."""
        self._open.controller.end(check_request_id(request_id, _MAX_REQUEST_ID))

    # Reading and writing.

    def read(self, request_id: str, *, rank: int = 0, reader: int = 0) -> ReadLease:
        """Read what was loaded: `async with` the lease, or `await` it. It waits for the load and claims nothing.

        Entering raises UnknownRequestError, ReadConflictError for a second time, ValueError for a rank or reader that
        the request has not.
        """
        core = self._open
        return ReadLease(partial(core.enter_read, check_request_id(request_id, _MAX_REQUEST_ID), rank, reader))

    def store(self, prompt: Prompt, *, rank: int = 0, start_chunk: int = 0) -> Writer:
        """Write a rank's chunks from `start_chunk` on, those that L1 lacks: `async with` the writer, or `await` it."""
        core = self._open
        check_prompt(prompt)
        check_index("rank", rank, prompt.layout.world_size)
        check_index("start_chunk", start_chunk, len(prompt) + 1)
        return Writer(core.l1, core.writeback, core.open_writers, prompt, rank, start_chunk)

    async def flush(self, deadline_seconds: float | None = None) -> FlushResult:
        """Wait until what was committed is in L2. Counts what was written or dropped since the last flush."""
        core = self._open
        check_seconds("deadline_seconds", deadline_seconds)
        return await core.writeback.flush(deadline_seconds)

    # Removing.

    async def delete(self, prompt: Prompt) -> Deleted:
        """Remove every chunk of a prompt from both tiers. Raises BackendError where a backend could not."""
        core = self._open
        check_prompt(prompt)
        return await core.remover.delete(prompt)

    async def clear(self, tier: Literal["l1", "all"] = "l1") -> Deleted:
        """Empty L1 of what L2 has ("l1"), or both tiers ("all")."""
        check_tier(tier)
        return await self._open.remover.clear(tier)

    # Looking at it.

    async def stats(self) -> CacheStats:
        """A snapshot of what is held, and counters since it was opened."""
        return self._open.stats()

    @property
    def memory(self) -> memoryview:
        """The arena, fixed while the cache is open, to register with a GPU or NIC. Not to be written to elsewhere."""
        return memoryview(self._open.arena.view)

    def tell_over(self, told: Callable[[str], None]) -> None:
        """Have a call told the id of each request that is over; there is one such call."""
        self._open.controller.on_over = told

    def fits(self, prompt: Prompt) -> bool:
        """Whether the chunks of a prompt that are in memory have its layout.

        They have, where their hashes were made with it: this is for a server, to which hashes are told.
        """
        core, layout = self._open, prompt.layout
        known = [*map(core.l1.index.get, prompt.chunk_hashes), *map(core.loader.table.get, prompt.chunk_hashes)]
        return all(it is None or it.layout.same_bytes(layout) for it in known)

    @property
    def memory_fd(self) -> int:
        """The file descriptor of the arena, to be mapped read-only by another process."""
        return self._open.arena.fd

    def check_integrity(self) -> None:
        """Raises AssertionError if the records of the cache contradict each other."""
        self._open.check_integrity()


class _Core:
    """The parts of an open cache, wired up."""

    def __init__(self, config: CacheConfig, arena: Arena, backends: Sequence[Backend]):
        self.config, self.arena = config, arena
        self.guards = [
            Guard(backend, Breaker(config.breaker_failures, config.breaker_reset_seconds)) for backend in backends
        ]
        self.l1 = L1Store(arena, LeastRecentlyUsed(), lambda entry: self.writeback.evicted(entry))
        self.writeback = Writeback(self.l1, self.guards, config)
        self.loader = Loader(self.l1, self.guards, config)
        self.hidden = hidden = Hidden()
        self.sweeper = Sweeper()
        self.controller = PrefetchController(self.l1, self.guards, self.loader, self.sweeper, hidden, config)
        self.open_writers = self.sweeper.expiry(config.reservation_ttl_seconds, Writer.expire)
        self.remover = Remover(self.l1, self.guards, self.loader, self.writeback, hidden, config)
        self.sweeping = asyncio.create_task(self.sweeper.run())

    async def close(self) -> None:
        """In this order: no more requests, what is pending written, no more tasks, tiers closed."""
        timeout = self.config.close_timeout_seconds
        self.l1.closed = True  # no writer opens any more
        await self.controller.close()
        await self.remover.close()
        for writer in list(self.open_writers):
            writer.expire()
        await self.writeback.flush(timeout)
        await self.writeback.close()
        self.sweeping.cancel()
        await asyncio.wait((self.sweeping,))
        await asyncio.gather(*(guard.close(timeout) for guard in self.guards))
        await self.loader.close()
        await self.remover.empty_l1()
        self.l1.close()
        await asyncio.to_thread(self.arena.close)  # to unmap gigabytes takes its time

    async def count_hits(self, prompt: Prompt) -> LookupHits:
        timeout = self.config.lookup_timeout_seconds
        return await count_hits(prompt, self.l1, self.guards, self.loader, self.hidden, timeout)

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
            swept_reservations=self.open_writers.swept,
            writebacks_pending=self.writeback.pending,
            writebacks_dropped=self.writeback.dropped,
            backends={g.backend.name: usage for g in self.guards if (usage := g.usage()) is not None},
        )

    def check_integrity(self) -> None:
        self.l1.check_integrity()
        self.loader.check_integrity()
        self.writeback.check_integrity()
        self.controller.check_integrity()
