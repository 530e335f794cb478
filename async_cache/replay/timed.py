"""A trace against a server that runs, with real bytes, at the trace's own pace or a multiple of it."""

import asyncio
import os
from array import array
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from heapq import merge
from operator import attrgetter
from typing import TypeVar

from msgspec import Struct, field

from async_cache.aio.clock import precise_clock
from async_cache.client.client import CacheClient
from async_cache.errors import AsyncCacheError, ConnectionLostError, ServiceError
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.prompt.objects import ObjectGroup
from async_cache.recording.trace import Trace, TracedHint, TracedRequest

MODEL = "async-cache replay"
MARK_BYTES = 32
"""What tells a chunk from others, at both of its ends: its hash."""
_FILLED_AT_ONCE = 2**20  # bytes: more are written by a thread, while the loop goes on
_CLEAN_SECONDS = 60.0
Event = TracedRequest | TracedHint
E = TypeVar("E", TracedRequest, TracedHint)


def _seconds() -> "array[float]":
    return array("d")


class Timed(Struct):
    """What was measured so far: seconds, one of each request, and tokens."""

    lookup: "array[float]" = field(default_factory=_seconds)
    """From the request to `lookup_done`."""
    load: "array[float]" = field(default_factory=_seconds)
    """From the request to `load_done`, of those that had something to load."""
    store: "array[float]" = field(default_factory=_seconds)
    """To store what was not found, of those that had something to store."""
    behind: "array[float]" = field(default_factory=_seconds)
    """How late a request began, since too many were under way."""
    asked_tokens: int = 0
    l1_tokens: int = 0
    l2_tokens: int = 0
    broken: int = 0
    """Requests that got less than they were promised."""
    damaged: int = 0
    """Chunks that were read and are not what was written."""
    not_stored: int = 0
    """Requests of which the server had no room for all."""
    failed: int = 0
    """Requests that raised an error, ..."""
    error: str = ""
    """... the first of these."""


