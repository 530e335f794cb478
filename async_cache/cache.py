"""`AsyncCache`: owns the tiers, the tasks and the sweepers of one process, and delegates the rest."""

import asyncio
from collections.abc import Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Literal, Self

from async_cache.config import CacheConfig
from async_cache.core import Core
from async_cache.errors import BackendError, CacheClosedError, ConfigError
from async_cache.handles.lease import ReadLease
from async_cache.handles.prefetch import Prefetch
from async_cache.l2.backend import Backend
from async_cache.l2.registry import from_url
from async_cache.memory.arena import Arena
from async_cache.prompt.arguments import check_prompt, check_request_id, check_seconds, check_tier, ranks_of, start_of
from async_cache.prompt.layout import Prompt, check_index
from async_cache.prompt.objects import PAGE_BYTES
from async_cache.values import CacheStats, Deleted, FlushResult, LoadResult, LookupHits
from async_cache.write.writer import Writer

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
        self._core: Core | None = None
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
        self._core = Core(self._config, arena, self._backends)
        return self

    async def _open_backends(self) -> None:
        openings: dict[Backend, asyncio.Task[None]] = {}
        try:
            for backend in self._backends:
                timeout = backend.limits.load_timeout_seconds or self._config.load_timeout_seconds
                openings[backend] = opening = asyncio.create_task(backend.open())
                await asyncio.wait((opening,), timeout=timeout)
                if not opening.done():
                    raise BackendError(f"{backend.name} was not open within {timeout} s")
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
    def core(self) -> Core:
        """Its parts, for a server that serves it: nothing else is to touch them. Raises CacheClosedError."""
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
        core = self.core
        check_prompt(prompt)
        if request_id is not None:
            check_request_id(request_id, _MAX_REQUEST_ID)
        check_seconds("deadline_seconds", deadline_seconds)
        start_chunk, here = start_of(prompt, skip_tokens), ranks_of(prompt, ranks)
        return core.controller.start(prompt, request_id, start_chunk, here, deadline_seconds)

    async def lookup(self, prompt: Prompt) -> LookupHits:
        """How much of a prompt is cached now: no lease, no load, no promise."""
        core = self.core
        check_prompt(prompt)
        return await core.count_hits(prompt)

    async def query_lookup_hits(self, request_id: str) -> LookupHits:
        """Await `lookup_done`; by any number of callers, any number of times. Raises UnknownRequestError."""
        return await self.core.controller.query_lookup_hits(check_request_id(request_id, _MAX_REQUEST_ID))

    async def query_status(self, request_id: str) -> LoadResult:
        """Await `load_done` and claim the result, which is handed out once. Raises UnknownRequestError."""
        return await self.core.controller.query_status(check_request_id(request_id, _MAX_REQUEST_ID))

    async def renew(self, request_id: str) -> None:
        """Let the request's time begin anew. Raises UnknownRequestError."""
        self.core.controller.renew(check_request_id(request_id, _MAX_REQUEST_ID))

    async def end_request(self, request_id: str) -> None:
        """Give back all that the request holds; cancels it if it runs. Unknown ids are fine."""
        self.core.controller.end(check_request_id(request_id, _MAX_REQUEST_ID))

    # Reading and writing.

    def read(self, request_id: str, *, rank: int = 0, reader: int = 0) -> ReadLease:
        """Read what was loaded: `async with` the lease, or `await` it. It waits for the load and claims nothing.

        Entering raises UnknownRequestError, ReadConflictError for a second time, ValueError for a rank or reader that
        the request has not.
        """
        core = self.core
        return ReadLease(partial(core.enter_read, check_request_id(request_id, _MAX_REQUEST_ID), rank, reader))

    def store(self, prompt: Prompt, *, rank: int = 0, start_chunk: int = 0) -> Writer:
        """Write a rank's chunks from `start_chunk` on, those that L1 lacks: `async with` the writer, or `await` it."""
        core = self.core
        check_prompt(prompt)
        check_index("rank", rank, prompt.layout.world_size)
        check_index("start_chunk", start_chunk, len(prompt) + 1)
        return Writer(core.l1, core.writeback, core.open_writers, prompt, rank, start_chunk)

    async def flush(self, deadline_seconds: float | None = None) -> FlushResult:
        """Wait until what was committed is in L2. Counts what was written or dropped since the last flush."""
        core = self.core
        check_seconds("deadline_seconds", deadline_seconds)
        return await core.writeback.flush(deadline_seconds)

    # Removing.

    async def delete(self, prompt: Prompt) -> Deleted:
        """Remove every chunk of a prompt from both tiers. Raises BackendError where a backend could not."""
        core = self.core
        check_prompt(prompt)
        return await core.remover.delete(prompt)

    async def clear(self, tier: Literal["l1", "all"] = "l1") -> Deleted:
        """Empty L1 of what L2 has ("l1"), or both tiers ("all")."""
        check_tier(tier)
        return await self.core.remover.clear(tier)

    # Looking at it.

    async def stats(self) -> CacheStats:
        """A snapshot of what is held, and counters since it was opened."""
        return self.core.stats()

    @property
    def memory(self) -> memoryview:
        """The arena, fixed while the cache is open, to register with a GPU or NIC. Not to be written to elsewhere."""
        return memoryview(self.core.arena.view)

    def check_integrity(self) -> None:
        """Raises AssertionError if the records of the cache contradict each other."""
        self.core.check_integrity()
