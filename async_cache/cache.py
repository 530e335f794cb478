"""`AsyncCache`: owns the tiers, the tasks and the sweepers of one process, and delegates the rest."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Literal, Self, cast

from async_cache.aio.life import Life
from async_cache.config import CacheConfig, prefixed
from async_cache.core import Core, open_core
from async_cache.handles.events import EVENTS_CAPACITY, EventStream
from async_cache.handles.lease import ReadLease
from async_cache.handles.prefetch import Prefetch, SegmentPrefetch
from async_cache.handles.stream import ReadStream
from async_cache.handles.writer import Writer
from async_cache.l2.backend import Backend
from async_cache.l2.urls.registry import check_names, from_urls
from async_cache.prompt.arguments import (
    MAX_REQUEST_ID,
    check_capacity,
    check_hint,
    check_prompt,
    check_request_id,
    check_seconds,
    check_tier,
    check_tokens,
    check_ttl,
    parts_of,
    selection_of,
    wanted,
)
from async_cache.prompt.layout import Prompt
from async_cache.values import (
    BackendStatus,
    CacheStats,
    Deleted,
    DeletedModel,
    Explanation,
    FlushResult,
    LoadResult,
    LookupHits,
    Retained,
    SegmentHits,
)


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
        told = prefixed("l2") if backends is None else nullcontext()
        self._life = Life(partial(open_core, self._config, made, told), Core.close, "cache")
        self._opened = self._life.opened

    # Life.

    async def open(self) -> Self:
        """Make the arena, and open the backends.

        Raises ConfigError for memory or a backend that cannot be had as configured, BackendError for one that fails or
        does not open in time, and CacheClosedError where it was opened before.
        """
        await self._life.open()
        return self

    async def close(self) -> None:
        """End all requests, write back what is pending (for `close_timeout_seconds`), close the backends; idempotent.

        Whoever waits for a future or a query gets CacheClosedError, and so does who opens it meanwhile. Raises
        RuntimeError in a loop that is not the one that opened it, or after a fork: nothing is changed then.
        """
        await self._life.close()

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
        return self._opened()

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
        wait_for_writers_seconds: float | None = None,
    ) -> Prefetch:
        """Look a prompt up and load what is cached of it; returns at once.

        `skip_tokens`: what the engine holds itself; its whole chunks are neither looked up nor counted.
        `ranks`: those to load here, all if None; the others are only checked for existence.
        `deadline_seconds` runs from this call.
        `traceparent`: the span that it belongs to, of the caller if None, where `traces` is set.
        `wait_for_writers_seconds`: how long the lookup waits for chunks of the prompt that writers have announced, by
        opening, and not committed or given up yet; it waits for no others, and counts what is there in the end.
        Raises RequestConflictError if the id is in use for something else.
        """
        return self._opened().start(
            wanted(
                prompt,
                request_id=request_id,
                skip_tokens=skip_tokens,
                ranks=ranks,
                deadline_seconds=deadline_seconds,
                traceparent=traceparent,
                wait_for_writers_seconds=wait_for_writers_seconds,
            )
        )

    async def lookup(self, prompt: Prompt) -> LookupHits:
        """Count how much of a prompt is cached now, without a lease, a load or a promise."""
        core = self._opened()
        check_prompt(prompt)
        return await core.count_hits(prompt)

    def prefetch_segments(
        self,
        parts: Sequence[Prompt],
        *,
        request_id: str | None = None,
        ranks: Sequence[int] | None = None,
        deadline_seconds: float | None = None,
        traceparent: str | None = None,
    ) -> SegmentPrefetch:
        """Look up to 256 prompts or segments up, of one layout and salt, and load what is cached of each; one request.

        A prefix of each part is promised, and room goes to earlier parts first. They are claimed, read and ended
        together; what parts have in common is loaded and kept once. Otherwise as `prefetch`.
        """
        begun = self._opened().start(
            wanted(
                parts_of(parts),
                request_id=request_id,
                ranks=ranks,
                deadline_seconds=deadline_seconds,
                traceparent=traceparent,
            )
        )
        return cast(SegmentPrefetch, begun)

    async def lookup_segments(self, parts: Sequence[Prompt]) -> SegmentHits:
        """Count how much of each of up to 256 prompts or segments is cached now, as `lookup` does of one."""
        return cast(SegmentHits, await self._opened().count_hits(parts_of(parts)))

    async def explain(self, prompt: Prompt) -> Explanation:
        """Say where each chunk of a prompt is, or why it is not there, and where else its tokens are cached.

        Nothing is leased or loaded for that, and what a backend pins to answer is unpinned before this returns.
        """
        core = self._opened()
        check_prompt(prompt)
        return await core.explainer.explain(prompt)

    async def query_lookup_hits(self, request_id: str) -> LookupHits:
        """Wait for the lookup of a request, and return its hits, to any number of callers.

        Raises UnknownRequestError if there is no such request, or its result was claimed.
        """
        return await self._opened().requests.query_lookup_hits(check_request_id(request_id, MAX_REQUEST_ID))

    async def query_status(self, request_id: str) -> LoadResult:
        """Wait for the load of a request, and claim its result, which is handed out exactly once.

        Raises UnknownRequestError if there is no such request, or another caller has claimed it.
        """
        return await self._opened().requests.query_status(check_request_id(request_id, MAX_REQUEST_ID))

    async def renew(self, request_id: str) -> None:
        """Begin the time to live of a request's result or leases anew. Raises UnknownRequestError."""
        self._opened().requests.renew(check_request_id(request_id, MAX_REQUEST_ID))

    async def end_request(self, request_id: str) -> None:
        """Release all that a request holds, cancel it if it runs, and free its id. Unknown ids are fine."""
        core = self._opened()
        core.requests.end(check_request_id(request_id, MAX_REQUEST_ID))
        if any(core.l1.rooms.waiting):
            await core.l1.rooms.caught_up()

    # Reading and writing.

    def read(self, request_id: str, *, rank: int = 0, reader: int = 0) -> ReadLease:
        """Read what a request has loaded: `async with` the lease, or `await` it. It waits for the load.

        `rank` is the KV shard to read, `reader` the number of this reader among the `readers_per_rank`. Entering raises
        UnknownRequestError, ReadConflictError for a second time, and ValueError for a rank or reader that the request
        does not have.
        """
        core = self._opened()
        return ReadLease(partial(core.requests.enter, check_request_id(request_id, MAX_REQUEST_ID), rank, reader))

    def stream(self, request_id: str, *, rank: int = 0, reader: int = 0) -> ReadStream:
        """Read what a request is loading, as `read` does, but chunk by chunk, each as soon as it is in memory.

        Entering waits for the lookup only; it raises as that of `read`. To leave before the load has ended is to leave
        as a reader does: where all others have left, too, that ends the request, and what is on its way for it.
        """
        core = self._opened()
        return ReadStream(partial(core.streams.enter, check_request_id(request_id, MAX_REQUEST_ID), rank, reader))

    def store(self, prompt: Prompt, *, rank: int = 0, start_chunk: int = 0) -> Writer:
        """Write a rank's chunks from `start_chunk` on, those that L1 lacks: `async with` the writer, or `await` it."""
        core = self._opened()
        check_prompt(prompt)
        return core.writing.writer(prompt, rank, start_chunk)

    async def flush(self, deadline_seconds: float | None = None) -> FlushResult:
        """Wait until what was committed before is in L2, or `deadline_seconds` are over.

        Returns the chunks that were written or dropped since the last flush, and those that are still pending.
        """
        core = self._opened()
        check_seconds("deadline_seconds", deadline_seconds)
        return await core.writeback.flush(deadline_seconds)

    # Keeping.

    async def retain(self, prompt: Prompt, *, tokens: int | None = None, ttl_seconds: float = 300.0) -> Retained:
        """Keep the first `tokens` of a prompt, all if None, for so long, and say how many that will be.

        Whole chunks that are in the cache are kept, wherever they are, as far as the share of the prompt's salt allows:
        `clipped` says why it is less than was asked for. They are not evicted before their time, nor after a restart
        where their tier outlives that. A second call for the same prompt renews or changes what the first has kept, and
        0 seconds end it; so does a deletion.
        """
        core = self._opened()
        check_prompt(prompt)
        check_tokens(prompt, tokens)
        return await core.retentions.retain(prompt, tokens, check_ttl(ttl_seconds))

    async def retained(self) -> list[Retained]:
        """What is retained now, the first to expire first."""
        return await self._opened().retentions.retained()

    async def warm(self, prompt: Prompt, *, deadline_seconds: float | None = None) -> LoadResult:
        """Load what is cached of a prompt into L1, and let go of it: the next request for it finds it there.

        Whoever is cancelled while it waits cancels the load, unless others wait for it, too.
        """
        core = self._opened()
        return await core.warm(core.start(wanted(prompt, deadline_seconds=deadline_seconds)))

    async def hint(
        self,
        prompt: Prompt,
        *,
        output_tokens: int | None = None,
        returns: bool | None = None,
        within_seconds: float | None = None,
    ) -> None:
        """Say what an engine knows of the future of a prompt that it has asked for: the policy may make use of that.

        `output_tokens`: how much was generated behind it. `returns`: whether it will be asked for again (False: the
        session has ended), and `within_seconds`, how soon (a tool call is pending). It promises nothing.
        """
        core = self._opened()
        check_prompt(prompt)
        check_hint(output_tokens, returns, within_seconds)
        await core.hashed(prompt)
        core.l1.hint(prompt, output_tokens, returns, within_seconds)
        for guard in core.guards.current:
            guard.hint(prompt, output_tokens, returns, within_seconds)
        for note in core.observers.hinting:
            note(prompt, output_tokens, returns, within_seconds)

    # Removing.

    async def delete(self, prompt: Prompt) -> Deleted:
        """Remove every chunk of a prompt from both tiers; those that are leased leave memory with their release.

        Raises BackendError where a backend could not do it, after all others have.
        """
        core = self._opened()
        check_prompt(prompt)
        return await core.remover.delete(prompt)

    async def delete_model(
        self, model: str, *, revision: str | None = None, adapter: str | None = None, salt: str | None = None
    ) -> DeletedModel:
        """Remove every chunk of a model from both tiers; where these are given, of one revision, adapter or salt only.

        The revision or adapter "" is that of prompts which name none. What is in flight of it does not come back; what
        is committed after this call is kept. Some backends do not know what their objects are of: of these, what other
        tiers know is removed, and `unsure` names them. Raises BackendError as `delete` does.
        """
        return await self._opened().remover.delete_model(selection_of(model, revision, adapter, salt))

    async def clear(self, tier: Literal["l1", "all"] = "l1") -> Deleted:
        """Empty L1 of all that does not wait to be written to L2 ("l1"), or both tiers ("all").

        What no backend takes waits for none: without L2, "l1" removes all that there is. Raises BackendError where a
        backend could not.
        """
        check_tier(tier)
        return await self._opened().remover.clear(tier)

    # Backends, while it is open.

    async def add_backend(self, url_or_backend: str | Backend, *, position: int | None = None) -> None:
        """Open one more backend, and use it from then on: as the slowest, or before the one at a position.

        Raises ConfigError for a URL or a name that cannot be, ValueError for a position that there is not, and
        BackendError for a backend that fails or does not open in time.
        """
        core = self._opened()
        if not isinstance(url_or_backend, str | Backend):
            raise TypeError(f"a backend must be a URL or a Backend, not {type(url_or_backend).__name__}")
        await core.backends.add(url_or_backend, position)

    async def drain_backend(self, name: str, *, deadline_seconds: float | None = None) -> BackendStatus:
        """Write nothing new to a backend, and copy what only it has to the others that are written to.

        Returns when that is done, or `deadline_seconds` are over: it goes on then, and may be waited for again. Its
        state is DRAINED when it is done; where objects `failed`, it may be begun again. Raises ConfigError for a name
        that there is not, and BackendError where the copying cannot go on.
        """
        core = self._opened()
        check_seconds("deadline_seconds", deadline_seconds)
        return await core.backends.drain(name, deadline_seconds)

    async def remove_backend(self, name: str) -> None:
        """Ask a backend no more, wait for the loads that it was promised for, and close it.

        What only it has is not found any more, unless it was drained before. Raises ConfigError for a name that there
        is not.
        """
        await self._opened().backends.remove(name)

    async def backends(self) -> list[BackendStatus]:
        """The backends that there are now, the fastest first, and behind them those that are being removed."""
        return self._opened().backends.statuses()

    # Looking at it.

    def events(self, capacity: int = EVENTS_CAPACITY) -> EventStream:
        """What is stored and removed from now on, in order, to iterate over with `async for`.

        A reader that leaves more than `capacity` events untaken misses some, and finds a `Skipped` there. Raises
        CacheClosedError when the cache closes. It ends with `aclose`, or with the last reference to it.
        """
        return self._opened().events.stream(check_capacity(capacity))

    async def stats(self) -> CacheStats:
        """Count what the cache holds now, and what it did since it was opened."""
        core = self._opened()
        await core.l1.rooms.caught_up()  # what was released before is not held any more
        return core.stats()

    @property
    def memory(self) -> memoryview:
        """The memory of L1, fixed while the cache is open, to register with a GPU or NIC; only writers write to it."""
        return memoryview(self._opened().arena.view)

    def check_integrity(self) -> None:
        """Assert that the records of the cache do not contradict each other."""
        self._opened().check_integrity()

    def __repr__(self) -> str:
        return f"<AsyncCache, {self._life.state.value}, {self._config.l1_bytes} bytes of L1>"
