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
from async_cache.prompt.layout import HASH_AT_ONCE_TOKENS, ModelLayout, Prompt
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.messages import Decoder, Message, failed
from async_cache.protocol.partials import Partials
from async_cache.protocol.prompts import describe
from async_cache.server import costs
from async_cache.server.access import Scope, Tenant
from async_cache.server.accounts import Accounts, record_bytes
from async_cache.server.events import MAX_STREAMS, HeldEvents
from async_cache.server.held import Held, Wait
from async_cache.server.layouts import Layouts, SharedLayouts, is_small, make
from async_cache.server.prefetches import HeldPrefetch, Holders, Holding
from async_cache.server.reads import Reads
from async_cache.server.segment import ClientSegment
from async_cache.server.turns import LIGHT, Turns
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
    makers: Executor
    """Make long prompts and large layouts."""
    partials: Partials
    reload: Callable[[], Awaitable[tuple[list[str], list[str]]]]
    turns: Turns
    accounts: Accounts


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
        self._account = account = shared.accounts.of(tenant)
        self._turn = shared.turns.of(tenant.name, self._resume_turn)
        self.connection = Connection(
            _decoder,
            self._handle,
            self._lost,
            stall_seconds=config.stall_timeout_seconds,
            partials=shared.partials,
            admits=self._turn.admits,
            name=name,
        )
        self._makers = shared.makers
        self._is_held_up = False  # until a heavy message has been begun
        self._cache = cache
        self._reload_settings = shared.reload
        self._max_requests = config.max_requests
        self.tenant = tenant
        self._closed = closed
        self._scope = Scope(tenant, namespace)
        self._layouts = Layouts(cache, shared.layouts, tenant, account)
        self._holders = shared.holders
        self._reads = Reads(
            self.held,
            self.connection,
            cache.memory,
            self._layouts,
            self._scope,
            self._turn,
            self._holders,
            account,
            lease_seconds=None if tenant.trusted else cache.core.config.lease_ttl_seconds,
            mapped=mapped,
        )
        self._writers = Writers(self.held, self.connection, segment, shared.copiers, self._turn, account)
        self._claims: weakref.WeakValueDictionary[str, Promised] = weakref.WeakValueDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._left = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __repr__(self) -> str:
        return f"<Session of tenant {self.tenant.name!r}, {len(self.held)} held, {self.connection!r}>"

    # Messages, as they come.

    def _resume_turn(self) -> None:
        self.connection.resume_turn()

    def _handle(self, message: Any) -> None:
        kind = type(message)
        try:
            at_once = _AT_ONCE.get(kind)
            if at_once is not None:
                at_once(self, message)
            elif kind in _OF_PROMPTS:
                self._of_prompt(message)
            else:
                self._check_number(message.number)
                self._wait(message, partial(_WAITING[kind], self, message))
        except ProtocolError:
            raise  # to the connection, which sends the client away
        except Exception as error:
            self._fail(message, error)

    # What is heavy waits for its turn, and what takes long to make is made in a thread. Nothing behind it is looked at
    # meanwhile: messages are begun in the order in which they came.

    def _of_prompt(self, message: Any) -> None:
        """Make the prompt of a message, and do what is asked of it."""
        self.tenant.check_role("store" if type(message) in _OF_STORES else "read")
        self._check_number(message.number)
        wire = message.prompt
        chunks, cost = self._layouts.check(wire)
        if cost <= LIGHT:
            self._turn.charge(cost)
            self._ask(message, self._layouts.prompt(wire))
            return
        if chunks <= costs.AT_ONCE_CHUNKS and chunks * self._layouts.chunk_tokens(wire) <= HASH_AT_ONCE_TOKENS:
            self._begin(cost, partial(self._make_at_once, message))
        else:
            self._begin(cost, partial(self._make_in_thread, message, self._layouts.prompt, wire, self._ask))

    def _ask(self, message: Any, prompt: Prompt) -> None:
        self._layouts.check_fits(message.prompt, prompt)
        _OF_PROMPTS[type(message)](self, message, prompt)

    def _register_layout(self, message: messages.RegisterLayout) -> None:
        self._layouts.check_new(message)
        description = message.description
        if is_small(description):
            self._registered(message, make(description))
        else:
            work = partial(self._make_in_thread, message, make, description, self._registered)
            self._begin(costs.of_layout(description), work)

    def _registered(self, message: messages.RegisterLayout, layout: ModelLayout) -> None:
        self.connection.send(self._layouts.register(message, layout))

    def _begin(self, cost: int, work: Callable[[], None]) -> None:
        """Begin heavy work now, or when it is this connection's turn."""
        if not self._turn.begin(cost, work):
            self._hold_up()

    def _make_at_once(self, message: Any) -> None:
        try:
            self._ask(message, self._layouts.prompt(message.prompt))
        except Exception as error:
            self._fail(message, error)
        self._go_on()

    def _make_in_thread(
        self, message: Any, make: Callable[[Any], Any], of: Any, then: Callable[[Any, Any], None]
    ) -> None:
        self._hold_up()
        self._turn.hold()
        self._spawn(self._made(message, make, of, then))

    async def _made(self, message: Any, make: Callable[[Any], Any], of: Any, then: Callable[[Any, Any], None]) -> None:
        try:
            made = await self._loop.run_in_executor(self._makers, make, of)
            if self.connection.is_open:
                then(message, made)
        except Exception as error:
            self._fail(message, error)
        finally:
            self._turn.let_go()
            self._go_on()

    def _hold_up(self) -> None:
        self._is_held_up = True
        self.connection.pause_reading()

    def _go_on(self) -> None:
        if self._is_held_up:
            self._is_held_up = False
            self.connection.resume_reading()

    def _check_number(self, number: int) -> None:
        """Check that one more may be held, under this number. Raises ValueError or LimitError."""
        if number in self.held:
            raise ValueError(f"the number {number} is that of another request")
        if len(self.held) >= self._max_requests:
            under_way = sum(held.counts for held in self.held.values())
            if under_way >= self._max_requests:
                raise LimitError(f"{under_way} requests of this connection are under way, which is the limit")

    def _wait(self, message: Any, ask: "_Asks") -> None:
        self._account.take("waiting")
        wait = Wait(message.number, self.held, self.connection, self._answer(message, ask))
        self._tasks.add(wait.task)
        wait.task.add_done_callback(self._answered)

    def _answered(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._account.give("waiting")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, message: Any, ask: "_Asks") -> None:
        try:
            answer = await ask()
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

    def _prefetch(self, message: messages.Prefetch, prompt: Prompt) -> None:
        request_id, objects = self._scope.inner(message.request_id), prompt.layout.objects
        size_bytes = record_bytes(len(prompt), self._layouts.objects(message.prompt))
        is_new = self._holders.find(request_id) is None
        if is_new:
            self._account.take_request(size_bytes)
        try:
            prefetch = self._cache.prefetch(
                prompt,
                request_id=request_id,
                skip_tokens=message.skip_tokens,
                ranks=message.ranks,
                deadline_seconds=message.deadline_seconds,
                traceparent=message.traceparent,
            )
        except BaseException:
            if is_new:
                self._account.give_request(size_bytes)
            raise
        mask = objects.full_mask if message.ranks is None else objects.mask_of_ranks(message.ranks)
        holding = Holding(self._account, size_bytes, objects.rooms[mask])
        HeldPrefetch(message.number, self.held, self.connection, prefetch, self._holders, self._scope, holding)

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
        stream = self._cache.core.events.stream(message.capacity, self.tenant.salts)
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

    async def _lookup(self, message: messages.Lookup, prompt: Prompt) -> Message:
        return messages.Hits(message.number, await self._cache.lookup(prompt))

    async def _explain(self, message: messages.Explain, prompt: Prompt) -> Message:
        return messages.Explained(message.number, await self._cache.explain(prompt))

    async def _acquire_read(self, message: messages.AcquireRead) -> None:
        request_id = self._scope.inner(message.request_id)
        lease = self._cache.read(request_id, rank=message.rank, reader=message.reader)
        await self._reads.acquire(message, lease)

    async def _reserve_store(self, message: messages.ReserveStore, prompt: Prompt) -> Message:
        expired = partial(self._writers.expired, message.number)
        make = partial(self._cache.core.writing.writer, prompt, message.rank, message.start_chunk, expired)
        return await self._writers.open(message, prompt, lambda chunks: make(most=chunks))

    async def _delete(self, message: messages.Delete, prompt: Prompt) -> Message:
        return messages.Removed(message.number, await self._cache.delete(prompt))

    async def _clear(self, message: messages.Clear) -> Message:
        self.tenant.check_trusted("clearing the cache")
        return messages.Removed(message.number, await self._cache.clear(message.tier))

    async def _flush(self, message: messages.Flush) -> Message:
        return messages.Flushed(message.number, await self._cache.flush(message.deadline_seconds))

    async def _add_backend(self, message: messages.AddBackend) -> Message:
        self.tenant.check_trusted("changing backends")
        await self._cache.add_backend(message.url, position=message.position)
        return messages.Done(message.number)

    async def _drain_backend(self, message: messages.DrainBackend) -> Message:
        self.tenant.check_trusted("changing backends")
        status = await self._cache.drain_backend(message.name, deadline_seconds=message.deadline_seconds)
        return messages.BackendTold(message.number, status)

    async def _remove_backend(self, message: messages.RemoveBackend) -> Message:
        self.tenant.check_trusted("changing backends")
        await self._cache.remove_backend(message.name)
        return messages.Done(message.number)

    async def _list_backends(self, message: messages.ListBackends) -> Message:
        self.tenant.check_trusted("listing backends")
        return messages.BackendsListed(message.number, await self._cache.backends())

    async def _reload(self, message: messages.Reload) -> Message:
        self.tenant.check_trusted("changing settings")
        return messages.Reloaded(message.number, *await self._reload_settings())

    async def _list_roots(self, message: messages.ListRoots) -> Message:
        roots = await self._cache.core.listing.roots(self.tenant.may_use)
        told = [messages.Root(describe(root.layout), root.adapter, root.salt, chunks) for root, chunks in roots]
        return messages.RootsListed(message.number, told)

    async def _list_chunks(self, message: messages.ListChunks) -> Message:
        which = message.model, message.salt, message.after or b"", message.limit
        chunks = await self._cache.core.listing.chunks(self.tenant.may_use, *which)
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
            self._turn.leave()
            self._layouts.close()
            self._account.give("connections")
            self._left.set()
            self._closed(self)

    async def ended(self) -> None:
        """Return when the connection is gone, and nothing runs for it any more."""
        await self._left.wait()
        if running := {*self._tasks, *filter(None, [self._writers.copying])}:
            await asyncio.wait(running)


def _waits(handler: Callable[[Session, Any, Prompt], Coroutine[Any, Any, Message]]) -> "_Handler":
    """Have a message about a prompt answered by a task."""
    return lambda session, message, prompt: session._wait(message, partial(handler, session, message, prompt))


_Asks = Callable[[], Coroutine[Any, Any, Message | None]]
_Waits = Callable[[Session, Any], Coroutine[Any, Any, Message | None]]
_Handler = Callable[[Session, Any, Prompt], None]

_OF_PROMPTS: dict[type[Message], _Handler] = {
    messages.Prefetch: Session._prefetch,
    messages.Lookup: _waits(Session._lookup),
    messages.Explain: _waits(Session._explain),
    messages.ReserveStore: _waits(Session._reserve_store),
    messages.Delete: _waits(Session._delete),
}

_OF_STORES = frozenset((messages.ReserveStore, messages.Delete))

_AT_ONCE: dict[type[Message], Callable[[Session, Any], None]] = {
    messages.RegisterLayout: Session._register_layout,
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
    messages.AcquireRead: Session._acquire_read,
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
