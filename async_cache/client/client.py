"""`CacheClient`: the cache that a server keeps, over one connection after the other."""

import itertools
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from async_cache.client.calls import LEFT, OPEN, PrefetchCall
from async_cache.client.dial import dial
from async_cache.client.link import Link
from async_cache.client.links import Dial, Links
from async_cache.client.writing import Post, call_now, open_chunks
from async_cache.errors import AccessDeniedError, RequestConflictError
from async_cache.handles.events import EVENTS_CAPACITY, EventStream
from async_cache.handles.lease import Entered, Memory, ReadChunk, ReadLease
from async_cache.handles.prefetch import Prefetch
from async_cache.handles.writer import Opened, Writer
from async_cache.prompt.arguments import (
    check_capacity,
    check_prompt,
    check_request_id,
    check_seconds,
    check_text,
    check_tier,
    check_traceparent,
    ranks_of,
    start_of,
)
from async_cache.prompt.keys import check_label
from async_cache.prompt.layout import ModelLayout, Prompt, check_index
from async_cache.protocol import messages
from async_cache.protocol.address import Address, default_url
from async_cache.protocol.messages import MAX_URL, VERSION, Hello
from async_cache.protocol.prompts import layout_of
from async_cache.values import (
    BackendStatus,
    CacheStats,
    Deleted,
    Explanation,
    FlushResult,
    ListedChunk,
    LoadResult,
    LookupHits,
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
    connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
    heartbeat_seconds: float | None = HEARTBEAT_SECONDS,
) -> "CacheClient":
    """A client of the server at `unix:///path` or `tcp://host:port`, to be entered by `async with`.

    `url` None is where `async-cache serve` listens by default. Request ids are scoped to the `namespace`, and to the
    tenant whose `token` it is. Entering tries for `connect_timeout_seconds`; a server that is silent for twice
    `heartbeat_seconds` is given up, and never if that is None. Raises ConfigError for what is no address, and
    ValueError for what cannot be a namespace.
    """
    return make_client(url, namespace, token, connect_timeout_seconds, heartbeat_seconds, call_now)


def make_client(
    url: str | None,
    namespace: str,
    token: str | None,
    connect_timeout_seconds: float,
    heartbeat_seconds: float | None,
    post: Post,
) -> "CacheClient":
    """`connect`, with the way into the client's loop of what may be called in any thread."""
    address = Address.parse(default_url() if url is None else url)
    hello = Hello(VERSION, token, check_label("namespace", namespace))
    return CacheClient(
        partial(dial, address, hello),
        connect_timeout_seconds=connect_timeout_seconds,
        heartbeat_seconds=heartbeat_seconds,
        post=post,
    )


