"""`BlockingClient`: for engines whose scheduler is not asynchronous. It drives a client in a thread of its own."""

import ssl
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Literal, Self, TypeVar

from async_cache.client.client import CONNECT_TIMEOUT_SECONDS, HEARTBEAT_SECONDS, CacheClient
from async_cache.client.connecting import client_maker
from async_cache.client.handles import BlockingEvents, BlockingStream, BlockingWriter
from async_cache.client.prefetches import BlockingPrefetch, BlockingPrefetches, BlockingSegmentPrefetch
from async_cache.client.thread import ClientThread
from async_cache.handles.events import EVENTS_CAPACITY, EventStream
from async_cache.handles.lease import ReadLease
from async_cache.handles.stream import ReadStream
from async_cache.handles.writer import Writer
from async_cache.prompt.arguments import (
    MAX_CLIENT_REQUEST_ID,
    check_hint,
    check_prompt,
    check_request_id,
    check_ttl,
    parts_of,
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


class BlockingClient:
    """A `CacheClient` for programs that are not asynchronous; its methods may be called from any thread.

    NEW -> OPEN -> CLOSED, by `with` or by `open` and `close`. `prefetch` returns before the server has answered. All
    else that has an answer waits for it, up to `timeout_seconds` where that is given, and raises TimeoutError then. All
    of it may raise ConnectionLostError; before `open` and after `close`, CacheClosedError. One that is dropped while it
    is open closes, with a ResourceWarning, once nothing is there any more that it has given out.
    """

    def __init__(
        self,
        url: str | None = None,
        namespace: str = "",
        *,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        connect_timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
        heartbeat_seconds: float | None = HEARTBEAT_SECONDS,
    ):
        """A client of the server at `unix:///path`, `tcp://host:port` or `tls://host:port`, as `connect` makes one.

        `url` None is where `serve` listens by default. Request ids are scoped to the `namespace`, and to the tenant
        whose `token` it is. `tls` stands for the files that the URL may name. Opening tries for
        `connect_timeout_seconds`; a server that is silent for twice `heartbeat_seconds` is given up. Raises ConfigError
        for an argument that cannot be used.
        """
        make = client_maker(url, namespace, token, tls, connect_timeout_seconds, heartbeat_seconds)
        self._thread = ClientThread(make)
        weakref.finalize(self, self._thread.drop).atexit = False
        self._prefetches = BlockingPrefetches(self._thread)

    # Life.

    def open(self) -> Self:
        """Connect. Raises ConnectionLostError if there is no server, AccessDeniedError if it wants another token."""
        self._thread.open()
        return self

    def close(self) -> None:
        """Wait for what was committed, and close; idempotent. The server takes back what is held.

        Threads that wait for a future or a call get CacheClosedError. In a forked child it does nothing. In a callback
        of a future it returns at once, and the client closes after the callback.
        """
        self._thread.close()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self) -> CacheClient:
        return self._thread.opened()

    # The members of the cache.

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
    ) -> BlockingPrefetch:
        """Look a prompt up and load what is cached of it; returns at once. The arguments are those of `AsyncCache`.

        `deadline_seconds` runs from the moment when the server has the call. A request id that is in use for something
        else reaches the futures, as RequestConflictError.
        """
        client = self._opened()
        return self._prefetches.begin(
            client,
            BlockingPrefetch,
            wanted(
                prompt,
                longest_id=MAX_CLIENT_REQUEST_ID,
                request_id=request_id if request_id is not None else client.new_request_id(),
                skip_tokens=skip_tokens,
                ranks=ranks,
                deadline_seconds=deadline_seconds,
                traceparent=traceparent,
                wait_for_writers_seconds=wait_for_writers_seconds,
            ),
            keeps=self,
        )

    def prefetch_segments(
        self,
        parts: Sequence[Prompt],
        *,
        request_id: str | None = None,
        ranks: Sequence[int] | None = None,
        deadline_seconds: float | None = None,
        traceparent: str | None = None,
    ) -> BlockingSegmentPrefetch:
        """Look up to 256 prompts or segments of one layout up as one request, and load what is cached of each."""
        client = self._opened()
        return self._prefetches.begin(
            client,
            BlockingSegmentPrefetch,
            wanted(
                parts_of(parts),
                longest_id=MAX_CLIENT_REQUEST_ID,
                request_id=request_id if request_id is not None else client.new_request_id(),
                ranks=ranks,
                deadline_seconds=deadline_seconds,
                traceparent=traceparent,
            ),
            keeps=self,
        )

    def lookup(self, prompt: Prompt, *, timeout_seconds: float | None = None) -> LookupHits:
        """How much of a prompt is cached now: no lease, no load, no promise."""
        return self._thread.wait(self._opened().lookup(prompt), timeout_seconds)

    def lookup_segments(self, parts: Sequence[Prompt], *, timeout_seconds: float | None = None) -> SegmentHits:
        """How much of each of up to 256 prompts or segments is cached now, as `lookup` says of one."""
        return self._thread.wait(self._opened().lookup_segments(parts), timeout_seconds)

    def explain(self, prompt: Prompt, *, timeout_seconds: float | None = None) -> Explanation:
        """Where each chunk of a prompt is, or why it is not there: see `CacheClient.explain`."""
        return self._thread.wait(self._opened().explain(prompt), timeout_seconds)

    def query_lookup_hits(self, request_id: str, *, timeout_seconds: float | None = None) -> LookupHits:
        """Wait for the lookup of a request, of any client of this tenant and namespace. Raises UnknownRequestError."""
        return self._thread.wait(self._opened().query_lookup_hits(request_id), timeout_seconds)

    def query_status(self, request_id: str, *, timeout_seconds: float | None = None) -> LoadResult:
        """Wait for the load of a request and claim the result, which is handed out once. Raises UnknownRequestError.

        The request may be one of any client of this tenant and namespace.
        """
        client = self._opened()
        return self._thread.wait(client.query_status(request_id), timeout_seconds, client.unclaim)

    def read(
        self, request_id: str, *, rank: int = 0, reader: int = 0, timeout_seconds: float | None = None
    ) -> ReadLease:
        """Wait for the load of a request, and read: leave the lease by `with`, or by `release`, from any thread.

        Raises UnknownRequestError, ReadConflictError for a second time, ValueError for a rank or reader that the
        request has not.
        """
        lease = self._opened().read(request_id, rank=rank, reader=reader)
        lease.keeps = self
        return self._thread.wait(_entered(lease), timeout_seconds, ReadLease.undo)

    def stream(
        self, request_id: str, *, rank: int = 0, reader: int = 0, timeout_seconds: float | None = None
    ) -> BlockingStream:
        """Wait for the lookup of a request, and read what it is loading, chunk by chunk while they arrive.

        Raises as `read`, and ServiceError where the server is too old for it. See `CacheClient.stream`.
        """
        stream = self._opened().stream(request_id, rank=rank, reader=reader)
        stream.keeps = self
        self._thread.wait(_entered(stream), timeout_seconds, ReadStream.undo)
        return BlockingStream(stream, self._thread, timeout_seconds)

    def store(
        self, prompt: Prompt, *, rank: int = 0, start_chunk: int = 0, timeout_seconds: float | None = None
    ) -> Writer:
        """Write a rank's chunks from `start_chunk` on, those that L1 lacks; they may be committed from any thread.

        Leave the writer by `with`, which waits until what was committed can be found, or by `close`, which does not.
        `timeout_seconds` is for opening it, and once more for leaving it by `with`. A commit that the server cannot
        carry out is logged.
        """
        opens = self._opened().opens_writer(prompt, rank, start_chunk)
        writer = BlockingWriter(opens, partial(self._thread.wait, timeout_seconds=timeout_seconds))
        writer.keeps = self
        return self._thread.wait(_entered(writer), timeout_seconds, Writer.close)

    def renew(self, request_id: str, *, timeout_seconds: float | None = None) -> None:
        """Let the request's time begin anew. Raises UnknownRequestError."""
        self._thread.wait(self._opened().renew(request_id), timeout_seconds)

    def end_request(self, request_id: str, *, timeout_seconds: float | None = None) -> None:
        """Release all that the request holds; cancels it if it runs. Unknown ids are fine."""
        self._thread.wait(self._opened().end_request(request_id), timeout_seconds)

    def end_request_nowait(self, request_id: str) -> None:
        """Release all that the request holds, without waiting for the server.

        Where there is no server, or the client is closed, nothing is held.
        """
        check_request_id(request_id, MAX_CLIENT_REQUEST_ID)
        client = self._thread.client
        if client is not None and not self._thread.is_forked:
            self._thread.spawn(partial(client.end_request, request_id))

    def hint_nowait(
        self,
        prompt: Prompt,
        *,
        output_tokens: int | None = None,
        returns: bool | None = None,
        within_seconds: float | None = None,
    ) -> None:
        """Say what is known of the future of a prompt, without waiting; where there is no server, nobody hears it."""
        check_prompt(prompt)
        check_hint(output_tokens, returns, within_seconds)
        hint = self._opened().hint
        self._thread.spawn(
            partial(hint, prompt, output_tokens=output_tokens, returns=returns, within_seconds=within_seconds)
        )

    def retain_nowait(self, prompt: Prompt, *, ttl_seconds: float, told: Callable[[Retained], object]) -> None:
        """Keep a prompt, without waiting: `told` gets the answer, in the client's thread, where there is one."""
        check_prompt(prompt)
        self._thread.spawn(partial(self._opened().retain, prompt, ttl_seconds=check_ttl(ttl_seconds)), told)

    def flush(self, deadline_seconds: float | None = None) -> FlushResult:
        """Wait until what was committed is in L2, up to `deadline_seconds`.

        Counts what was written or dropped since the last flush.
        """
        return self._thread.wait(self._opened().flush(deadline_seconds))

    def retain(
        self,
        prompt: Prompt,
        *,
        tokens: int | None = None,
        ttl_seconds: float = 300.0,
        timeout_seconds: float | None = None,
    ) -> Retained:
        """Keep the first `tokens` of a prompt, all if None, for so long, and say how many that will be.

        See `CacheClient.retain`.
        """
        retain = self._opened().retain(prompt, tokens=tokens, ttl_seconds=ttl_seconds)
        return self._thread.wait(retain, timeout_seconds)

    def retained(self, *, timeout_seconds: float | None = None) -> list[Retained]:
        """What is retained of the salts of this client's token, the first to expire first."""
        return self._thread.wait(self._opened().retained(), timeout_seconds)

    def warm(
        self, prompt: Prompt, *, deadline_seconds: float | None = None, timeout_seconds: float | None = None
    ) -> LoadResult:
        """Load what is cached of a prompt into the server's memory, and let go of it: see `CacheClient.warm`."""
        return self._thread.wait(self._opened().warm(prompt, deadline_seconds=deadline_seconds), timeout_seconds)

    def hint(
        self,
        prompt: Prompt,
        *,
        output_tokens: int | None = None,
        returns: bool | None = None,
        within_seconds: float | None = None,
        timeout_seconds: float | None = None,
    ) -> None:
        """Say what an engine knows of the future of a prompt that it has asked for: see `CacheClient.hint`."""
        hint = self._opened().hint(prompt, output_tokens=output_tokens, returns=returns, within_seconds=within_seconds)
        self._thread.wait(hint, timeout_seconds)

    def delete(self, prompt: Prompt, *, timeout_seconds: float | None = None) -> Deleted:
        """Remove every chunk of a prompt from both tiers. Raises BackendError where a backend could not."""
        return self._thread.wait(self._opened().delete(prompt), timeout_seconds)

    def delete_model(
        self,
        model: str,
        *,
        revision: str | None = None,
        adapter: str | None = None,
        salt: str | None = None,
        timeout_seconds: float | None = None,
    ) -> DeletedModel:
        """Remove every chunk of a model, or of one revision, adapter or salt of it: see `CacheClient.delete_model`."""
        deletion = self._opened().delete_model(model, revision=revision, adapter=adapter, salt=salt)
        return self._thread.wait(deletion, timeout_seconds)

    def clear(self, tier: Literal["l1", "all"] = "l1", *, timeout_seconds: float | None = None) -> Deleted:
        """Empty L1 of what L2 has ("l1"), or both tiers ("all").

        Raises AccessDeniedError for a token that is bound to salts.
        """
        return self._thread.wait(self._opened().clear(tier), timeout_seconds)

    def add_backend(self, url: str, *, position: int | None = None, timeout_seconds: float | None = None) -> None:
        """Have the server open one more backend: see `CacheClient.add_backend`."""
        self._thread.wait(self._opened().add_backend(url, position=position), timeout_seconds)

    def drain_backend(
        self, name: str, *, deadline_seconds: float | None = None, timeout_seconds: float | None = None
    ) -> BackendStatus:
        """Copy what only one backend has to the others, and write nothing new to it: see `CacheClient.drain_backend`.

        The server goes on though the deadline passes, or the timeout.
        """
        drain = self._opened().drain_backend(name, deadline_seconds=deadline_seconds)
        return self._thread.wait(drain, timeout_seconds)

    def remove_backend(self, name: str, *, timeout_seconds: float | None = None) -> None:
        """Have the server ask a backend no more, and close it: see `CacheClient.remove_backend`."""
        self._thread.wait(self._opened().remove_backend(name), timeout_seconds)

    def backends(self, *, timeout_seconds: float | None = None) -> list[BackendStatus]:
        """The backends of the server, the fastest first, and behind them those that are being removed."""
        return self._thread.wait(self._opened().backends(), timeout_seconds)

    def stats(self, *, timeout_seconds: float | None = None) -> CacheStats:
        """A snapshot of what the server's cache holds, and counters since it was opened."""
        return self._thread.wait(self._opened().stats(), timeout_seconds)

    def events(self, capacity: int = EVENTS_CAPACITY, *, timeout_seconds: float | None = None) -> BlockingEvents:
        """What is stored and removed from now on, of the salts of this client's token: see `CacheClient.events`."""
        stream = self._thread.wait(_begin_events(self._opened(), capacity), timeout_seconds)
        return BlockingEvents(stream, self._thread, self)

    def ping(self, *, timeout_seconds: float | None = None) -> float:
        """The seconds that the server takes to answer."""
        return self._thread.wait(self._opened().ping(), timeout_seconds)

    @property
    def memory(self) -> memoryview:
        """The server's arena, mapped read-only; another one after each reconnect.

        Raises ConnectionLostError, and AccessDeniedError where it is not mapped: the server is on another host, or the
        token is bound to salts.
        """
        return self._opened().memory

    @property
    def result_ttl_seconds(self) -> float:
        """How long the server keeps a result that nobody claims. Raises ConnectionLostError while there is none."""
        return self._opened().result_ttl_seconds

    def check_connected(self) -> None:
        """Raises ConnectionLostError while there is no connection: most calls would wait for the next one."""
        self._opened().check_connected()

    def heard(self) -> int:
        """How many messages have come from the server so far: unchanged, it says that the server is silent.

        Before `open` and after `close`, 0.
        """
        client = self._thread.client
        return client.heard() if client is not None else 0


async def _begin_events(client: CacheClient, capacity: int) -> EventStream:
    return client.events(capacity)


E = TypeVar("E", ReadLease, ReadStream, BlockingWriter)


async def _entered(scoped: E) -> E:
    return await scoped
