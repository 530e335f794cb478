"""`CacheClient`: the cache that a server keeps, over one connection after the other."""

import itertools
import secrets
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from async_cache.aio.worker import Worker
from async_cache.client.calls import LEFT, OPEN, PrefetchCall
from async_cache.client.link import Link
from async_cache.client.links import Dial, Links
from async_cache.client.operations import Operations
from async_cache.client.reading import Reads
from async_cache.client.writing import Post, call_now, open_chunks
from async_cache.errors import AccessDeniedError, RequestConflictError
from async_cache.handles.lease import ReadLease
from async_cache.handles.prefetch import Prefetch, SegmentPrefetch
from async_cache.handles.stream import ReadStream
from async_cache.handles.writer import Opened, Writer
from async_cache.prompt.arguments import (
    MAX_CLIENT_REQUEST_ID,
    Wanted,
    check_hint,
    check_prompt,
    check_request_id,
    check_seconds,
    check_tokens,
    check_ttl,
    parts_of,
    wanted,
)
from async_cache.prompt.layout import Prompt, check_index
from async_cache.protocol import messages
from async_cache.protocol.parts import join_hits
from async_cache.values import (
    Deleted,
    Explanation,
    LoadResult,
    LookupHits,
    Retained,
    SegmentHits,
)

CONNECT_TIMEOUT_SECONDS = 2.0
HEARTBEAT_SECONDS = 10.0

A = TypeVar("A")


