"""One connection: what it asks for, what it holds, and what is released when it ends.

What needs no waiting is done in the step in which it came, in order; what waits is a task, and delays nothing behind
it.
"""

import asyncio
import logging
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

from async_cache.cache import AsyncCache
from async_cache.config import ServerConfig
from async_cache.errors import AsyncCacheError, LimitError, ProtocolError
from async_cache.handles.prefetch import Promised
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.messages import Decoder, Message, failed
from async_cache.protocol.partials import Partials
from async_cache.protocol.prompts import describe
from async_cache.server.access import Scope, Tenant
from async_cache.server.events import MAX_STREAMS, HeldEvents
from async_cache.server.held import Held, Wait
from async_cache.server.layouts import Layouts, SharedLayouts
from async_cache.server.prefetches import HeldPrefetch, Holders
from async_cache.server.reads import Reads
from async_cache.server.segment import ClientSegment
from async_cache.server.writers import Writers

log = logging.getLogger(__name__)

_decoder = Decoder(messages.Request)


@dataclass(frozen=True)
class Shared:
    """What the sessions of a server share."""

    cache: AsyncCache
    config: ServerConfig
    holders: Holders
    layouts: SharedLayouts
    copiers: Executor
    partials: Partials
    reload: Callable[[], Awaitable[tuple[list[str], list[str]]]]


