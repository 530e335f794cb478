"""`AsyncCache`: owns the tiers, the tasks and the sweepers of one process, and delegates the rest."""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from enum import Enum
from functools import partial
from types import TracebackType
from typing import Literal, Self

from async_cache.aio.home import Home
from async_cache.config import CacheConfig, prefixed
from async_cache.core import Core
from async_cache.errors import CacheClosedError, ConfigError
from async_cache.handles.events import EVENTS_CAPACITY, EventStream
from async_cache.handles.lease import ReadLease
from async_cache.handles.prefetch import Prefetch
from async_cache.handles.writer import Writer
from async_cache.l2.backend import Backend
from async_cache.l2.opening import open_all
from async_cache.l2.urls.registry import check_names, from_urls
from async_cache.memory.arena import Arena
from async_cache.memory.room import check_free
from async_cache.prompt.arguments import (
    check_capacity,
    check_prompt,
    check_request_id,
    check_seconds,
    check_tier,
    check_traceparent,
    ranks_of,
    start_of,
)
from async_cache.prompt.layout import Prompt
from async_cache.prompt.objects import PAGE_BYTES
from async_cache.tracing import Tracing
from async_cache.values import BackendStatus, CacheStats, Deleted, Explanation, FlushResult, LoadResult, LookupHits

log = logging.getLogger(__name__)

_POPULATE_BYTES = 64 * 2**20  # of the arena in one step
_PROGRESS_SECONDS = 2.0  # between two lines of the log on how far it is
_MAX_REQUEST_ID = 1024  # a server puts its tenant and namespace before a client's, which has up to 256


def _populate_step(arena: Arena, begin: int, end: int) -> None:
    """Fill a part. What is free is looked at once more: others take memory at the same time."""
    if begin:
        check_free(arena.size_bytes - begin)
    arena.populate(begin, end)


class CacheState(Enum):
    """NEW -> OPENING -> OPEN -> CLOSED; a cache that could not be opened is CLOSED."""

    NEW = "new"
    OPENING = "opening"
    OPEN = "open"
    CLOSED = "closed"