class CacheClient(Operations):
    """The cache of a server, with the members of `AsyncCache`; `connect` makes one.

    NEW -> OPEN -> CLOSED, by `async with` or by `open` and `close`. While it is open it reconnects by itself. What was
    held over a connection that is lost is gone: pending futures and calls get ConnectionLostError, and so does a
    prefetch until there is a new one. Other calls wait for the next attempt, and raise what it fails with.

    All calls that ask the server may raise ConnectionLostError; before `open` and after `close` all raise
    CacheClosedError. A conflict with a request of another client reaches the two futures of a prefetch. All methods are
    to be called from the loop that opened it.
    """

    def __init__(
        self,
        dial: Dial,
        *,
        connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
        heartbeat_seconds: float | None = None,
        post: Post = call_now,
    ):
        super().__init__(
            Links(dial, connect_timeout_seconds=connect_timeout_seconds, heartbeat_seconds=heartbeat_seconds)
        )
        self._hashing = Worker("async_cache hashing")
        self._post = post
        self._reads = Reads(self._links, post)
        self._name = secrets.token_hex(8)
        self._ids = itertools.count(1)

    # Life.

    async def open(self) -> Self:
        """Connect. Raises ConnectionLostError if there is no server, AccessDeniedError if it wants another token."""
        await self._links.open()
        return self

    async def close(self) -> None:
        """Wait for what was committed, and close; idempotent. The server takes back what is held.

        Tasks that wait for a future or a query get CacheClosedError.
        """
        await self._links.close()
        self._hashing.close()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask_of(
        self,
        answer: type[A],
        make: Callable[[int, messages.WirePrompt], Any],
        prompt: Prompt,
        newer: type[messages.Message] | None = None,
    ) -> A:
        """Ask about a prompt; what is `newer`, not every server of this version knows."""
        link = self._links.here() or await self._links.ready()
        if newer is not None:
            link.check_knows(newer)
        wire = await link.pack_hashed(prompt, self._hashing)
        return await link.ask(answer, make(link.next_number(), wire))

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
        """Look a prompt up and load what is cached of it; returns at once. The arguments are those of `AsyncCache`.

        `deadline_seconds` runs from the moment when the server has the call. Raises RequestConflictError if this client
        uses the id for something else, and ServiceError where the server is too old to wait for writers; without a
        connection, the futures have ConnectionLostError.
        """
        link = self._links.here()
        return self._begin(
            link,
            wanted(
                prompt,
                longest_id=MAX_CLIENT_REQUEST_ID,
                request_id=request_id,
                skip_tokens=skip_tokens,
                ranks=ranks,
                deadline_seconds=deadline_seconds,
                traceparent=traceparent,
                wait_for_writers_seconds=wait_for_writers_seconds,
            ),
        )

    def prefetch_segments(
        self,
        parts: Sequence[Prompt],
        *,
        request_id: str | None = None,
        ranks: Sequence[int] | None = None,
        deadline_seconds: float | None = None,
        traceparent: str | None = None,
    ) -> SegmentPrefetch:
        """Look up to 256 prompts or segments of one layout and salt up as one request, and load what is cached of each.

        Raises as `prefetch`, and ServiceError for a server that is older.
        """
        link = self._links.here()
        begun = self._begin(
            link,
            wanted(
                parts_of(parts),
                longest_id=MAX_CLIENT_REQUEST_ID,
                request_id=request_id,
                ranks=ranks,
                deadline_seconds=deadline_seconds,
                traceparent=traceparent,
            ),
        )
        return cast(SegmentPrefetch, begun)

    def begin(self, asked: Wanted) -> Prefetch:
        """Begin a request for what was checked already."""
        return self._begin(self._links.here(), asked)

    def _begin(self, link: Link | None, asked: Wanted) -> Prefetch:
        """Begin a request, or return that which this client has under this id, if it asks for the same."""
        request_id = asked.request_id if asked.request_id is not None else self.new_request_id()
        known = link.requests.get(request_id) if link is not None else None
        if known is not None and known.state is not LEFT:
            same = known.asks_for(asked.asked, asked.start_chunk, asked.ranks)
            if same and known.state is OPEN:
                return known.prefetch
            raise RequestConflictError(f"request {request_id!r} is in use{'' if same else ' for another prompt'}")
        call = PrefetchCall(link, request_id, asked.asked, asked.start_chunk, asked.ranks)
        if link is None:
            call.lost(self._links.error)
        else:
            link.prefetch(call, asked.deadline_seconds, asked.traceparent, asked.wait_for_writers_seconds)
        return call.prefetch

    def new_request_id(self) -> str:
        """A request id that nobody has used."""
        return f"{self._name}-{next(self._ids)}"

    async def lookup(self, prompt: Prompt) -> LookupHits:
        """How much of a prompt is cached now: no lease, no load, no promise."""
        check_prompt(prompt)
        return (await self._ask_of(messages.Hits, messages.Lookup, prompt)).hits

    async def lookup_segments(self, parts: Sequence[Prompt]) -> SegmentHits:
        """How much of each of up to 256 prompts or segments is cached now, as `lookup` says of one."""
        asked = parts_of(parts)
        link = self._links.here() or await self._links.ready()
        link.check_knows(messages.LookupSegments)
        await link.hash(asked, self._hashing)
        question = messages.LookupSegments(link.next_number(), link.pack_all(asked))
        answer = await link.ask(messages.Hits, question)
        return cast(SegmentHits, join_hits(answer.hits, answer.parts))

    async def explain(self, prompt: Prompt) -> Explanation:
        """Where each chunk of a prompt is, or why it is not there, and where else its tokens are cached.

        The server gets the token ids for that, if they fit a frame, and keeps none. Where only the hashes of a prompt
        are known, it cannot say the latter.
        """
        check_prompt(prompt)
        link = self._links.here() or await self._links.ready()
        question = messages.Explain(link.next_number(), link.pack_source(prompt))
        return (await link.ask(messages.Explained, question)).explanation

    async def query_lookup_hits(self, request_id: str) -> LookupHits:
        """Await `lookup_done`; by any number of callers, any number of times. Raises UnknownRequestError.

        The request may be one of any client of this tenant and namespace.
        """
        check_request_id(request_id, MAX_CLIENT_REQUEST_ID)
        query = messages.QueryPrefetchLookupHits
        answer = await self._ask(messages.Hits, lambda number: query(number, request_id))
        return join_hits(answer.hits, answer.parts)

    async def query_status(self, request_id: str) -> LoadResult:
        """Await `load_done` and claim the result, which is handed out once. Raises UnknownRequestError.

        The request may be one of any client of this tenant and namespace.
        """
        check_request_id(request_id, MAX_CLIENT_REQUEST_ID)
        link = self._links.here() or await self._links.ready()
        return await link.claims.claim(request_id)

    def unclaim(self, result: LoadResult) -> None:
        """Return a claimed result that nobody waits for any more: it is handed out once more."""
        if self._links.current is not None:
            self._links.current.claims.unclaim(result)

    async def renew(self, request_id: str) -> None:
        """Let the request's time begin anew. Raises UnknownRequestError."""
        check_request_id(request_id, MAX_CLIENT_REQUEST_ID)
        await self._ask(messages.Done, lambda number: messages.Renew(number, request_id))

    async def end_request(self, request_id: str) -> None:
        """Release all that the request holds; cancels it if it runs. Unknown ids are fine.

        Without a connection, nothing is held.
        """
        link = self._links.here()
        check_request_id(request_id, MAX_CLIENT_REQUEST_ID)
        if link is not None:
            link.detach(request_id)
            await link.ask(messages.Done, messages.EndRequest(link.next_number(), request_id))

    # Reading and writing.

    def read(self, request_id: str, *, rank: int = 0, reader: int = 0) -> ReadLease:
        """Read what was loaded: `async with` the lease, or `await` it. It waits for the load and claims nothing.

        The request may be one of any client of this tenant and namespace. Where the server's memory is not mapped, the
        bytes come in a buffer of the lease. Entering raises UnknownRequestError, ReadConflictError for a second time,
        ValueError for a rank or reader that the request has not.
        """
        self._links.check_open()
        return ReadLease(partial(self._reads.enter, check_request_id(request_id, MAX_CLIENT_REQUEST_ID), rank, reader))

    def stream(self, request_id: str, *, rank: int = 0, reader: int = 0) -> ReadStream:
        """Read what a request is loading, as `read` does, but chunk by chunk, each as soon as it is in memory.

        Entering waits for the lookup only; it raises as that of `read`, and ServiceError where the server is too old
        for it. Iterating raises ConnectionLostError. To leave before the load has ended is to leave as a reader does:
        where all others have left, too, that ends the request, and what is on its way for it.
        """
        self._links.check_open()
        return ReadStream(
            partial(self._reads.enter_stream, check_request_id(request_id, MAX_CLIENT_REQUEST_ID), rank, reader)
        )

    def store(self, prompt: Prompt, *, rank: int = 0, start_chunk: int = 0) -> Writer:
        """Write a rank's chunks from `start_chunk` on, those that L1 lacks: `async with` the writer, or `await` it.

        Until they are committed, the chunks are in this process's own memory. A commit that the server cannot carry out
        is logged; leaving by `async with` waits for all of them.
        """
        return Writer(self.opens_writer(prompt, rank, start_chunk))

    def opens_writer(self, prompt: Prompt, rank: int, start_chunk: int) -> Callable[[Writer], Awaitable[Opened]]:
        """What opens a writer of these chunks, for `store`. Raises for arguments that cannot be."""
        self._links.check_open()
        check_prompt(prompt)
        check_index("rank", rank, prompt.layout.world_size)
        check_index("start_chunk", start_chunk, len(prompt) + 1)
        return partial(open_chunks, self._links.ready, self._hashing, self._post, prompt, rank, start_chunk)

    # Keeping and removing.

    async def retain(self, prompt: Prompt, *, tokens: int | None = None, ttl_seconds: float = 300.0) -> Retained:
        """Keep the first `tokens` of a prompt, all if None, for so long, and say how many that will be.

        They outlive this client; 0 seconds end it. Raises ServiceError for a server that is too old for it.
        """
        check_prompt(prompt)
        check_tokens(prompt, tokens)
        whole = tokens // prompt.layout.chunk_tokens * prompt.layout.chunk_tokens if tokens is not None else None
        retain = partial(messages.Retain, tokens=whole, ttl_seconds=check_ttl(ttl_seconds))
        return (await self._ask_of(messages.Kept, retain, prompt, messages.Retain)).retained

    async def warm(self, prompt: Prompt, *, deadline_seconds: float | None = None) -> LoadResult:
        """Load what is cached of a prompt into the server's memory, and let go of it. Raises as `retain`."""
        check_prompt(prompt)
        warm = partial(messages.Warm, deadline_seconds=check_seconds("deadline_seconds", deadline_seconds))
        return (await self._ask_of(messages.Loaded, warm, prompt, messages.Warm)).result

    async def hint(
        self,
        prompt: Prompt,
        *,
        output_tokens: int | None = None,
        returns: bool | None = None,
        within_seconds: float | None = None,
    ) -> None:
        """Say what an engine knows of the future of a prompt that it has asked for. Raises as `retain`."""
        check_prompt(prompt)
        check_hint(output_tokens, returns, within_seconds)
        hint = partial(messages.Hint, output_tokens=output_tokens, returns=returns, within_seconds=within_seconds)
        await self._ask_of(messages.Done, hint, prompt, messages.Hint)

    async def delete(self, prompt: Prompt) -> Deleted:
        """Remove every chunk of a prompt from both tiers. Raises BackendError where a backend could not."""
        check_prompt(prompt)
        return (await self._ask_of(messages.Removed, messages.Delete, prompt)).deleted

    # Looking at it.

    @property
    def memory(self) -> memoryview:
        """The server's arena, mapped read-only; another one after each reconnect.

        Raises ConnectionLostError, and AccessDeniedError where it is not mapped: the server is on another host, or the
        token is bound to salts.
        """
        link = self._links.connected()
        arena = link.arena
        if arena is None:
            if not link.connection.is_open:  # since it was looked at: this may be another thread
                raise link.reason
            raise AccessDeniedError("this client does not see the server's memory: it is elsewhere, or bound to salts")
        return arena.toreadonly()

    def window(self, size_bytes: int) -> memoryview | None:
        """The first bytes of the memory that this client's writers fill, writable, to be registered with a device.

        Another memory after each reconnect; None where there is none, and what is stored travels in frames. Its pages
        stay where they are until the connection ends: memory that was pinned is never given back to the machine before.
        Raises ConnectionLostError.
        """
        segment = self._links.connected().segment
        return segment.window(size_bytes) if segment is not None else None

    @property
    def result_ttl_seconds(self) -> float:
        """How long the server keeps a result that nobody claims. Raises ConnectionLostError while there is none."""
        return self._links.connected().result_ttl_seconds

    def check_connected(self) -> None:
        """Raises ConnectionLostError while there is no connection: most calls would wait for the next one."""
        self._links.connected()

    def heard(self) -> int:
        """How many messages have come from the server so far: unchanged, it says that the server is silent.

        May be called from any thread.
        """
        return self._links.heard()