class Session:
    """What serves one connection. All that it holds is in one table, by the numbers of the messages that asked for it.

    When the connection is gone, nothing is held any more, but what a copy still touches.
    """

    def __init__(
        self,
        shared: Shared,
        tenant: Tenant,
        namespace: str,
        segment: ClientSegment | None,
        *,
        mapped: bool,
        closed: "Callable[[Session], None]",
        name: str,
    ):
        config, cache = shared.config, shared.cache
        self.held: dict[int, Held] = {}
        self.name = name
        self.about = {"tenant": tenant.name, "namespace": namespace}
        """For the log: whose it is."""
        self.connection = Connection(
            _decoder,
            self._handle,
            self._lost,
            stall_seconds=config.stall_timeout_seconds,
            partials=shared.partials,
            name=name,
        )
        self._cache = cache
        self._reload_settings = shared.reload
        self._max_requests = config.max_requests
        self._tenant = tenant
        self._closed = closed
        self._scope = Scope(tenant, namespace)
        self._layouts = Layouts(cache, shared.layouts, tenant)
        self._holders = shared.holders
        self._reads = Reads(self.held, self.connection, cache.memory, self._layouts, self._scope, mapped=mapped)
        self._writers = Writers(self.held, self.connection, segment, shared.copiers)
        self._claims: weakref.WeakValueDictionary[str, Promised] = weakref.WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._left = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __repr__(self) -> str:
        return f"<Session of tenant {self._tenant.name!r}, {len(self.held)} held, {self.connection!r}>"

    # Messages, as they come.

    def _handle(self, message: Any) -> None:
        kind = type(message)
        try:
            at_once = _AT_ONCE.get(kind)
            if at_once is not None:
                at_once(self, message)
            else:
                self._check_number(message.number)
                self._wait(message, _WAITING[kind])
        except ProtocolError:
            raise  # to the connection, which sends the client away
        except Exception as error:
            self._fail(message, error)

    def _check_number(self, number: int) -> None:
        """Check that one more may be held, under this number. Raises ValueError or LimitError."""
        if number in self.held:
            raise ValueError(f"the number {number} is that of another request")
        if len(self.held) >= self._max_requests:
            under_way = sum(held.counts for held in self.held.values())
            if under_way >= self._max_requests:
                raise LimitError(f"{under_way} requests of this connection are under way, which is the limit")

    def _wait(self, message: Any, handler: "_Waits") -> None:
        wait = Wait(message.number, self.held, self.connection, self._answer(message, handler))
        self._tasks.add(wait.task)
        wait.task.add_done_callback(self._tasks.discard)

    async def _answer(self, message: Any, handler: "_Waits") -> None:
        try:
            answer = await handler(self, message)
            if answer is not None:
                self.connection.send(answer)
        except Exception as error:
            self._fail(message, error)

    def _fail(self, message: Any, error: Exception) -> None:
        if not isinstance(error, AsyncCacheError | ValueError | TypeError):
            about = self.about | {"request_id": getattr(message, "request_id", "")}
            log.error("%s failed", type(message).__name__, exc_info=error, extra=about)
        answer = failed(message.number, error)
        answer.message = self._scope.hide(answer.message)
        self.connection.send(answer)

    def _done(self, message: Any) -> None:
        self.connection.send(messages.Done(message.number))

    def _send_soon(self, answer: Message) -> None:
        """Send what may have ended a request: those who hold it hear of that first, in the loop's next turn."""
        self._loop.call_soon(self.connection.send, answer)

    # What needs no waiting.

    def _register_layout(self, message: messages.RegisterLayout) -> None:
        self.connection.send(self._layouts.register(message))

    def _prefetch(self, message: messages.Prefetch) -> None:
        self._check_number(message.number)
        prefetch = self._cache.prefetch(
            self._layouts.prompt(message.prompt),
            request_id=self._scope.inner(message.request_id),
            skip_tokens=message.skip_tokens,
            ranks=message.ranks,
            deadline_seconds=message.deadline_seconds,
            traceparent=message.traceparent,
        )
        HeldPrefetch(message.number, self.held, self.connection, prefetch, self._holders, self._scope)

    def _cancel(self, message: messages.Cancel) -> None:
        held = self.held.get(message.call)
        if held is not None:
            held.undo()
        self._done(message)

    def _unclaim(self, message: messages.Unclaim) -> None:
        request_id = self._scope.inner(message.request_id)
        request = self._claims.pop(request_id, None)
        if request is not None and self._cache.core.requests.find(request_id) is request:
            self._cache.core.requests.unclaim(request_id)
            self._holders.claimed(request_id, False)
        self._done(message)

    def _renew(self, message: messages.Renew) -> None:
        self._cache.core.requests.renew(self._scope.inner(message.request_id))
        self._done(message)

    def _end_request(self, message: messages.EndRequest) -> None:
        self._cache.core.requests.end(self._scope.inner(message.request_id))
        done = messages.Done(message.number)
        self._loop.call_soon(self._send_caught_up, self._cache.core.l1.is_behind, lambda: done)

    def _send_caught_up(self, is_behind: Callable[[], bool], answer: Callable[[], Message]) -> None:
        """Send what is true when all that was released is given back: of very much, that takes some turns."""
        if is_behind():
            self._loop.call_soon(self._send_caught_up, is_behind, answer)
        else:
            self.connection.send(answer())

    def _release_read(self, message: messages.ReleaseRead) -> None:
        self._reads.release(message.read)
        self._send_soon(messages.Done(message.number))

    def _store_data(self, message: messages.StoreData) -> None:
        self._writers.receive(message)

    def _commit_store(self, message: messages.CommitStore) -> None:
        self._writers.commit(message, partial(self._committed, message))

    def _committed(self, message: messages.CommitStore, error: Exception | None) -> None:
        if error is None:
            self._done(message)
        else:
            self._fail(message, error)

    def _close_store(self, message: messages.CloseStore) -> None:
        self._writers.discard(message.store)
        self._done(message)

    def _stats(self, message: messages.Stats) -> None:
        core = self._cache.core
        self._send_caught_up(core.l1.is_behind, lambda: messages.Counted(message.number, core.stats()))

    def _events(self, message: messages.Events) -> None:
        self._check_number(message.number)
        if sum(isinstance(held, HeldEvents) for held in self.held.values()) >= MAX_STREAMS:
            raise LimitError(f"a connection reads up to {MAX_STREAMS} streams of events")
        stream = self._cache.core.events.stream(message.capacity, self._tenant.salts)
        events = HeldEvents(message.number, self.held, self.connection, stream)
        self._tasks.add(events.task)
        events.task.add_done_callback(self._tasks.discard)

    # What waits.

    async def _query_lookup_hits(self, message: messages.QueryPrefetchLookupHits) -> Message:
        hits = await self._cache.core.requests.query_lookup_hits(self._scope.inner(message.request_id))
        return messages.Hits(message.number, self._scope.outer(hits))

    async def _query_status(self, message: messages.QueryPrefetchStatus) -> Message | None:
        request_id = self._scope.inner(message.request_id)
        result = await self._cache.core.requests.query_status(request_id)
        if (request := self._cache.core.requests.find(request_id)) is not None:
            self._claims[request_id] = request
        self._holders.claimed(request_id, True)
        loaded = messages.Loaded(message.number, self._scope.outer(result))
        if result.chunks:
            return loaded
        self._send_soon(loaded)
        return None

    async def _lookup(self, message: messages.Lookup) -> Message:
        return messages.Hits(message.number, await self._cache.lookup(self._layouts.prompt(message.prompt)))

    async def _explain(self, message: messages.Explain) -> Message:
        prompt = self._layouts.prompt(message.prompt)
        return messages.Explained(message.number, await self._cache.explain(prompt))

    async def _acquire_read(self, message: messages.AcquireRead) -> None:
        request_id = self._scope.inner(message.request_id)
        lease = self._cache.read(request_id, rank=message.rank, reader=message.reader)
        await self._reads.acquire(message, lease)

    async def _reserve_store(self, message: messages.ReserveStore) -> Message:
        prompt = self._layouts.prompt(message.prompt)
        expired = partial(self._writers.expired, message.number)
        writer = self._cache.core.writing.writer(prompt, message.rank, message.start_chunk, expired)
        return await self._writers.open(message.number, writer)

    async def _delete(self, message: messages.Delete) -> Message:
        return messages.Removed(message.number, await self._cache.delete(self._layouts.prompt(message.prompt)))

    async def _clear(self, message: messages.Clear) -> Message:
        self._tenant.check_trusted("clearing the cache")
        return messages.Removed(message.number, await self._cache.clear(message.tier))

    async def _flush(self, message: messages.Flush) -> Message:
        return messages.Flushed(message.number, await self._cache.flush(message.deadline_seconds))

    async def _add_backend(self, message: messages.AddBackend) -> Message:
        self._tenant.check_trusted("changing backends")
        await self._cache.add_backend(message.url, position=message.position)
        return messages.Done(message.number)

    async def _drain_backend(self, message: messages.DrainBackend) -> Message:
        self._tenant.check_trusted("changing backends")
        status = await self._cache.drain_backend(message.name, deadline_seconds=message.deadline_seconds)
        return messages.BackendTold(message.number, status)

    async def _remove_backend(self, message: messages.RemoveBackend) -> Message:
        self._tenant.check_trusted("changing backends")
        await self._cache.remove_backend(message.name)
        return messages.Done(message.number)

    async def _list_backends(self, message: messages.ListBackends) -> Message:
        self._tenant.check_trusted("listing backends")
        return messages.BackendsListed(message.number, await self._cache.backends())

    async def _reload(self, message: messages.Reload) -> Message:
        self._tenant.check_trusted("changing settings")
        return messages.Reloaded(message.number, *await self._reload_settings())

    async def _list_roots(self, message: messages.ListRoots) -> Message:
        roots = await self._cache.core.listing.roots(self._tenant.may_use)
        told = [messages.Root(describe(root.layout), root.adapter, root.salt, chunks) for root, chunks in roots]
        return messages.RootsListed(message.number, told)

    async def _list_chunks(self, message: messages.ListChunks) -> Message:
        which = message.model, message.salt, message.after or b"", message.limit
        chunks = await self._cache.core.listing.chunks(self._tenant.may_use, *which)
        return messages.ChunksListed(message.number, chunks)

    # The end.

    def _lost(self, error: Exception | None) -> None:
        """Release all that the connection holds."""
        log.info("%s is gone%s", self.name, f": {error}" if error is not None else "", extra=self.about)
        try:
            for held in list(self.held.values()):
                held.release()
            self._reads.close()
            self._writers.close()
        finally:
            self._left.set()
            self._closed(self)

    async def ended(self) -> None:
        """Return when the connection is gone, and nothing runs for it any more."""
        await self._left.wait()
        if running := {*self._tasks, *filter(None, [self._writers.copying])}:
            await asyncio.wait(running)


