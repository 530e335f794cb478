"""One connection: what it asks for, what it holds, and what is released when it ends.

What needs no waiting is done in the step in which it came, in order; what waits is a task, and delays nothing behind
it.
"""

import asyncio
import logging
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec

from async_cache.aio.slices import InTurns, working_for
from async_cache.cache import AsyncCache
from async_cache.config import ServerConfig
from async_cache.errors import AsyncCacheError, ConnectionLostError, LimitError, ProtocolError
from async_cache.handles.prefetch import Prefetch, Promised
from async_cache.prompt.layout import HASH_AT_ONCE_TOKENS, ModelLayout, Prompt
from async_cache.prompt.parts import Parts
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.messages import (
    Decoder,
    Large,
    Message,
    encode,
    encode_each,
    encoded_array,
    failed,
    read,
)
from async_cache.protocol.parts import split_hits, split_result
from async_cache.server import costs
from async_cache.server.access import Scope, Tenant, before_own_ids
from async_cache.server.accounts import Account, Accounts, record_bytes
from async_cache.server.administration import Administration
from async_cache.server.deletions import ModelDeletions, told
from async_cache.server.events import MAX_STREAMS, HeldEvents
from async_cache.server.held import Held, Table, Wait
from async_cache.server.layouts import Layouts, SharedLayouts, is_small, make
from async_cache.server.making import Making
from async_cache.server.partials import TenantPartials
from async_cache.server.prefetches import HeldPrefetch, Holders, Holding
from async_cache.server.reads import Reads
from async_cache.server.roles import OF_ALL_ROLES, OF_ROLES
from async_cache.server.segment import ClientSegment
from async_cache.server.stats import stats_for
from async_cache.server.turns import LIGHT, Turns
from async_cache.server.writers import Writers
from async_cache.values import Hold

log = logging.getLogger(__name__)

A = TypeVar("A")
_Begins = messages.Prefetch | messages.PrefetchSegments