class CacheClient:
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
        self._links = Links(dial, connect_timeout_seconds=connect_timeout_seconds, heartbeat_seconds=heartbeat_seconds)
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

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, answer: type[A], make: Callable[[int], Any]) -> A:
        link = self._links.here() or await self._links.ready()
        return await link.ask(answer, make(link.next_number()))

    async def _ask_of(self, answer: type[A], make: Callable[[int, messages.WirePrompt], Any], prompt: Prompt) -> A:
        link = self._links.here() or await self._links.ready()
        wire = await link.pack_hashed(prompt)
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
    ) -> Prefetch:
        """Look a prompt up and load what is cached of it; returns at once.

        `skip_tokens`: what the engine holds itself; its whole chunks are neither looked up nor counted.
        `ranks`: those to load here, all if None; the others are only checked for existence.
        `deadline_seconds` runs from the moment when the server has the call.
        `traceparent`: the span that it belongs to, where the server has `traces`.
        Raises RequestConflictError if this client uses the id for something else; without a connection, the futures
        have ConnectionLostError.
        """
        link = self._links.here()
        if link is None:
            self._links.check_open()
        check_prompt(prompt)
        if request_id is None:
            request_id = self.new_request_id()
        check_request_id(request_id, MAX_REQUEST_ID)
        check_seconds("deadline_seconds", deadline_seconds)
        check_traceparent(traceparent)
        start_chunk, here = start_of(prompt, skip_tokens), ranks_of(prompt, ranks)
        known = link.requests.get(request_id) if link is not None else None
        if known is not None and known.state is not LEFT:
            same = known.asks_for(prompt, start_chunk, here)
            if same and known.state is OPEN:
                return known.prefetch
            raise RequestConflictError(f"request {request_id!r} is in use{'' if same else ' for another prompt'}")
        call = PrefetchCall(link, request_id, prompt, start_chunk, here)
        if link is None:
            call.lost(self._links.error)
        else:
            link.prefetch(call, float(deadline_seconds) if deadline_seconds is not None else None, traceparent)
        return call.prefetch

    def new_request_id(self) -> str:
        """A request id that nobody has used."""
        return f"{self._name}-{next(self._ids)}"

    async def lookup(self, prompt: Prompt) -> LookupHits:
        """How much of a prompt is cached now: no lease, no load, no promise."""
        check_prompt(prompt)
        return (await self._ask_of(messages.Hits, messages.Lookup, prompt)).hits

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
        return (await self._ask(messages.Hits, lambda number: query(number, request_id))).hits

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
        objects = dict.fromkeys(range(len(acquired.offsets)), layout.objects.rank_masks[rank])
        for n, groups in acquired.absent:
            objects[n] &= ~sum(1 << layout.objects.bit(rank, group) for group in groups)
        memory = Memory(view)
        chunks = tuple(
            ReadChunk(acquired.result.start_chunk + n, offset, rank, objects[n], layout, memory)
            for n, offset in enumerate(acquired.offsets)
        )
        release = partial(self._post, self._release, link, number, request)
        undo = partial(self._post, link.undo, number)
        return Entered(acquired.result, layout, chunks, memory, release, undo, lambda: link.connection.is_open)

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
        return partial(open_chunks, self._links.ready, self._post, prompt, rank, start_chunk)

    async def flush(self, deadline_seconds: float | None = None) -> FlushResult:
        """Wait until what was committed is in L2. Counts what was written or dropped since the last flush."""
        check_seconds("deadline_seconds", deadline_seconds)
        return (await self._ask(messages.Flushed, lambda number: messages.Flush(number, deadline_seconds))).result

    # Removing.

    async def delete(self, prompt: Prompt) -> Deleted:
        """Remove every chunk of a prompt from both tiers. Raises BackendError where a backend could not."""
        check_prompt(prompt)
        return (await self._ask_of(messages.Removed, messages.Delete, prompt)).deleted

    async def clear(self, tier: Literal["l1", "all"] = "l1") -> Deleted:
        """Empty L1 of what L2 has ("l1"), or both tiers ("all").

        Raises AccessDeniedError for a token that is bound to salts.
        """
        check_tier(tier)
        return (await self._ask(messages.Removed, lambda number: messages.Clear(number, tier))).deleted

    # Backends of the server.

    async def add_backend(self, url: str, *, position: int | None = None) -> None:
        """Have the server open one more backend, and use it: as the slowest, or before the one at a position.

        Raises ConfigError for a URL or a name that cannot be, ValueError for a position that there is not, BackendError
        for a backend that fails or does not open in time, AccessDeniedError for a token that is bound to salts.
        """
        if not isinstance(url, str):
            raise TypeError(f"a backend must be a URL, not {type(url).__name__}")
        check_text("url", url, MAX_URL)
        if position is not None:
            check_index("position", position, 2**32)
        await self._ask(messages.Done, lambda number: messages.AddBackend(number, url, position))

    async def drain_backend(self, name: str, *, deadline_seconds: float | None = None) -> BackendStatus:
        """Write nothing new to a backend, and copy what only it has to the others that are written to.

        Returns when that is done, or `deadline_seconds` are over: it goes on then, also without this client, and may be
        waited for again. Its state is DRAINED when it is done. Raises ConfigError for a name that there is not,
        BackendError where the copying cannot go on, AccessDeniedError for a token that is bound to salts.
        """
        check_text("name", name, MAX_URL)
        check_seconds("deadline_seconds", deadline_seconds)
        drain = partial(messages.DrainBackend, name=name, deadline_seconds=deadline_seconds)
        return (await self._ask(messages.BackendTold, drain)).backend

    async def remove_backend(self, name: str) -> None:
        """Ask a backend no more, wait for the loads that it was promised for, and close it.

        What only it has is not found any more, unless it was drained before. Raises ConfigError for a name that there
        is not, AccessDeniedError for a token that is bound to salts.
        """
        check_text("name", name, MAX_URL)
        await self._ask(messages.Done, lambda number: messages.RemoveBackend(number, name))

    async def backends(self) -> list[BackendStatus]:
        """The backends that there are now, the fastest first, and behind them those that are being removed.

        Raises AccessDeniedError for a token that is bound to salts.
        """
        return (await self._ask(messages.BackendsListed, messages.ListBackends)).backends

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

    async def reload(self) -> tuple[list[str], list[str]]:
        """Have the server read its settings anew: the names of those that changed, and those that wait for a restart.

        Raises ConfigError for settings that cannot be used, which changes nothing, BackendError for a backend that does
        not open, and AccessDeniedError for a token that is bound to salts.
        """
        reloaded = await self._ask(messages.Reloaded, messages.Reload)
        return reloaded.changed, reloaded.waiting

    async def roots(self) -> list[tuple[ModelLayout, str, str, int]]:
        """Of which prompts there are chunks: the layout, adapter and salt, and how many are in the server's memory.

        Those that were stored or loaded of late, the newest first, of the salts of this client's token.
        """
        listed = await self._ask(messages.RootsListed, messages.ListRoots)
        return [(layout_of(root.layout), root.adapter, root.salt, root.chunks) for root in listed.roots]

    async def chunks(
        self, *, model: str | None = None, salt: str | None = None, after: bytes | None = None, limit: int = 1000
    ) -> list[ListedChunk]:
        """Chunks in the server's memory, up to 1000 by their hashes, those after `after`; of a model and salt, or any.

        Fewer than `limit` are the last. Only those of the salts of this client's token are told.
        """
        check_index("limit", limit - 1, 1000)
        ask = partial(messages.ListChunks, model=model, salt=salt, after=after, limit=limit)
        return (await self._ask(messages.ChunksListed, ask)).chunks

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
