"""`CacheClient`: the cache that a server keeps, over one connection after the other."""

import asyncio
import itertools
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from async_cache.client.dial import dial
from async_cache.client.link import Link, Lost, RemoteRequest
from async_cache.client.writing import Post, RemoteWriter, call_now
from async_cache.errors import (
    AccessDeniedError,
    CacheClosedError,
    ConnectionLostError,
    RequestConflictError,
)
from async_cache.handles.lease import Entered, ReadChunk, ReadLease
from async_cache.handles.prefetch import Prefetch
from async_cache.prompt.arguments import check_prompt, check_request_id, check_seconds, check_tier, ranks_of, start_of
from async_cache.prompt.keys import check_label
from async_cache.prompt.layout import Prompt, check_index
from async_cache.protocol import messages
from async_cache.protocol.address import Address, default_url
from async_cache.protocol.messages import VERSION, Hello
from async_cache.values import CacheStats, Deleted, FlushResult, LoadResult, LookupHits

MAX_REQUEST_ID = 256
_FIRST_DELAY_SECONDS = 0.02
_LONGEST_DELAY_SECONDS = 1.0
_ATTEMPT_SECONDS = 5.0
_CLOSE_SECONDS = 5.0
_LAST_CHANCE_SECONDS = 0.05

A = TypeVar("A")

Dial = Callable[[Lost, float], Awaitable[Link]]


def connect(
    url: str | None = None,
    namespace: str = "",
    *,
    token: str | None = None,
    connect_timeout_seconds: float = 2.0,
    heartbeat_seconds: float | None = 10.0,
    post: Post = call_now,
) -> "CacheClient":
    """A client of the server at `unix:///path` or `tcp://host:port`, to be entered by `async with`.

    `url` None is where `async-cache serve` listens by default. Request ids are scoped to the `namespace`, and to the
    tenant whose `token` it is. Entering tries for `connect_timeout_seconds`; a server that is silent for twice
    `heartbeat_seconds` is given up. `post` is how what may be called in any thread (`release`, `commit`, `close` of a
    writer) gets into the client's loop. Raises ConfigError for what is no address.
    """
    address = Address.parse(default_url() if url is None else url)
    hello = Hello(VERSION, token, check_label("namespace", namespace))
    return CacheClient(
        partial(dial, address, hello),
        connect_timeout_seconds=connect_timeout_seconds,
        heartbeat_seconds=heartbeat_seconds,
        post=post,
    )