_SPANS_AT_ONCE = 2048  # that are encoded in a step: a millisecond
_RELEASED_AT_ONCE = 64  # of what a connection holds when it is gone: a millisecond or two
_SMALL_BYTES = 4096  # of an answer; what is larger is counted until it is read
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
    partials_of: Callable[[Account], TenantPartials]
    """What knows of frames that have begun, of the connections of a tenant."""
    reload: Callable[[], Awaitable[tuple[list[str], list[str]]]]
    hold: Callable[[], Hold | None]
    """The longest of the loop, of late."""
    turns: Turns
    accounts: Accounts
    deletions: ModelDeletions


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
        self.held = Table()
        self.name = name
        self.about = {"tenant": tenant.name, "namespace": namespace}
        """For the log: whose it is."""
        self._account = account = shared.accounts.of(tenant)
        self._turn = shared.turns.of(tenant.name, self._resume_turn)
        self._context = copy_context()
        self._context.run(working_for.set, tenant.name)
        self.connection = Connection(
            _decoder,
            self._handle,
            self._lost,
            stall_seconds=config.stall_timeout_seconds,
            partials=shared.partials_of(account),
            admits=self._turn.admits,
            name=name,
        )
        self._making = Making(self.connection, self._turn, shared.makers, self._spawn, self._fail)
        self._administration = Administration(cache, tenant, account, shared.reload)
        self._cache, self._core = cache, cache.core
        self._shared = shared
        self._max_requests = config.max_requests
        self.tenant = tenant
        self._has_role = tenant.role != "all"
        self._closed = closed
        self._scope = Scope(tenant, namespace)
        self._layouts = Layouts(cache, shared.layouts, tenant, account, config.max_message_objects)
        self._holders = shared.holders
        self._reads = Reads(
            self.held,
            self.connection,
            cache.core,
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
        if kind is Large:
            self._making.begin(message, costs.of_large(len(message.payload)), read, message, self._read, in_thread=True)
            return
        try:
            if self._has_role and kind not in OF_ALL_ROLES:
                self.tenant.check_role(OF_ROLES.get(kind, "all"))
            at_once = _AT_ONCE.get(kind)
            if at_once is not None:
                at_once(self, message)
            elif kind in _OF_PROMPTS:
                wires = (message.prompt,)
                self._of_prompts(message, wires, self._layouts.prompt, message.prompt)
            elif kind in _OF_PARTS:
                self._of_prompts(message, message.prompts, self._layouts.parts, message.prompts)
            else:
                self._check_number(message.number)
                waiting = _WAITING.get(kind)
                ask = self._administration.answer if waiting is None else partial(waiting, self)
                self._wait(message, partial(ask, message))
        except ProtocolError:
            raise  # to the connection, which sends the client away
        except Exception as error:
            self._fail(message, error)

    def _read(self, _: Large, message: Any) -> None:
        self._handle(message)

    def _of_prompts(
        self, message: Any, wires: Sequence[messages.WirePrompt], make: Callable[[Any], Prompt | Parts], of: Any
    ) -> None:
        """Make the prompt of a message, or its prompts, and do what is asked of it."""
        self._check_number(message.number)
        chunks, cost = self._layouts.check(wires)
        ask = partial(self._ask, wires)
        if cost <= LIGHT:
            self._turn.charge(cost)
            ask(message, make(of))
            return
        tokens = max(chunks * self._layouts.chunk_tokens(wires[0]), sum(map(costs.tokens_of, wires)))
        few = chunks <= costs.AT_ONCE_CHUNKS and tokens <= HASH_AT_ONCE_TOKENS
        self._making.begin(message, cost, make, of, ask, in_thread=not few)

    def _ask(self, wires: Sequence[messages.WirePrompt], message: Any, made: Prompt | Parts) -> None:
        self._layouts.check_fits(wires, made.parts)
        kind = type(message)
        if isinstance(made, Parts):
            _OF_PARTS[kind](self, message, made)
        else:
            _OF_PROMPTS[kind](self, message, made)

    def _register_layout(self, message: messages.RegisterLayout) -> None:
        self._layouts.check_new(message)
        description = message.description
        if is_small(description):
            self._registered(message, make(description))
        else:
            cost = costs.of_layout(description)
            self._making.begin(message, cost, make, description, self._registered, in_thread=True)

    def _registered(self, message: messages.RegisterLayout, layout: ModelLayout) -> None:
        self.connection.send(self._layouts.register(message, layout))

    def _check_number(self, number: int) -> None:
        """Check that one more may be held, under this number. Raises ValueError or LimitError."""
        if number in self.held:
            raise ValueError(f"the number {number} is that of another request")
        under_way = self.held.requests
        if under_way >= self._max_requests:
            raise LimitError(f"{under_way} requests of this connection are under way, which is the limit")

    def _wait(self, message: Any, ask: "_Asks") -> None:
        self._account.take("waiting")
        wait = Wait(message.number, self.held, self.connection, self._answer(message, ask), self._context)
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
                self._send_counted(answer)
        except Exception as error:
            self._fail(message, error)

    def _send_counted(self, answer: Message) -> None:
        """Send an answer that may be large: what the clients of a tenant do not read is bounded. Raises LimitError."""
        payload = encode(answer)
        if len(payload) > _SMALL_BYTES:
            self._account.take("unread_bytes", len(payload))
            self._spawn(self._until_read(len(payload)))
        self.connection.send_payload(payload)

    async def _until_read(self, size_bytes: int) -> None:
        try:
            with suppress(ConnectionLostError):
                await self.connection.drained()
        finally:
            self._account.give_unread(size_bytes)

    def _fail(self, message: Any, error: Exception) -> None:
        if isinstance(error, ProtocolError):
            log.warning("%s is sent away: %s", self.name, error)
            self.connection.fail(error)
            return
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
        waits = message.wait_for_writers_seconds if isinstance(message, messages.AwaitingPrefetch) else None
        prefetch = partial(self._cache.prefetch, skip_tokens=message.skip_tokens, wait_for_writers_seconds=waits)
        self._begin(message, prompt, partial(prefetch, prompt))

    def _prefetch_segments(self, message: messages.PrefetchSegments, parts: Parts) -> None:
        self._begin(message, parts, partial(self._core.controller.start_parts, parts))

    def _begin(self, message: _Begins, asked: Prompt | Parts, start: Callable[..., Prefetch]) -> None:
        """Begin a request, on the account of this connection's tenant."""
        request_id, objects = self._scope.inner(message.request_id), asked.layout.objects
        size_bytes = record_bytes(len(asked), costs.objects_of(asked.layout))
        is_new = self._holders.find(request_id) is None
        if is_new:
            self._account.take_request(size_bytes)
        try:
            prefetch = self._context.run(
                start,
                request_id=request_id,
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
        if request is not None and self._core.requests.find(request_id) is request:
            self._core.requests.unclaim(request_id)
            self._holders.claimed(request_id, False)
        self._done(message)

    def _renew(self, message: messages.Renew) -> None:
        self._core.requests.renew(self._scope.inner(message.request_id))
        self._done(message)

    def _end_request(self, message: messages.EndRequest) -> None:
        rooms = self._core.l1.rooms
        before = rooms.given()
        self._core.requests.end(self._scope.inner(message.request_id))
        given = rooms.given()
        if given == before:
            self._send_soon(messages.Done(message.number))
        else:
            self._loop.call_soon(self._send_caught_up, given, partial(messages.Done, message.number))

    def _send_caught_up(self, given: Sequence[int], answer: Callable[[], Message]) -> None:
        """Send what is true when all that was released by then is given back: of very much, that takes some turns."""
        if self._core.l1.rooms.has_done(given):
            self.connection.send(answer())
        else:
            self._loop.call_soon(self._send_caught_up, given, answer)

    def _acquire_read(self, message: messages.AcquireRead) -> None:
        self._check_number(message.number)
        if not self._reads.acquire_nowait(message):
            self._wait(message, partial(self._reads.acquire, message))

    def _acquire_stream(self, message: messages.AcquireStream) -> None:
        self._check_number(message.number)
        self._wait(message, partial(self._reads.stream, message))

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
        account, hold = self._account, self._shared.hold
        count = partial(stats_for, self._core, self.tenant, account)
        self._send_caught_up(self._core.l1.rooms.given(), lambda: messages.Counted(message.number, count(hold())))

    def _events(self, message: messages.Events) -> None:
        self._check_number(message.number)
        if self.held.streams >= MAX_STREAMS:
            raise LimitError(f"a connection reads up to {MAX_STREAMS} streams of events")
        stream = self._cache.core.events.stream(message.capacity, self.tenant.salts)
        events = HeldEvents(message.number, self.held, self.connection, stream)
        self._tasks.add(events.task)
        events.task.add_done_callback(self._tasks.discard)

    # What waits.

    async def _query_lookup_hits(self, message: messages.QueryPrefetchLookupHits) -> Message:
        hits = await self._core.requests.query_lookup_hits(self._scope.inner(message.request_id))
        return messages.Hits(message.number, *split_hits(self._scope.outer(hits)))

    async def _query_status(self, message: messages.QueryPrefetchStatus) -> None:
        request_id = self._scope.inner(message.request_id)
        result = await self._core.requests.query_status(request_id)
        if (request := self._core.requests.find(request_id)) is not None:
            self._claims[request_id] = request
        self._holders.claimed(request_id, True)
        loaded = messages.Loaded(message.number, *split_result(self._scope.outer(result)))
        if result.chunks:
            self.connection.send(loaded)  # however much is unread: what was claimed is not handed out again
        else:
            self._send_soon(loaded)

    async def _lookup(self, message: messages.Lookup, prompt: Prompt) -> Message:
        return messages.Hits(message.number, await self._cache.lookup(prompt))

    async def _lookup_segments(self, message: messages.LookupSegments, parts: Parts) -> Message:
        return messages.Hits(message.number, *split_hits(await self._core.count_hits(parts)))

    async def _explain(self, message: messages.Explain, prompt: Prompt) -> Message:
        explanation = await self._cache.explain(prompt)
        if len(explanation.spans) <= _SPANS_AT_ONCE:
            return messages.Explained(message.number, explanation)
        parts: list[bytes] = []
        async for spans in InTurns(explanation.spans, _SPANS_AT_ONCE):
            parts.append(encode_each(spans))
        array: Any = encoded_array(len(explanation.spans), parts)
        return messages.Explained(message.number, msgspec.structs.replace(explanation, spans=array))

    async def _retain(self, message: messages.Retain, prompt: Prompt) -> Message:
        kept = await self._cache.retain(prompt, tokens=message.tokens, ttl_seconds=message.ttl_seconds)
        return messages.Kept(message.number, kept)

    async def _list_retained(self, message: messages.ListRetained) -> Message:
        async with self._account.listing:
            kept = await self._cache.core.retentions.retained(self.tenant.may_use)
        return messages.RetainedListed(message.number, kept)

    async def _warm(self, message: messages.Warm, prompt: Prompt) -> Message:
        size_bytes = record_bytes(len(prompt), self._layouts.objects(message.prompt))
        self._account.take_request(size_bytes)
        request_id = self._core.requests.new_id(before_own_ids(self.tenant))
        try:
            begun = self._cache.prefetch(prompt, request_id=request_id, deadline_seconds=message.deadline_seconds)
            result = msgspec.structs.replace(await begun.load_done, request_id="")
        finally:
            self._core.requests.end(request_id)
            self._account.give_request(size_bytes)
        return messages.Loaded(message.number, result)

    async def _hint(self, message: messages.Hint, prompt: Prompt) -> Message:
        known = message.output_tokens, message.returns, message.within_seconds
        await self._cache.hint(prompt, output_tokens=known[0], returns=known[1], within_seconds=known[2])
        return messages.Done(message.number)

    async def _reserve_store(self, message: messages.ReserveStore, prompt: Prompt) -> Message:
        expired = partial(self._writers.expired, message.number)
        make = partial(self._cache.core.writing.writer, prompt, message.rank, message.start_chunk, expired)
        return await self._writers.open(message, prompt, lambda chunks: make(most=chunks))

    async def _delete(self, message: messages.Delete, prompt: Prompt) -> Message:
        return messages.Removed(message.number, await self._cache.delete(prompt))

    async def _delete_model(self, message: messages.DeleteModel) -> Message:
        asked = message.model, message.revision, message.adapter, message.salt
        deletion = self._shared.deletions.begin(self.tenant, *asked)
        return messages.ModelDeleted(message.number, told(self.tenant, await asyncio.shield(deletion)))

    async def _flush(self, message: messages.Flush) -> Message:
        owners = None if self.tenant.trusted else self.tenant.salts
        return messages.Flushed(
            message.number, await self._cache.core.writeback.flush(message.deadline_seconds, owners)
        )

    # The end.

    def _lost(self, error: Exception | None) -> None:
        """Release all that the connection holds: at once if that is little, and else so much of it in each turn."""
        log.info("%s is gone%s", self.name, f": {error}" if error is not None else "", extra=self.about)
        if len(self.held) <= _RELEASED_AT_ONCE:
            self._release_all()
        else:
            task = self._loop.create_task(self._release_in_turns(), context=self._context)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _release_in_turns(self) -> None:
        seen: set[Held] = set()
        try:
            while new := [held for held in self.held.values() if held not in seen]:  # a wait may have just acquired it
                seen.update(new)
                async for part in InTurns(new, _RELEASED_AT_ONCE):
                    for held in part:
                        held.release()
        finally:
            self._release_all()

    def _release_all(self) -> None:
        try:
            for held in list(self.held.values()):
                held.release()
            self._reads.close()
            self._writers.close()
        finally:
            del self._making  # it knows this session, which would wait for a collection of garbage
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


def _waits(handler: Callable[[Session, Any, A], Coroutine[Any, Any, Message]]) -> Callable[[Session, Any, A], None]:
    """Have a message about a prompt, or several, answered by a task."""
    return lambda session, message, asked: session._wait(message, partial(handler, session, message, asked))


_Asks = Callable[[], Coroutine[Any, Any, Message | None]]
_Waits = Callable[[Session, Any], Coroutine[Any, Any, Message | None]]

_OF_PROMPTS: dict[type[Message], Callable[[Session, Any, Prompt], None]] = {
    messages.Prefetch: Session._prefetch,
    messages.AwaitingPrefetch: Session._prefetch,
    messages.Lookup: _waits(Session._lookup),
    messages.Explain: _waits(Session._explain),
    messages.Retain: _waits(Session._retain),
    messages.Warm: _waits(Session._warm),
    messages.Hint: _waits(Session._hint),
    messages.ReserveStore: _waits(Session._reserve_store),
    messages.Delete: _waits(Session._delete),
}

_OF_PARTS: dict[type[Message], Callable[[Session, Any, Parts], None]] = {
    messages.PrefetchSegments: Session._prefetch_segments,
    messages.LookupSegments: _waits(Session._lookup_segments),
}

_AT_ONCE: dict[type[Message], Callable[[Session, Any], None]] = {
    messages.RegisterLayout: Session._register_layout,
    messages.Cancel: Session._cancel,
    messages.Unclaim: Session._unclaim,
    messages.AcquireRead: Session._acquire_read,
    messages.AcquireStream: Session._acquire_stream,
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
    messages.ListRetained: Session._list_retained,
    messages.Flush: Session._flush,
    messages.DeleteModel: Session._delete_model,
}