class AsyncCache:
    """The embedded cache, open by `async with`, or from `open` until `close`.

    `backends` are ready-made ones, the fastest first, in place of those that `config.l2` names. All methods are to be
    called from the loop that opened it.
    """

    def __init__(self, config: CacheConfig | None = None, backends: Iterable[Backend] | None = None):
        self._config = config if config is not None else CacheConfig()
        if not isinstance(self._config, CacheConfig):
            raise TypeError(f"config must be a CacheConfig, not {type(config).__name__}")
        made = from_urls(self._config.l2) if backends is None else list(backends)
        for backend in made:
            if not isinstance(backend, Backend):
                raise TypeError(f"a backend must be a Backend, not {type(backend).__name__}")
        check_names(made)
        self._backends = made
        self._from_config = backends is None
        self._core: Core | None = None
        self._state = CacheState.NEW
        self._closing: asyncio.Task[None] | None = None
        self._home: Home | None = None

    # Life.

    async def open(self) -> Self:
        """Make the arena, and open the backends.

        Raises ConfigError for memory or a backend that cannot be had as configured, BackendError for one that fails or
        does not open in time, and CacheClosedError where it was opened before.
        """
        if self._state is not CacheState.NEW:
            raise CacheClosedError("a cache is opened once")
        self._state, self._home = CacheState.OPENING, Home()
        try:
            core = await self._open()
        except BaseException:
            self._state = CacheState.CLOSED
            raise
        if self._state is CacheState.CLOSED:  # by `close`, meanwhile
            await core.close()
            raise CacheClosedError("the cache was closed")
        self._core, self._state = core, CacheState.OPEN
        return self

    async def _open(self) -> Core:
        tracing = Tracing() if self._config.traces else None
        arena = await self._make_arena()
        try:
            for backend in self._backends:
                backend.register(arena.fd, arena.view)
            with prefixed("l2") if self._from_config else nullcontext():
                await open_all(self._backends, self._config)
            arena.seal()  # not before: what is registered may have been mapped by a process of a backend
        except BaseException:
            arena.close()
            raise
        return Core(self._config, arena, self._backends, tracing)

    async def _make_arena(self) -> Arena:
        """L1's memory, all of it there. Raises ConfigError where the machine does not have so much."""
        size_bytes = self._config.l1_bytes // PAGE_BYTES * PAGE_BYTES
        await asyncio.to_thread(check_free, size_bytes)
        try:
            arena = Arena(size_bytes)
            try:
                await self._populate(arena)
            except BaseException:
                arena.close()
                raise
        except OSError as error:
            raise ConfigError(f"l1_bytes {self._config.l1_bytes}: {error.strerror}") from error
        return arena

    async def _populate(self, arena: Arena) -> None:
        """Fill the arena step by step, and log now and then how far it is."""
        clock = asyncio.get_running_loop().time
        told = clock()
        for begin in range(0, arena.size_bytes, _POPULATE_BYTES):
            end = min(begin + _POPULATE_BYTES, arena.size_bytes)
            await asyncio.to_thread(_populate_step, arena, begin, end)
            if clock() - told >= _PROGRESS_SECONDS:
                told = clock()
                log.info("L1: %d of %d MiB of memory are there", end >> 20, arena.size_bytes >> 20)

    async def close(self) -> None:
        """End all requests, write back what is pending (for `close_timeout_seconds`), close the backends; idempotent.

        Whoever waits for a future or a query gets CacheClosedError.
        """
        core, self._core = self._core, None
        self._state = CacheState.CLOSED
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
    def core(self) -> Core:
        """The parts of the open cache, for a server that serves it: nothing else is to touch them.

        Raises CacheClosedError, and RuntimeError in a loop that is not the one that opened it, or after a fork.
        """
        if self._core is None:
            closed = self._state is CacheState.CLOSED
            raise CacheClosedError("the cache is closed" if closed else "the cache is not open: use `async with`")
        if self._home is not None and self._home.is_elsewhere():
            raise self._home.refusal("cache")
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
        traceparent: str | None = None,
    ) -> Prefetch:
        """Look a prompt up and load what is cached of it; returns at once.

        `skip_tokens`: what the engine holds itself; its whole chunks are neither looked up nor counted.
        `ranks`: those to load here, all if None; the others are only checked for existence.
        `deadline_seconds` runs from this call.
        `traceparent`: the span that it belongs to, of the caller if None, where `traces` is set.
        Raises RequestConflictError if the id is in use for something else.
        """
        core = self.core
        check_prompt(prompt)
        if request_id is not None:
            check_request_id(request_id, _MAX_REQUEST_ID)
        check_seconds("deadline_seconds", deadline_seconds)
        check_traceparent(traceparent)
        if traceparent is None and core.tracing is not None:
            traceparent = core.tracing.here()
        start_chunk, here = start_of(prompt, skip_tokens), ranks_of(prompt, ranks)
        return core.controller.start(prompt, request_id, start_chunk, here, deadline_seconds, traceparent)

    async def lookup(self, prompt: Prompt) -> LookupHits:
        """Count how much of a prompt is cached now, without a lease, a load or a promise."""
        core = self.core
        check_prompt(prompt)
        return await core.count_hits(prompt)

    async def explain(self, prompt: Prompt) -> Explanation:
        """Say where each chunk of a prompt is, or why it is not there, and where else its tokens are cached.

        Nothing is leased or loaded for that, and what a backend pins to answer is unpinned before this returns.
        """
        core = self.core
        check_prompt(prompt)
        return await core.explainer.explain(prompt)

    async def query_lookup_hits(self, request_id: str) -> LookupHits:
        """Wait for the lookup of a request, and return its hits, to any number of callers.

        Raises UnknownRequestError if there is no such request, or its result was claimed.
        """
        return await self.core.requests.query_lookup_hits(check_request_id(request_id, _MAX_REQUEST_ID))

    async def query_status(self, request_id: str) -> LoadResult:
        """Wait for the load of a request, and claim its result, which is handed out exactly once.

        Raises UnknownRequestError if there is no such request, or another caller has claimed it.
        """
        return await self.core.requests.query_status(check_request_id(request_id, _MAX_REQUEST_ID))

    async def renew(self, request_id: str) -> None:
        """Begin the time to live of a request's result or leases anew. Raises UnknownRequestError."""
        self.core.requests.renew(check_request_id(request_id, _MAX_REQUEST_ID))

    async def end_request(self, request_id: str) -> None:
        """Release all that a request holds, cancel it if it runs, and free its id. Unknown ids are fine."""
        core = self.core
        core.requests.end(check_request_id(request_id, _MAX_REQUEST_ID))
        for backlog in core.l1.backlogs:
            await backlog.done()

    # Reading and writing.

    def read(self, request_id: str, *, rank: int = 0, reader: int = 0) -> ReadLease:
        """Read what a request has loaded: `async with` the lease, or `await` it. It waits for the load.

        `rank` is the KV shard to read, `reader` the number of this reader among the `readers_per_rank`. Entering raises
        UnknownRequestError, ReadConflictError for a second time, and ValueError for a rank or reader that the request
        does not have.
        """
        core = self.core
        return ReadLease(partial(core.requests.enter, check_request_id(request_id, _MAX_REQUEST_ID), rank, reader))

    def store(self, prompt: Prompt, *, rank: int = 0, start_chunk: int = 0) -> Writer:
        """Write a rank's chunks from `start_chunk` on, those that L1 lacks: `async with` the writer, or `await` it."""
        core = self.core
        check_prompt(prompt)
        return core.writing.writer(prompt, rank, start_chunk)

    async def flush(self, deadline_seconds: float | None = None) -> FlushResult:
        """Wait until what was committed before is in L2, or `deadline_seconds` are over.

        Returns the chunks that were written or dropped since the last flush, and those that are still pending.
        """
        core = self.core
        check_seconds("deadline_seconds", deadline_seconds)
        return await core.writeback.flush(deadline_seconds)

    # Removing.

    async def delete(self, prompt: Prompt) -> Deleted:
        """Remove every chunk of a prompt from both tiers; those that are leased leave memory with their release.

        Raises BackendError where a backend could not do it, after all others have.
        """
        core = self.core
        check_prompt(prompt)
        return await core.remover.delete(prompt)

    async def clear(self, tier: Literal["l1", "all"] = "l1") -> Deleted:
        """Empty L1 of all that L2 has ("l1"), or both tiers ("all"). Raises BackendError where a backend could not."""
        check_tier(tier)
        return await self.core.remover.clear(tier)

    # Backends, while it is open.

    async def add_backend(self, url_or_backend: str | Backend, *, position: int | None = None) -> None:
        """Open one more backend, and use it from then on: as the slowest, or before the one at a position.

        Raises ConfigError for a URL or a name that cannot be, ValueError for a position that there is not, and
        BackendError for a backend that fails or does not open in time.
        """
        core = self.core
        if not isinstance(url_or_backend, str | Backend):
            raise TypeError(f"a backend must be a URL or a Backend, not {type(url_or_backend).__name__}")
        await core.backends.add(url_or_backend, position)

    async def drain_backend(self, name: str, *, deadline_seconds: float | None = None) -> BackendStatus:
        """Write nothing new to a backend, and copy what only it has to the others that are written to.

        Returns when that is done, or `deadline_seconds` are over: it goes on then, and may be waited for again. Its
        state is DRAINED when it is done; where objects `failed`, it may be begun again. Raises ConfigError for a name
        that there is not, and BackendError where the copying cannot go on.
        """
        core = self.core
        check_seconds("deadline_seconds", deadline_seconds)
        return await core.backends.drain(name, deadline_seconds)

    async def remove_backend(self, name: str) -> None:
        """Ask a backend no more, wait for the loads that it was promised for, and close it.

        What only it has is not found any more, unless it was drained before. Raises ConfigError for a name that there
        is not.
        """
        await self.core.backends.remove(name)

    async def backends(self) -> list[BackendStatus]:
        """The backends that there are now, the fastest first, and behind them those that are being removed."""
        return self.core.backends.statuses()

    # Looking at it.

    def events(self, capacity: int = EVENTS_CAPACITY) -> EventStream:
        """What is stored and removed from now on, in order, to iterate over with `async for`.

        A reader that leaves more than `capacity` events untaken misses some, and finds a `Skipped` there. Raises
        CacheClosedError when the cache closes. It ends with `aclose`, or with the last reference to it.
        """
        return self.core.events.stream(check_capacity(capacity))

    async def stats(self) -> CacheStats:
        """Count what the cache holds now, and what it did since it was opened."""
        core = self.core
        for backlog in core.l1.backlogs:  # what was released before is not held any more
            await backlog.done()
        return core.stats()

    @property
    def memory(self) -> memoryview:
        """The memory of L1, fixed while the cache is open, to register with a GPU or NIC; only writers write to it."""
        return memoryview(self.core.arena.view)

    def check_integrity(self) -> None:
        """Assert that the records of the cache do not contradict each other."""
        self.core.check_integrity()

    def __repr__(self) -> str:
        return f"<AsyncCache, {self._state.value}, {self._config.l1_bytes} bytes of L1>"
