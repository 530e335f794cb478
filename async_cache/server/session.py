"""One connection: what it asks for, what it holds, and what is given back when it ends.

What needs no waiting is answered in the step in which it came, in order; what waits is a task, and holds up nothing
behind it. Only a commit holds up what came behind it on its connection, until its bytes are copied: whoever commits a
chunk and then asks for it finds it.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

import msgspec

from async_cache.cache import AsyncCache
from async_cache.config import ServerConfig
from async_cache.errors import AsyncCacheError, LimitError, ProtocolError, WriterClosedError
from async_cache.layout import ModelLayout, Prompt
from async_cache.promise import Prefetch
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.frames import DATA_BYTES
from async_cache.protocol.messages import Decoder, Message, failed
from async_cache.protocol.prompts import describe, layout_of, unpack
from async_cache.reading import ReadLease
from async_cache.server.access import Tenant
from async_cache.server.registry import Registry
from async_cache.server.segment import ClientSegment
from async_cache.values import LoadResult, LookupHits
from async_cache.writing import WriteChunk, Writer

log = logging.getLogger(__name__)

T = TypeVar("T")
Told = TypeVar("Told", LookupHits, LoadResult)

_MAX_LAYOUTS = 256
_COPIED_AT_ONCE = 8 * 2**20  # bytes that are copied in a step of the loop, in a millisecond; the rest by threads
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
        self.connection = Connection(_decoder, self._received, self._lost, stall_seconds=config.stall_timeout_seconds)
        self._cache = cache
        self._memory = cache.memory
        self._registry = registry
        self._copiers = copiers
        self._max_requests = config.max_requests
        self._tenant = tenant
        self._scope = f"{tenant.name}\0{namespace}\0"  # no name has a control character
        self._segment = segment
        self._mapped = mapped
        self._closed = closed
        self._layouts: dict[int, ModelLayout] = {}
        self._layout_numbers: dict[int, int] = {}  # by identity
        self._prefetches: dict[int, Prefetch] = {}
        self._reads: dict[int, ReadLease] = {}
        self._stores: dict[int, Writer] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._copying: dict[WriteChunk, asyncio.Future[None]] = {}
        self._held_up: deque[Message] = deque()
        self._left = asyncio.Event()
        self._copied_bytes = 0  # in this step of the loop
        self._loop = asyncio.get_running_loop()

    # Messages, as they come.

    def _received(self, message: Any) -> None:
        if isinstance(message, messages.Ping):
            self._done(message)
        elif self._held_up or (self._copying and not isinstance(message, messages.CommitStore)):
            if len(self._held_up) >= self._max_requests:
                raise LimitError("too many messages wait for a commit")
            self._held_up.append(message)
        else:
            self._handle(message)

    def _handle(self, message: Any) -> None:
        try:
            _HANDLERS[type(message)](self, message)
        except ProtocolError:
            raise
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
        if any(number in under_way for under_way in (self._tasks, self._prefetches, self._reads, self._stores)):
            raise ValueError(f"the number {number} is that of another request")
        held = len(self._tasks) + len(self._prefetches) + len(self._reads) + len(self._stores)
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
        layout = self._registry.same(layout_of(message.description))
        self._layouts[message.layout] = layout
        self._layout_numbers[id(layout)] = message.layout
        self._done(message)

    def _prompt(self, wire: messages.WirePrompt) -> Prompt:
        """The prompt that a message names, if this tenant may use it."""
        layout = self._layouts.get(wire.layout)
        if layout is None:
            raise ValueError(f"layout {wire.layout} is not registered")
        if isinstance(wire, messages.Digests):
            self._tenant.check_trusted("prompts by their digests")
        self._tenant.check_salt(wire.salt)
        prompt = unpack(wire, layout)
        if isinstance(wire, messages.Digests) and not self._cache.fits(prompt):
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
        self._registry.hold(prefetch.request_id, self, number)
        # Where the cache closes, none of both comes: then so does the connection.
        send, unscoped = self.connection.send, self._unscoped
        prefetch.promised.hits.tell(lambda hits: send(messages.LookupDone(number, unscoped(hits))))
        prefetch.promised.result.tell(lambda result: send(messages.LoadDone(number, unscoped(result))))

    def _unscoped(self, told: Told) -> Told:
        return msgspec.structs.replace(told, request_id=told.request_id[len(self._scope) :])

    def request_over(self, number: int) -> None:
        """The request of this prefetch is over, by whoever's doing."""
        del self._prefetches[number]
        self.connection.send(messages.RequestOver(number))

    def _cancel(self, message: messages.Cancel) -> None:
        """Also what was done already, but is not known yet to whoever gives it up."""
        if (prefetch := self._prefetches.get(message.call)) is not None:
            prefetch.cancel()
        if (lease := self._reads.pop(message.call, None)) is not None:
            lease.undo()
        if (writer := self._stores.pop(message.call, None)) is not None:
            writer.close()
        if (task := self._tasks.get(message.call)) is not None:
            task.cancel()
            self.connection.send(messages.Failed(message.call, "cancelled", "the client gave it up"))
        self._done(message)

    def _query_lookup_hits(self, message: messages.QueryPrefetchLookupHits) -> None:
        call = self._cache.query_lookup_hits(self._scope + message.request_id)
        self._wait_for(message, call, lambda number, hits: messages.Hits(number, self._unscoped(hits)))

    def _query_status(self, message: messages.QueryPrefetchStatus) -> None:
        call = self._cache.query_status(self._scope + message.request_id)
        self._wait_for(message, call, lambda number, result: messages.Loaded(number, self._unscoped(result)))

    def _lookup(self, message: messages.Lookup) -> None:
        self._wait_for(message, self._cache.lookup(self._prompt(message.prompt)), messages.Hits)

    def _renew(self, message: messages.Renew) -> None:
        at_once(self._cache.renew(self._scope + message.request_id))
        self._done(message)

    def _end_request(self, message: messages.EndRequest) -> None:
        at_once(self._cache.end_request(self._scope + message.request_id))
        self._done(message)

    # Reading.

    def _acquire_read(self, message: messages.AcquireRead) -> None:
        self._check(message.number)
        self._spawn(message.number, self._read(message))

    async def _read(self, message: messages.AcquireRead) -> None:
        try:
            request_id = self._scope + message.request_id
            lease = await self._cache.read(request_id, rank=message.rank, reader=message.reader)
            self._reads[message.number] = lease
            pieces = [] if self._mapped else _pieces(lease, lease.layout.block_bytes[message.rank])
            self.connection.send(self._acquired(message, lease, sum(end - begin for _, begin, end in pieces)))
            for to, begin, end in pieces:
                await self.connection.drained()
                if self._reads.get(message.number) is not lease:
                    return
                self.connection.send(messages.ReadData(message.number, to, self._memory[begin:end]))
        except Exception as error:
            self._fail(message, error)

    def _acquired(self, message: messages.AcquireRead, lease: ReadLease, data_bytes: int) -> messages.ReadAcquired:
        layout = lease.layout
        number = self._layout_numbers.get(id(layout))
        held, block_bytes = layout.rank_masks[message.rank], layout.block_bytes[message.rank]
        offsets = [chunk.offset for chunk in lease]
        if not self._mapped:
            offsets = [n * block_bytes if offset is not None else None for n, offset in enumerate(offsets)]
        absent = [
            (n, [group for group, span in enumerate(chunk.spans()) if span is None])
            for n, chunk in enumerate(lease)
            if chunk.offset is not None and held & ~chunk.objects
        ]
        known = number if number is not None else describe(layout)
        buffer_bytes = len(lease) * block_bytes if data_bytes else 0
        result = self._unscoped(lease.result)
        return messages.ReadAcquired(message.number, result, known, offsets, absent, buffer_bytes, data_bytes)

    def _release_read(self, message: messages.ReleaseRead) -> None:
        lease = self._reads.pop(message.read, None)
        if lease is not None:
            lease.release()
        self._done(message)

    # Writing.

    def _reserve_store(self, message: messages.ReserveStore) -> None:
        writer = self._cache.store(self._prompt(message.prompt), rank=message.rank, start_chunk=message.start_chunk)
        self._wait_for(message, self._reserve(message.number, writer), lambda _, reserved: reserved)

    async def _reserve(self, number: int, writer: Writer) -> messages.StoreReserved:
        await writer
        self._stores[number] = writer
        writer.on_expired = partial(self._store_expired, number)
        return messages.StoreReserved(number, [chunk.index for chunk in writer], writer.shortfall)

    def _store_expired(self, number: int) -> None:
        if self._stores.pop(number, None) is not None:
            self.connection.send(messages.StoreClosed(number))

    def _chunk(self, store: int, position: int) -> WriteChunk:
        writer = self._stores.get(store)
        if writer is None:
            raise WriterClosedError("the writer is closed")
        if position >= len(writer):
            raise ValueError(f"position {position} of a store of {len(writer)} chunks")
        return writer[position]

    def _store_data(self, message: messages.StoreData) -> None:
        """Bytes for a chunk. A store that has expired meanwhile is told of by the commit: this is not answered."""
        if message.store not in self._stores:
            return
        chunk = self._chunk(message.store, message.position)
        data, begin = message.data, message.offset
        views = [view for view in chunk.views if view is not None]
        if chunk.committed or chunk in self._copying or begin + len(data) > sum(map(len, views)):
            raise ProtocolError("these bytes do not fit into the chunk")
        for view in views:
            part = data[: max(len(view) - begin, 0)]
            view[begin : begin + len(part)] = part
            data, begin = data[len(part) :], max(begin - len(view), 0)

    def _commit_store(self, message: messages.CommitStore) -> None:
        chunk = self._chunk(message.store, message.position)
        if chunk in self._copying:
            raise ValueError(f"the chunk at position {message.position} is being committed")
        if message.offset is None or chunk.committed:
            chunk.commit()
            self._done(message)
            return
        if self._segment is None:
            raise ValueError("the connection has no segment to copy from")
        views = [view for view in chunk.views if view is not None]
        self._copied_bytes += sum(map(len, views))
        if self._copied_bytes <= _COPIED_AT_ONCE and not self._copying:
            self._loop.call_soon(self._forget_copied)
            self._segment.copy(message.offset, views)
            chunk.commit()
            self._done(message)
            return
        copying = self._loop.run_in_executor(self._copiers, self._segment.copy, message.offset, views)
        self._copying[chunk] = copying = asyncio.ensure_future(copying)
        copying.add_done_callback(partial(self._copied, message, chunk))

    def _forget_copied(self) -> None:
        self._copied_bytes = 0

    def _copied(self, message: messages.CommitStore, chunk: WriteChunk, copying: "asyncio.Future[None]") -> None:
        """Publish the chunk, and go on with what waited for that."""
        del self._copying[chunk]
        try:
            copying.result()
            chunk.commit()
            self._done(message)
        except Exception as error:
            self._fail(message, error)
        self._close_segment()
        while self._held_up and not (self._copying and not isinstance(self._held_up[0], messages.CommitStore)):
            self._handle(self._held_up.popleft())

    def _close_store(self, message: messages.CloseStore) -> None:
        writer = self._stores.pop(message.store, None)
        if writer is not None:
            writer.close()
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
        for task in self._tasks.values():
            task.cancel()
        for lease in self._reads.values():
            lease.release()
        self._reads.clear()
        stores, self._stores = self._stores, {}
        for writer in stores.values():
            writer.expire()  # and not `close`: a copy may still write to its room
        prefetches, self._prefetches = self._prefetches, {}
        for number, prefetch in prefetches.items():
            if self._registry.let_go(prefetch.request_id, self, number):
                at_once(self._cache.end_request(prefetch.request_id))
        self._held_up.clear()
        self._memory.release()
        self._left.set()
        self._close_segment()
        self._closed(self)

    def _close_segment(self) -> None:
        """Close it when no copy reads from it any more."""
        if self._left.is_set() and not self._copying and self._segment is not None:
            self._segment.close()
            self._segment = None

    async def ended(self) -> None:
        """Return when the connection is gone, and nothing runs for it any more."""
        await self._left.wait()
        if running := {*self._tasks.values(), *self._copying.values()}:
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


def _pieces(chunks: ReadLease, block_bytes: int) -> list[tuple[int, int, int]]:
    """(where it goes in the client's buffer, begin and end in memory) of bounded pieces of what can be read."""
    return [
        (n * block_bytes + first - chunk.offset, first, min(first + DATA_BYTES, end))
        for n, chunk in enumerate(chunks)
        if chunk.offset is not None
        for begin, end in filter(None, chunk.spans())
        for first in range(begin, end, DATA_BYTES)
    ]
