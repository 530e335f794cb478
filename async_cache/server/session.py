"""One connection: what it asks for, what it holds, and what is given back when it ends.

What needs no waiting is answered in the step in which it came, in order; what waits is a task, and holds up nothing
behind it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

import msgspec

from async_cache.cache import AsyncCache
from async_cache.config import ServerConfig
from async_cache.errors import AsyncCacheError, LimitError, ProtocolError
from async_cache.handles.prefetch import Prefetch
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.messages import Decoder, Message, failed
from async_cache.protocol.prompts import describe, layout_of, unpack
from async_cache.server.access import Tenant
from async_cache.server.reads import Reads
from async_cache.server.registry import Registry
from async_cache.server.segment import ClientSegment
from async_cache.server.stores import Stores
from async_cache.values import LoadResult, LookupHits

log = logging.getLogger(__name__)

T = TypeVar("T")
Told = TypeVar("Told", LookupHits, LoadResult)

_MAX_LAYOUTS = 256
_MAX_LAYOUT_OBJECTS = 2**18  # in a chunk of each of a connection's layouts, together
_MAX_OBJECTS = 2**18  # in the prompt of a message: what the loop can look up in a fraction of a second
_decoder = Decoder(messages.Request)


class Session:
    """OPEN -> CLOSED: then nothing is held any more, but what a copy still touches."""

    def __init__(
        self,
        cache: AsyncCache,
        registry: Registry,
        config: ServerConfig,
        copiers: Executor,
        tenant: Tenant,
        namespace: str,
        segment: ClientSegment | None,
        *,
        mapped: bool,
        closed: "Callable[[Session], None]",
    ):
        self.connection = Connection(_decoder, self._handle, self._lost, stall_seconds=config.stall_timeout_seconds)
        self._cache = cache
        self._registry = registry
        self._max_requests = config.max_requests
        self._tenant = tenant
        self._scope = f"{tenant.name}\0{namespace}\0"  # no name has a control character
        self._closed = closed
        self._layouts: dict[int, ModelLayout] = {}
        self._layout_numbers: dict[int, int] = {}  # by identity
        self._layout_objects = 0
        self._prefetches: dict[int, Prefetch] = {}
        self._reads = Reads(self.connection, cache.memory, mapped=mapped)
        self._stores = Stores(segment, copiers, self.connection)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._left = asyncio.Event()

    # Messages, as they come.

    def _handle(self, message: Any) -> None:
        try:
            _HANDLERS[type(message)](self, message)
        except ProtocolError as error:
            self.connection.fail(error)
        except Exception as error:
            self._fail(message, error)

    def _fail(self, message: Any, error: Exception) -> None:
        if not isinstance(error, AsyncCacheError | ValueError | TypeError):
            log.error("%s failed", type(message).__name__, exc_info=error)
        answer = failed(message.number, error)
        answer.message = answer.message.replace(repr(self._scope)[1:-1], "")
        self.connection.send(answer)

    def _wait_for(self, message: Any, call: Coroutine[Any, Any, T], answer: Callable[[int, T], Message]) -> None:
        """Answer when the call returns."""
        try:
            self._check(message.number)
        except Exception:
            call.close()
            raise
        task = self._spawn(message.number, self._answer(message, call, answer))
        task.add_done_callback(lambda _: call.close())  # it may have been cancelled before its first step

    def _spawn(self, number: int, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self._tasks[number] = task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._tasks.pop(number))
        return task

    async def _answer(self, message: Any, call: Coroutine[Any, Any, T], answer: Callable[[int, T], Message]) -> None:
        try:
            self.connection.send(answer(message.number, await call))
        except Exception as error:
            self._fail(message, error)

    def _check(self, number: int) -> None:
        """Whether one more may begin under this number."""
        under_way: tuple[dict[int, Any], ...] = (
            self._tasks,
            self._prefetches,
            self._reads.leases,
            self._stores.writers,
        )
        if any(number in some for some in under_way):
            raise ValueError(f"the number {number} is that of another request")
        held = sum(map(len, under_way))
        if held >= self._max_requests:
            raise LimitError(f"{held} requests of this connection are under way, which is the limit")

    def _done(self, message: Any) -> None:
        self.connection.send(messages.Done(message.number))

    # Prompts.

    def _register_layout(self, message: messages.RegisterLayout) -> None:
        if message.layout in self._layouts:
            raise ValueError(f"layout {message.layout} is registered already")
        if len(self._layouts) >= _MAX_LAYOUTS:
            raise LimitError(f"a connection registers up to {_MAX_LAYOUTS} layouts")
        layout = layout_of(message.description)
        objects = self._layout_objects + layout.objects.full_mask.bit_count()
        if objects > _MAX_LAYOUT_OBJECTS:
            raise LimitError(f"the layouts of a connection have up to {_MAX_LAYOUT_OBJECTS} objects in a chunk")
        self._layout_objects = objects
        layout = self._registry.same(layout)
        self._layouts[message.layout] = layout
        self._layout_numbers[id(layout)] = message.layout
        others = self._registry.announce(layout) if self._tenant.trusted else []
        self.connection.send(messages.LayoutRegistered(message.number, [describe(other) for other in others]))

    def _prompt(self, wire: messages.WirePrompt) -> Prompt:
        """The prompt that a message names, if this tenant may use it."""
        layout = self._layouts.get(wire.layout)
        if layout is None:
            raise ValueError(f"layout {wire.layout} is not registered")
        if isinstance(wire, messages.Digests):
            self._tenant.check_trusted("prompts by their digests")
        self._tenant.check_salt(wire.salt)
        prompt = unpack(wire, layout)
        if len(prompt) * layout.objects.full_mask.bit_count() > _MAX_OBJECTS:
            raise LimitError(f"the prompt of a message has up to {_MAX_OBJECTS} objects")
        if isinstance(wire, messages.Digests) and not self._cache.core.fits(prompt):
            raise ValueError("the chunk hashes of the prompt belong to another layout")
        return prompt

    # Prefetching.

    def _prefetch(self, message: messages.Prefetch) -> None:
        number = message.number
        self._check(number)
        prefetch = self._cache.prefetch(
            self._prompt(message.prompt),
            request_id=self._scope + message.request_id,
            skip_tokens=message.skip_tokens,
            ranks=message.ranks,
            deadline_seconds=message.deadline_seconds,
        )
        self._prefetches[number] = prefetch
        self._registry.hold(prefetch, self, number)
        # Where the cache closes, none of both comes: then so does the connection.
        send, unscoped = self.connection.send, self._unscoped
        prefetch.promised.hits.tell(lambda hits: send(messages.LookupDone(number, unscoped(hits))))
        prefetch.promised.result.tell(lambda result: send(messages.LoadDone(number, unscoped(result))))

    def _unscoped(self, told: Told) -> Told:
        return msgspec.structs.replace(told, request_id=told.request_id[len(self._scope) :])

    def request_over(self, number: int) -> None:
        """The request of this prefetch is over, by whoever's doing."""
        if self._prefetches.pop(number, None) is not None:
            self.connection.send(messages.RequestOver(number))

    def request_claimed(self, number: int, *, claimed: bool) -> None:
        """The result of this prefetch was handed out, or given back, by whoever's doing."""
        self.connection.send(messages.RequestClaimed(number, claimed))

    def _cancel(self, message: messages.Cancel) -> None:
        """Also what was done already, but is not known yet to whoever gives it up."""
        if (prefetch := self._prefetches.get(message.call)) is not None:
            prefetch.cancel()
        self._reads.undo(message.call)
        self._stores.close(message.call)
        if (task := self._tasks.get(message.call)) is not None:
            task.cancel()
            self.connection.send(messages.Failed(message.call, "cancelled", "the client gave it up"))
        self._done(message)

    def _query_lookup_hits(self, message: messages.QueryPrefetchLookupHits) -> None:
        call = self._cache.query_lookup_hits(self._scope + message.request_id)
        self._wait_for(message, call, lambda number, hits: messages.Hits(number, self._unscoped(hits)))

    def _query_status(self, message: messages.QueryPrefetchStatus) -> None:
        call = self._cache.query_status(self._scope + message.request_id)
        self._wait_for(message, call, self._loaded)

    def _loaded(self, number: int, result: LoadResult) -> Message:
        self._registry.claimed(result.request_id, claimed=True)
        return messages.Loaded(number, self._unscoped(result))

    def _unclaim(self, message: messages.Unclaim) -> None:
        self._cache.core.requests.unclaim(self._scope + message.request_id)
        self._registry.claimed(self._scope + message.request_id, claimed=False)
        self._done(message)

    def _lookup(self, message: messages.Lookup) -> None:
        self._wait_for(message, self._cache.lookup(self._prompt(message.prompt)), messages.Hits)

    def _renew(self, message: messages.Renew) -> None:
        at_once(self._cache.renew(self._scope + message.request_id))
        self._done(message)

    def _end_request(self, message: messages.EndRequest) -> None:
        at_once(self._cache.end_request(self._scope + message.request_id))
        self._done(message)

    # Reading and writing.

    def _acquire_read(self, message: messages.AcquireRead) -> None:
        self._check(message.number)
        self._spawn(message.number, self._read(message))

    async def _read(self, message: messages.AcquireRead) -> None:
        try:
            lease = self._cache.read(self._scope + message.request_id, rank=message.rank, reader=message.reader)
            await self._reads.acquire(message, lease, self._describe, self._unscoped)
        except Exception as error:
            self._fail(message, error)

    def _describe(self, layout: ModelLayout) -> int | messages.Layout:
        number = self._layout_numbers.get(id(layout))
        return number if number is not None else describe(layout)

    def _release_read(self, message: messages.ReleaseRead) -> None:
        self._reads.release(message.read)
        self._done(message)

    def _reserve_store(self, message: messages.ReserveStore) -> None:
        expired = partial(self._stores.expired, message.number)
        prompt = self._prompt(message.prompt)
        writer = self._cache.core.writing.writer(prompt, message.rank, message.start_chunk, expired)
        self._wait_for(message, self._stores.open(message.number, writer), lambda _, reserved: reserved)

    def _store_data(self, message: messages.StoreData) -> None:
        try:
            self._stores.data(message)
        except ValueError as error:
            raise ProtocolError(str(error)) from error

    def _commit_store(self, message: messages.CommitStore) -> None:
        self._stores.commit(message, partial(self._committed, message))

    def _committed(self, message: messages.CommitStore, error: Exception | None) -> None:
        if error is None:
            self._done(message)
        else:
            self._fail(message, error)

    def _close_store(self, message: messages.CloseStore) -> None:
        self._stores.close(message.store)
        self._done(message)

    # The rest.

    def _delete(self, message: messages.Delete) -> None:
        self._wait_for(message, self._cache.delete(self._prompt(message.prompt)), messages.Removed)

    def _clear(self, message: messages.Clear) -> None:
        self._tenant.check_trusted("clearing the cache")
        self._wait_for(message, self._cache.clear(message.tier), messages.Removed)

    def _flush(self, message: messages.Flush) -> None:
        self._wait_for(message, self._cache.flush(message.deadline_seconds), messages.Flushed)

    def _stats(self, message: messages.Stats) -> None:
        self.connection.send(messages.Counted(message.number, at_once(self._cache.stats())))

    # The end.

    def _lost(self, error: Exception | None) -> None:
        """Give back all that the connection holds."""
        if error is not None:
            log.debug("a connection was lost: %s", error)
        try:
            self._give_back()
        finally:
            self._left.set()
            self._closed(self)

    def _give_back(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._reads.release_all()
        self._stores.close_all()
        prefetches, self._prefetches = self._prefetches, {}
        for number, prefetch in prefetches.items():
            if self._registry.let_go(prefetch, self, number):
                at_once(self._cache.end_request(prefetch.request_id))

    async def ended(self) -> None:
        """Return when the connection is gone, and nothing runs for it any more."""
        await self._left.wait()
        if running := {*self._tasks.values(), *filter(None, [self._stores.copying])}:
            await asyncio.wait(running)


_HANDLERS: dict[type[Message], Callable[[Session, Any], None]] = {
    messages.RegisterLayout: Session._register_layout,
    messages.Prefetch: Session._prefetch,
    messages.Cancel: Session._cancel,
    messages.QueryPrefetchLookupHits: Session._query_lookup_hits,
    messages.QueryPrefetchStatus: Session._query_status,
    messages.Lookup: Session._lookup,
    messages.AcquireRead: Session._acquire_read,
    messages.ReleaseRead: Session._release_read,
    messages.ReserveStore: Session._reserve_store,
    messages.StoreData: Session._store_data,
    messages.CommitStore: Session._commit_store,
    messages.CloseStore: Session._close_store,
    messages.Renew: Session._renew,
    messages.EndRequest: Session._end_request,
    messages.Delete: Session._delete,
    messages.Clear: Session._clear,
    messages.Flush: Session._flush,
    messages.Stats: Session._stats,
    messages.Ping: Session._done,
    messages.Unclaim: Session._unclaim,
}


def at_once(call: Coroutine[Any, Any, T]) -> T:
    """The result of a call that is known not to wait."""
    try:
        call.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    call.close()
    raise RuntimeError(f"{call!r} waits")