class CacheClient:
    """NEW -> OPEN -> CLOSED, by `async with` or by `open` and `close`. Has the members of `AsyncCache`.

    While it is open it reconnects by itself. What was held over a connection that is lost is gone: pending futures and
    calls get ConnectionLostError, and so does a prefetch until there is a new one. Other calls wait for the next
    attempt.

    What `AsyncCache` says in the step of the call comes later: a conflict with a request of another client reaches the
    two futures. All methods are to be called from the loop that opened it.
    """

    def __init__(
        self,
        dial: Dial,
        *,
        connect_timeout_seconds: float = 2.0,
        heartbeat_seconds: float | None = None,
        post: Post = call_now,
    ):
        self._dial = dial
        self._connect_timeout_seconds = connect_timeout_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._post = post
        self._name = secrets.token_hex(8)
        self._ids = itertools.count(1)
        self._used = False
        self._link: Link | None = None
        self._lost = asyncio.Event()
        self._error: Exception = ConnectionLostError("there was no connection yet")
        self._closed: CacheClosedError | None = CacheClosedError("the client is not open: use `async with`")
        self._waiting: list[asyncio.Future[Link]] = []
        self._tasks: list[asyncio.Task[None]] = []

    # Life.

    async def open(self) -> Self:
        """Connect. Raises ConnectionLostError if there is no server, AccessDeniedError if it wants another token."""
        if self._used:
            raise CacheClosedError("a client is opened once")
        self._used = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._connect_timeout_seconds
        delay = _FIRST_DELAY_SECONDS
        while self._link is None:
            try:
                self._link = await self._attempt(max(deadline - loop.time(), delay))
            except ConnectionLostError:
                if loop.time() + delay > deadline:
                    raise
                await asyncio.sleep(delay)
                delay *= 2
        self._closed = None
        self._tasks.append(asyncio.create_task(self._stay_connected()))
        if self._heartbeat_seconds is not None:
            self._tasks.append(asyncio.create_task(self._beat(self._heartbeat_seconds)))
        return self

    async def close(self) -> None:
        """Wait for what was committed, and close; idempotent. The server takes back what is held.

        Whoever waits for a future or a query gets CacheClosedError.
        """
        self._used = True
        self._closed = CacheClosedError("the client was closed")
        link, self._link = self._link, None
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tell(self._closed)
        if link is not None:
            await link.close(self._closed, _CLOSE_SECONDS)

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Connections.

    async def _attempt(self, timeout_seconds: float) -> Link:
        link = await self._dial(self._connection_lost, timeout_seconds)
        link.check_open()  # it may be lost already, and `_connection_lost` not know of whom it is told
        return link

    def _connection_lost(self, error: Exception) -> None:
        if self._link is not None:
            self._link = None
            self._error = error
            self._lost.set()

    async def _stay_connected(self) -> None:
        clock = asyncio.get_running_loop().time
        delay, connected = _FIRST_DELAY_SECONDS, clock()
        while True:
            await self._lost.wait()
            self._lost.clear()
            waits = clock() - connected < _LONGEST_DELAY_SECONDS  # it was welcomed, and sent away
            while self._link is None:
                if waits:
                    await asyncio.sleep(delay * random.uniform(0.5, 1))
                    delay = min(2 * delay, _LONGEST_DELAY_SECONDS)
                else:
                    waits, delay = True, _FIRST_DELAY_SECONDS
                try:
                    self._link = link = await self._attempt(_ATTEMPT_SECONDS)
                except Exception as error:
                    self._error = error
                    self._tell(error)
                else:
                    self._tell(link)
            connected = clock()

    def _tell(self, outcome: Link | Exception) -> None:
        """Those who wait for an attempt."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if future.done():
                continue
            if isinstance(outcome, Link):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

    async def _beat(self, seconds: float) -> None:
        """Give up a server that does not say anything, also when it is asked to."""
        asked: tuple[Link, int] | None = None
        while True:
            await asyncio.sleep(seconds)
            link = self._link
            if link is None:
                continue
            heard = (link, link.connection.received_frames)
            if heard == asked:
                await asyncio.sleep(_LAST_CHANCE_SECONDS)  # where this loop was held, its answer is there, unread
            if heard == asked and link.connection.received_frames == heard[1]:
                link.abort(f"the server has not answered for {seconds} s")
            else:
                link.tell(messages.Ping(link.number()))
            asked = heard

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed.with_traceback(None)

    async def _ready(self) -> Link:
        """The connection, or the next one."""
        self._check_open()
        if self._link is not None:
            return self._link
        future: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return await future

    async def _ask(self, answer: type[A], make: Callable[[int], Any]) -> A:
        link = await self._ready()
        return await link.ask(answer, make(link.number()))

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
        """As `AsyncCache.prefetch`."""
        self._check_open()
        check_prompt(prompt)
        if request_id is None:
            request_id = self.new_request_id()
        check_request_id(request_id, MAX_REQUEST_ID)
        check_seconds("deadline_seconds", deadline_seconds)
        start_chunk, here = start_of(prompt, skip_tokens), ranks_of(prompt, ranks)
        link = self._link
        known = link.requests.get(request_id) if link is not None else None
        if known is not None and not known.maybe_over:
            same = known.start_chunk == start_chunk and known.ranks == here and known.prompt.same_as(prompt)
            if same and not known.claimed:
                return known.prefetch
            raise RequestConflictError(f"request {request_id!r} is in use{'' if same else ' for another prompt'}")
        request = RemoteRequest(request_id, prompt, start_chunk, here, self._cancel)
        if link is None:
            request.break_with(self._error)
        else:
            deadline = float(deadline_seconds) if deadline_seconds is not None else None
            link.prefetch(request, start_chunk * prompt.layout.chunk_tokens, deadline)
        return request.prefetch

    def new_request_id(self) -> str:
        """One that nobody has used."""
        return f"{self._name}-{next(self._ids)}"

    def _cancel(self, request: RemoteRequest) -> None:
        if self._link is not None and request.result.pending:
            self._link.cancel(request)

    async def lookup(self, prompt: Prompt) -> LookupHits:
        """As `AsyncCache.lookup`."""
        check_prompt(prompt)
        link = await self._ready()
        wire = await link.hashed(prompt)
        return (await link.ask(messages.Hits, messages.Lookup(link.number(), wire))).hits

    async def query_lookup_hits(self, request_id: str) -> LookupHits:
        """As `AsyncCache.query_lookup_hits`; the request may be one of any client of this tenant and namespace."""
        check_request_id(request_id, MAX_REQUEST_ID)
        return (
            await self._ask(messages.Hits, lambda number: messages.QueryPrefetchLookupHits(number, request_id))
        ).hits

    async def query_status(self, request_id: str) -> LoadResult:
        """As `AsyncCache.query_status`; the request may be one of any client of this tenant and namespace."""
        check_request_id(request_id, MAX_REQUEST_ID)
        return await (await self._ready()).claims.claim(request_id)

    def unclaim(self, result: LoadResult) -> None:
        """Give back a result that nobody waits for any more: it is handed out once more."""
        if self._link is not None:
            self._link.claims.unclaim(result.request_id)

    async def renew(self, request_id: str) -> None:
        """As `AsyncCache.renew`."""
        check_request_id(request_id, MAX_REQUEST_ID)
        await self._ask(messages.Done, lambda number: messages.Renew(number, request_id))

    async def end_request(self, request_id: str) -> None:
        """As `AsyncCache.end_request`. Without a connection, nothing is held that could be given back."""
        self._check_open()
        check_request_id(request_id, MAX_REQUEST_ID)
        if self._link is not None:
            self._link.freed(request_id)
            await self._ask(messages.Done, lambda number: messages.EndRequest(number, request_id))

    # Reading and writing.

    def read(self, request_id: str, *, rank: int = 0, reader: int = 0) -> ReadLease:
        """As `AsyncCache.read`; the request may be one of any client of this tenant and namespace.

        Where the server's memory is not mapped, the bytes come in a buffer of the lease.
        """
        self._check_open()
        return ReadLease(partial(self._enter_read, check_request_id(request_id, MAX_REQUEST_ID), rank, reader))

    async def _enter_read(self, request_id: str, rank: int, reader: int) -> Entered:
        for name, value in (("rank", rank), ("reader", reader)):
            check_index(name, value, 2**32)
        link = await self._ready()
        number = link.number()
        acquired, memory = await link.acquire(messages.AcquireRead(number, request_id, rank, reader))
        layout = link.layout(acquired)
        objects = dict.fromkeys(range(len(acquired.offsets)), layout.objects.rank_masks[rank])
        for n, groups in acquired.absent:
            objects[n] &= ~sum(1 << layout.objects.bit(rank, group) for group in groups)
        chunks = tuple(
            ReadChunk(acquired.result.start_chunk + n, offset, rank, objects[n], layout, memory)
            for n, offset in enumerate(acquired.offsets)
        )
        leave = partial(self._post, self._leave, link, number, request_id)
        undo = partial(self._post, self._undo, link, number)
        return Entered(acquired.result, layout, chunks, leave, undo, lambda: link.connection.is_open)

    @staticmethod
    def _undo(link: Link, number: int) -> None:
        link.tell(messages.Cancel(link.number(), number))

    @staticmethod
    def _leave(link: Link, number: int, request_id: str) -> None:
        link.tell(messages.ReleaseRead(link.number(), number))
        if (request := link.requests.get(request_id)) is not None:
            request.maybe_over = True

    def store(self, prompt: Prompt, *, rank: int = 0, start_chunk: int = 0) -> RemoteWriter:
        """As `AsyncCache.store`: the chunks are in this process's own memory until they are committed."""
        self._check_open()
        check_prompt(prompt)
        check_index("rank", rank, prompt.layout.world_size)
        check_index("start_chunk", start_chunk, len(prompt) + 1)
        return RemoteWriter(self._ready, self._post, prompt, rank, start_chunk)

    async def flush(self, deadline_seconds: float | None = None) -> FlushResult:
        """As `AsyncCache.flush`."""
        check_seconds("deadline_seconds", deadline_seconds)
        return (await self._ask(messages.Flushed, lambda number: messages.Flush(number, deadline_seconds))).result

    # Removing.

    async def delete(self, prompt: Prompt) -> Deleted:
        """As `AsyncCache.delete`."""
        check_prompt(prompt)
        link = await self._ready()
        wire = await link.hashed(prompt)
        return (await link.ask(messages.Removed, messages.Delete(link.number(), wire))).deleted

    async def clear(self, tier: Literal["l1", "all"] = "l1") -> Deleted:
        """As `AsyncCache.clear`. Raises AccessDeniedError for a token that is bound to salts."""
        check_tier(tier)
        return (await self._ask(messages.Removed, lambda number: messages.Clear(number, tier))).deleted

    # Looking at it.

    async def stats(self) -> CacheStats:
        """As `AsyncCache.stats`."""
        return (await self._ask(messages.Counted, lambda number: messages.Stats(number))).stats

    async def ping(self) -> float:
        """The seconds that the server takes to answer."""
        began = time.perf_counter()
        await self._ask(messages.Done, lambda number: messages.Ping(number))
        return time.perf_counter() - began

    @property
    def memory(self) -> memoryview:
        """The server's arena, mapped read-only; another one after each reconnect. Raises AccessDeniedError."""
        arena = self.check_connected().arena
        if arena is None:
            raise AccessDeniedError("this client does not see the server's memory: it is elsewhere, or bound to salts")
        return arena.toreadonly()

    @property
    def result_ttl_seconds(self) -> float:
        """How long the server keeps a result that nobody claims. Raises ConnectionLostError while there is none."""
        return self.check_connected().result_ttl_seconds

    def check_connected(self) -> Link:
        """The connection. Raises ConnectionLostError while there is none: most calls would wait for the next one."""
        self._check_open()
        link = self._link  # once: it may be another thread that asks
        if link is None:
            raise self._error.with_traceback(None)
        return link