_Waits = Callable[[Session, Any], Coroutine[Any, Any, Message | None]]

_AT_ONCE: dict[type[Message], Callable[[Session, Any], None]] = {
    messages.RegisterLayout: Session._register_layout,
    messages.Prefetch: Session._prefetch,
    messages.Cancel: Session._cancel,
    messages.Unclaim: Session._unclaim,
    messages.ReleaseRead: Session._release_read,
    messages.StoreData: Session._store_data,
    messages.CommitStore: Session._commit_store,
    messages.CloseStore: Session._close_store,
    messages.Renew: Session._renew,
    messages.EndRequest: Session._end_request,
    messages.Stats: Session._stats,
    messages.Events: Session._events,
    messages.Ping: Session._done,
}
_WAITING: dict[type[Message], _Waits] = {
    messages.QueryPrefetchLookupHits: Session._query_lookup_hits,
    messages.QueryPrefetchStatus: Session._query_status,
    messages.Lookup: Session._lookup,
    messages.Explain: Session._explain,
    messages.AcquireRead: Session._acquire_read,
    messages.ReserveStore: Session._reserve_store,
    messages.Delete: Session._delete,
    messages.Clear: Session._clear,
    messages.Flush: Session._flush,
    messages.AddBackend: Session._add_backend,
    messages.DrainBackend: Session._drain_backend,
    messages.RemoveBackend: Session._remove_backend,
    messages.ListBackends: Session._list_backends,
    messages.ListRoots: Session._list_roots,
    messages.Reload: Session._reload,
    messages.ListChunks: Session._list_chunks,
}