class TimedReplay:
    """Asks a server for every prompt of a trace when its time has come, reads it, and stores what was not found.

    Of a time that has passed while `most_at_once` were under way, a request begins as soon as one of them is done. No
    engine is simulated: what was not found is stored at once. What it stores is of a revision of its own, which is
    removed in the end; so two replays find nothing of each other, nor of anything else.
    """

    def __init__(
        self,
        client: CacheClient,
        trace: Trace,
        bytes_per_token: int,
        *,
        pace: float = 1.0,
        most_at_once: int = 64,
        salt: str = "",
        outputs: bool = True,
        on_request: Callable[[], None] = lambda: None,
    ):
        self.timed = Timed()
        self._client, self._trace, self._pace, self._salt, self._outputs = client, trace, pace, salt, outputs
        self._on_request = on_request
        self._free = asyncio.Semaphore(most_at_once)
        self._clock = precise_clock(asyncio.get_running_loop())
        self._revision = os.urandom(8).hex()
        events: list[Event] = [*trace.requests, *trace.hints]
        sizes = {event.chunk_tokens for event in events}
        self._layouts = {
            tokens: ModelLayout(
                MODEL,
                (ObjectGroup((tokens * bytes_per_token,), "uint8"),),
                chunk_tokens=tokens,
                revision=self._revision,
            )
            for tokens in sizes
        }
        self._bodies = {
            tokens: os.urandom(tokens * bytes_per_token) for tokens in sizes
        }  # which no codec makes shorter

    async def run(self) -> None:
        """Replay all of it. What was stored is removed, also where this is cancelled. Raises ConnectionLostError."""
        try:
            async with asyncio.TaskGroup() as group:
                await self._drive(group)
        except ExceptionGroup as raised:
            if isinstance(error := raised.exceptions[0], ConnectionLostError):
                raise error from None
            raise
        finally:
            with suppress(ConnectionLostError):  # who is gone has nothing to remove
                self._client.check_connected()
                await self._clean()

    async def _clean(self) -> None:
        try:
            async with asyncio.timeout(_CLEAN_SECONDS):
                await self._client.delete_model(MODEL, revision=self._revision)
        except TimeoutError as error:
            seconds = f"{_CLEAN_SECONDS:g} s"
            raise ServiceError(f"what the replay has stored was not removed within {seconds}") from error

    async def _drive(self, group: asyncio.TaskGroup) -> None:
        both: tuple[list[TracedRequest], list[TracedHint]] = self._trace.requests, self._trace.hints
        events: Iterable[Event] = merge(*both, key=attrgetter("at_seconds"))
        begin, first = self._clock(), None
        for event in events:
            first = event.at_seconds if first is None else first
            due = begin + (event.at_seconds - first) / self._pace
            await asyncio.sleep(due - self._clock())
            await self._free.acquire()
            if isinstance(event, TracedRequest):
                self.timed.behind.append(max(0.0, self._clock() - due))
                group.create_task(self._counted(self._request, event))
            else:
                group.create_task(self._counted(self._hint, event))

    async def _counted(self, work: Callable[[E], Awaitable[None]], event: E) -> None:
        try:
            await work(event)
        except ConnectionLostError:
            raise
        except AsyncCacheError as error:
            self.timed.failed += 1
            self.timed.error = self.timed.error or str(error)
        finally:
            self._free.release()

    def _prompt(self, event: Event) -> Prompt:
        whole = event.path[: event.tokens // event.chunk_tokens]
        return self._layouts[event.chunk_tokens].prompt_from_hashes(whole, event.chunk_tokens, salt=self._salt)

    async def _hint(self, event: TracedHint) -> None:
        hint = event.hint
        output_tokens = hint.output_tokens if self._outputs else None
        await self._client.hint(
            self._prompt(event),
            output_tokens=output_tokens,
            returns=hint.returns,
            within_seconds=hint.within_seconds,
        )

    async def _request(self, request: TracedRequest) -> None:
        prompt, timed, clock = self._prompt(request), self.timed, self._clock
        self._client.check_connected()
        began = clock()
        prefetch = self._client.prefetch(prompt)
        hits = await prefetch.lookup_done
        timed.lookup.append(clock() - began)
        result = await prefetch.load_done
        if hits.l2_chunks:
            timed.load.append(clock() - began)
        timed.asked_tokens += request.tokens
        timed.l1_tokens += hits.l1_chunks * request.chunk_tokens
        timed.l2_tokens += hits.l2_chunks * request.chunk_tokens
        timed.broken += result.chunks < hits.chunks
        if result.chunks:
            await self._read(prefetch.request_id, prompt)
        await self._client.end_request(prefetch.request_id)
        if result.chunks < len(prompt):
            await self._store(prompt, result.chunks)
        if self._outputs and request.output_tokens is not None:
            await self._client.hint(prompt, output_tokens=request.output_tokens)
        self._on_request()

    async def _read(self, request_id: str, prompt: Prompt) -> None:
        async with self._client.read(request_id) as lease:
            for chunk in lease:
                view, mark = chunk.views[0], prompt.chunk_hashes[chunk.index]
                assert view is not None
                end = _end(view)
                self.timed.damaged += view[:MARK_BYTES] != mark[: len(view)] or view[end:] != mark[: len(view) - end]

    async def _store(self, prompt: Prompt, start_chunk: int) -> None:
        began = self._clock()
        body = self._bodies[prompt.layout.chunk_tokens]
        async with self._client.store(prompt, start_chunk=start_chunk) as writer:
            for chunk in writer:
                view, mark = chunk.views[0], prompt.chunk_hashes[chunk.index]
                assert view is not None
                if len(view) > _FILLED_AT_ONCE:
                    await asyncio.to_thread(_fill, view, body, mark)
                else:
                    _fill(view, body, mark)
                chunk.commit()
            self.timed.not_stored += writer.shortfall is not None
        self.timed.store.append(self._clock() - began)


def _fill(view: memoryview, body: bytes, mark: bytes) -> None:
    """Write all bytes of a chunk, and the mark at both ends."""
    end = _end(view)
    view[:] = body
    view[:MARK_BYTES] = mark[: len(view)]
    view[end:] = mark[: len(view) - end]


def _end(view: memoryview) -> int:
    """Where the last mark begins."""
    return (len(view) - 1) // MARK_BYTES * MARK_BYTES
