"""`CacheClient`: the cache that a server keeps, over one connection after the other."""

import itertools
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast

from async_cache.aio.worker import Worker
from async_cache.client.calls import LEFT, OPEN, PrefetchCall, StreamCall, objects_of
from async_cache.client.dial import dial
from async_cache.client.link import Link
from async_cache.client.links import Dial, Links
from async_cache.client.operations import Operations
from async_cache.client.writing import Post, call_now, open_chunks
from async_cache.errors import AccessDeniedError, ConfigError, RequestConflictError
from async_cache.handles.events import EVENTS_CAPACITY, EventStream
from async_cache.handles.lease import Entered, Memory, ReadLease
from async_cache.handles.prefetch import Prefetch, SegmentPrefetch
from async_cache.handles.stream import ReadStream, Streamed
from async_cache.handles.writer import Opened, Writer
from async_cache.prompt.arguments import (
    check_capacity,
    check_hint,
    check_prompt,
    check_request_id,
    check_seconds,
    check_some_seconds,
    check_tier,
    check_tokens,
    check_traceparent,
    check_ttl,
    parts_of,
    ranks_of,
    selection_of,
    start_of,
)
from async_cache.prompt.keys import check_label, check_text
from async_cache.prompt.layout import Prompt, check_index
from async_cache.prompt.parts import Parts
from async_cache.protocol import messages
from async_cache.protocol.address import Address, default_url
from async_cache.protocol.messages import VERSION, Hello
from async_cache.protocol.parts import join_hits, join_result
from async_cache.values import (
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

MAX_REQUEST_ID = 256
CONNECT_TIMEOUT_SECONDS = 2.0
HEARTBEAT_SECONDS = 10.0

A = TypeVar("A")


def connect(
    url: str | None = None,
    namespace: str = "",
    *,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
    connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
    heartbeat_seconds: float | None = HEARTBEAT_SECONDS,
) -> "CacheClient":
    """A client of the server at `unix:///path`, `tcp://host:port` or `tls://host:port`, to enter by `async with`.

    `url` None is where `async-cache serve` listens by default. Request ids are scoped to the `namespace`, and to the
    tenant whose `token` it is. A server by TLS has to have a certificate of the system's authorities, or of those that
    the URL names by `?ca=FILE`, which may name a client's own by `&cert=FILE&key=FILE`; `tls` stands for all of these.
    Entering tries for `connect_timeout_seconds`; a server that is silent for twice
    `heartbeat_seconds` is given up, and never if that is None. Raises ConfigError for an argument that cannot be used.
    """
    return client_maker(url, namespace, token, tls, connect_timeout_seconds, heartbeat_seconds)(call_now)


def client_maker(
    url: str | None,
    namespace: str,
    token: str | None,
    tls: ssl.SSLContext | None,
    connect_timeout_seconds: float,
    heartbeat_seconds: float | None,
) -> "Callable[[Post], CacheClient]":
    """`connect` in two steps: arguments are checked now, a client is made where the way into its loop is known.

    Raises ConfigError for an argument that cannot be used.
    """
    address = Address.parse(default_url() if url is None else url)
    if tls is not None and address.tls is None:
        raise ConfigError(f"{address} is without TLS: connect to tls://host:port")
    if tls is not None and not isinstance(tls, ssl.SSLContext):
        raise ConfigError(f"tls must be an ssl.SSLContext, not {type(tls).__name__}")
    try:
        hello = Hello(VERSION, token, check_label("namespace", namespace))
        if token is not None:
            check_text("token", token)
        timeout_seconds = check_some_seconds("connect_timeout_seconds", connect_timeout_seconds)
        heartbeat_seconds = check_seconds("heartbeat_seconds", heartbeat_seconds)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if heartbeat_seconds == 0:
        raise ConfigError("heartbeat_seconds must be more than 0, or None for no heartbeat")
    return lambda post: CacheClient(
        partial(dial, address, hello, tls=tls),
        connect_timeout_seconds=timeout_seconds,
        heartbeat_seconds=heartbeat_seconds,
        post=post,
    )


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

    async def _ask_of(self, answer: type[A], make: Callable[[int, messages.WirePrompt], Any], prompt: Prompt) -> A:
        link = self._links.here() or await self._links.ready()
        wire = await link.pack_hashed(prompt, self._hashing)
        return await link.ask(answer, make(link.next_number(), wire))

    async def _ask_newer_of(
        self, answer: type[A], kind: type[messages.Message], make: Callable[[int, messages.WirePrompt], Any], of: Prompt
    ) -> A:
        """Ask what not every server of this version knows."""
        link = self._links.here() or await self._links.ready()
        link.check_knows(kind)
        wire = await link.pack_hashed(of, self._hashing)
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
        """Look a prompt up and load what is cached of it; returns at once.

        `skip_tokens`: what the engine holds itself; its whole chunks are neither looked up nor counted.
        `ranks`: those to load here, all if None; the others are only checked for existence.
        `deadline_seconds` runs from the moment when the server has the call.
        `traceparent`: the span that it belongs to, where the server has `traces`.
        `wait_for_writers_seconds`: how long the lookup waits for chunks of the prompt that writers have announced, by
        opening, and not committed or given up yet; it waits for no others, and counts what is there in the end.
        Raises RequestConflictError if this client uses the id for something else, and ServiceError where the server is
        too old to wait for writers; without a connection, the futures have ConnectionLostError.
        """
        link = self._links.here()
        if link is None:
            self._links.check_open()
        check_prompt(prompt)
        if request_id is None:
            request_id = self.new_request_id()
        check_request_id(request_id, MAX_REQUEST_ID)
        check_seconds("deadline_seconds", deadline_seconds)
        check_seconds("wait_for_writers_seconds", wait_for_writers_seconds)
        check_traceparent(traceparent)
        start_chunk, here = start_of(prompt, skip_tokens), ranks_of(prompt, ranks)
        waiting = deadline_seconds, traceparent, wait_for_writers_seconds
        return self._begin(link, request_id, prompt, start_chunk, here, *waiting).prefetch

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

        See `AsyncCache.prefetch_segments`; otherwise as `prefetch`. Raises ServiceError for a server that is older.
        """
        link = self._links.here()
        if link is None:
            self._links.check_open()
        asked = parts_of(parts)
        if request_id is None:
            request_id = self.new_request_id()
        check_request_id(request_id, MAX_REQUEST_ID)
        check_seconds("deadline_seconds", deadline_seconds)
        check_traceparent(traceparent)
        call = self._begin(link, request_id, asked, 0, ranks_of(asked, ranks), deadline_seconds, traceparent)
        return cast(SegmentPrefetch, call.prefetch)

    def _begin(
        self,
        link: Link | None,
        request_id: str,
        asked: Prompt | Parts,
        start_chunk: int,
        ranks: tuple[int, ...],
        deadline_seconds: float | None,
        traceparent: str | None,
        wait_for_writers_seconds: float | None = None,
    ) -> PrefetchCall:
        """Begin a request, or return that which this client has under this id, if it asks for the same."""
        known = link.requests.get(request_id) if link is not None else None
        if known is not None and known.state is not LEFT:
            same = known.asks_for(asked, start_chunk, ranks)
            if same and known.state is OPEN:
                return known
            raise RequestConflictError(f"request {request_id!r} is in use{'' if same else ' for another prompt'}")
        call = PrefetchCall(link, request_id, asked, start_chunk, ranks)
        if link is None:
            call.lost(self._links.error)
        else:
            deadline = float(deadline_seconds) if deadline_seconds is not None else None
            link.prefetch(call, deadline, traceparent, float(wait_for_writers_seconds or 0))
        return call

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
        check_request_id(request_id, MAX_REQUEST_ID)
        query = messages.QueryPrefetchLookupHits
        answer = await self._ask(messages.Hits, lambda number: query(number, request_id))
        return join_hits(answer.hits, answer.parts)

    async def query_status(self, request_id: str) -> LoadResult:
        """Await `load_done` and claim the result, which is handed out once. Raises UnknownRequestError.

        The request may be one of any client of this tenant and namespace.
        """
        check_request_id(request_id, MAX_REQUEST_ID)
        link = self._links.here() or await self._links.ready()
        return await link.claims.claim(request_id)

    def unclaim(self, result: LoadResult) -> None:
        """Return a claimed result that nobody waits for any more: it is handed out once more."""
        if self._links.current is not None:
            self._links.current.claims.unclaim(result)

    async def renew(self, request_id: str) -> None:
        """Let the request's time begin anew. Raises UnknownRequestError."""
        check_request_id(request_id, MAX_REQUEST_ID)
        await self._ask(messages.Done, lambda number: messages.Renew(number, request_id))

    async def end_request(self, request_id: str) -> None:
        """Release all that the request holds; cancels it if it runs. Unknown ids are fine.

        Without a connection, nothing is held.
        """
        link = self._links.here()
        if link is None:
            self._links.check_open()
        check_request_id(request_id, MAX_REQUEST_ID)
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
        return ReadLease(partial(self._enter_read, check_request_id(request_id, MAX_REQUEST_ID), rank, reader))

    async def _enter_read(self, request_id: str, rank: int, reader: int) -> Entered:
        for name, value in (("rank", rank), ("reader", reader)):
            check_index(name, value, 2**32)
        link = self._links.here() or await self._links.ready()
        number = link.next_number()
        request = link.requests.get(request_id)
        acquired, view = await link.acquire(messages.AcquireRead(number, request_id, rank, reader))
        layout = link.layouts.find(acquired.layout)
        objects = objects_of(layout, rank, acquired)
        release = partial(self._post, self._release, link, number, request)
        undo = partial(self._post, link.undo, number)
        result, offsets, memory = join_result(acquired.result, acquired.parts), acquired.offsets, Memory(view)
        return Entered(result, layout, rank, offsets, objects, memory, release, undo, lambda: link.connection.is_open)

    def stream(self, request_id: str, *, rank: int = 0, reader: int = 0) -> ReadStream:
        """Read what a request is loading, as `read` does, but chunk by chunk, each as soon as it is in memory.

        Entering waits for the lookup only; it raises as that of `read`, and ServiceError where the server is too old
        for it. Iterating raises ConnectionLostError. To leave before the load has ended is to leave as a reader does:
        where all others have left, too, that ends the request, and what is on its way for it.
        """
        self._links.check_open()
        return ReadStream(partial(self._enter_stream, check_request_id(request_id, MAX_REQUEST_ID), rank, reader))

    async def _enter_stream(self, request_id: str, rank: int, reader: int) -> Streamed:
        for name, value in (("rank", rank), ("reader", reader)):
            check_index(name, value, 2**32)
        link = self._links.here() or await self._links.ready()
        link.check_knows(messages.AcquireStream)
        number, call = link.next_number(), StreamCall(rank)
        request = link.requests.get(request_id)
        acquired, view = await link.acquire_stream(messages.AcquireStream(number, request_id, rank, reader), call)
        release = partial(self._post, self._release_stream, link, number, request, call)
        undo = partial(self._post, self._undo_stream, link, number, call)
        return Streamed(
            link.layouts.find(acquired.layout),
            rank,
            acquired.start_chunk,
            acquired.chunks,
            Memory(view),
            call.more,
            release,
            undo,
            lambda: link.connection.is_open,
        )

    @classmethod
    def _release_stream(cls, link: Link, number: int, request: PrefetchCall | None, call: StreamCall) -> None:
        link.calls.pop(number, None)  # whatever comes of it now
        call.end(RuntimeError("the lease was released"))
        cls._release(link, number, request)

    @staticmethod
    def _undo_stream(link: Link, number: int, call: StreamCall) -> None:
        call.end(RuntimeError("the lease was released"))
        link.undo(number)

    @staticmethod
    def _release(link: Link, number: int, request: PrefetchCall | None) -> None:
        link.send(messages.ReleaseRead(link.next_number(), number))
        if request is not None:
            request.state = LEFT

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

    async def flush(self, deadline_seconds: float | None = None) -> FlushResult:
        """Wait until what was committed is in L2. Counts what was written or dropped since the last flush."""
        seconds = check_seconds("deadline_seconds", deadline_seconds)
        return (await self._ask(messages.Flushed, lambda number: messages.Flush(number, seconds))).result

    # Keeping.

    async def retain(self, prompt: Prompt, *, tokens: int | None = None, ttl_seconds: float = 300.0) -> Retained:
        """Keep the first `tokens` of a prompt, all if None, for so long, and say how many that will be.

        Whole chunks that are in the cache are kept, as far as the share of the prompt's salt allows: `clipped` says why
        it is less than was asked for. They outlive this client. A second call for the same prompt changes the first,
        and 0 seconds end it. Raises ServiceError for a server that is too old for it.
        """
        check_prompt(prompt)
        check_tokens(prompt, tokens)
        whole = tokens // prompt.layout.chunk_tokens * prompt.layout.chunk_tokens if tokens is not None else None
        retain = partial(messages.Retain, tokens=whole, ttl_seconds=check_ttl(ttl_seconds))
        return (await self._ask_newer_of(messages.Kept, messages.Retain, retain, prompt)).retained

    async def retained(self) -> list[Retained]:
        """What is retained of the salts of this client's token, the first to expire first. Raises as `retain`."""
        link = self._links.here() or await self._links.ready()
        link.check_knows(messages.ListRetained)
        return (await link.ask(messages.RetainedListed, messages.ListRetained(link.next_number()))).retained

    async def warm(self, prompt: Prompt, *, deadline_seconds: float | None = None) -> LoadResult:
        """Load what is cached of a prompt into the server's memory, and let go of it. Raises as `retain`."""
        check_prompt(prompt)
        warm = partial(messages.Warm, deadline_seconds=check_seconds("deadline_seconds", deadline_seconds))
        return (await self._ask_newer_of(messages.Loaded, messages.Warm, warm, prompt)).result

    async def hint(
        self,
        prompt: Prompt,
        *,
        output_tokens: int | None = None,
        returns: bool | None = None,
        within_seconds: float | None = None,
    ) -> None:
        """Say what an engine knows of the future of a prompt that it has asked for. Raises as `retain`.

        `output_tokens`: how much was generated behind it. `returns`: whether it will be asked for again (False: the
        session has ended), and `within_seconds`, how soon (a tool call is pending). It promises nothing.
        """
        check_prompt(prompt)
        check_hint(output_tokens, returns, within_seconds)
        hint = partial(messages.Hint, output_tokens=output_tokens, returns=returns, within_seconds=within_seconds)
        await self._ask_newer_of(messages.Done, messages.Hint, hint, prompt)

    # Removing.

    async def delete(self, prompt: Prompt) -> Deleted:
        """Remove every chunk of a prompt from both tiers. Raises BackendError where a backend could not."""
        check_prompt(prompt)
        return (await self._ask_of(messages.Removed, messages.Delete, prompt)).deleted

    async def delete_model(
        self, model: str, *, revision: str | None = None, adapter: str | None = None, salt: str | None = None
    ) -> DeletedModel:
        """Remove every chunk of a model, of the salts of this client's token, from both tiers; where these are given,
        of one revision, adapter or salt only.

        The revision or adapter "" is that of prompts which name none. Of backends that do not know what their objects
        are of, what other tiers know is removed, and `unsure` names them; "l2" to a token that is bound to salts.
        Raises BackendError where a backend could not, and else as `retain`.
        """
        selection_of(model, revision, adapter, salt)
        link = self._links.here() or await self._links.ready()
        link.check_knows(messages.DeleteModel)
        question = messages.DeleteModel(link.next_number(), model, revision, adapter, salt)
        return (await link.ask(messages.ModelDeleted, question)).deleted

    async def clear(self, tier: Literal["l1", "all"] = "l1") -> Deleted:
        """Empty L1 of all that does not wait to be written to L2 ("l1"), or both tiers ("all").

        See `AsyncCache.clear`. Raises AccessDeniedError for a token that is bound to salts.
        """
        check_tier(tier)
        return (await self._ask(messages.Removed, lambda number: messages.Clear(number, tier))).deleted

    # Looking at it.

    def events(self, capacity: int = EVENTS_CAPACITY) -> EventStream:
        """What is stored and removed from now on, of the salts of this client's token, in order.

        See `AsyncCache.events`. It is bound to the connection: once that is lost, iterating raises ConnectionLostError,
        and whoever goes on begins anew.
        """
        check_capacity(capacity)
        link = self._links.here()
        if link is None:
            self._links.check_open()
            stream = EventStream(capacity)
            stream.break_with(self._links.error)
            return stream
        return link.events(capacity)

    async def stats(self) -> CacheStats:
        """A snapshot of what the server's cache holds, and counters since it was opened."""
        return (await self._ask(messages.Counted, messages.Stats)).stats

    async def ping(self) -> float:
        """The seconds that the server takes to answer."""
        began = time.perf_counter()
        await self._ask(messages.Done, messages.Ping)
        return time.perf_counter() - began

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
