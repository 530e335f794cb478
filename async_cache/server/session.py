"""One connection: what it asks for, what it holds, and what is released when it ends.

What needs no waiting is done in the step in which it came, in order; what waits is a task, and delays nothing behind
it.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

from async_cache.aio.forks import keep_from_children
from async_cache.aio.slices import InTurns, working_for
from async_cache.errors import AsyncCacheError, ConnectionLostError, LimitError, ProtocolError
from async_cache.prompt.layout import HASH_AT_ONCE_TOKENS, ModelLayout, Prompt
from async_cache.prompt.parts import Parts
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.messages import Decoder, Large, Message, encode, failed, read
from async_cache.server import costs
from async_cache.server.access import Scope, Tenant
from async_cache.server.administration import Administration
from async_cache.server.events import MAX_STREAMS, HeldEvents
from async_cache.server.held import Held, Table, Wait
from async_cache.server.layouts import Layouts, is_small, make
from async_cache.server.making import Making
from async_cache.server.queries import Queries
from async_cache.server.reads import Reads
from async_cache.server.requests import Requests
from async_cache.server.roles import OF_ALL_ROLES, OF_ROLES
from async_cache.server.segment import ClientSegment
from async_cache.server.shared import Shared
from async_cache.server.stats import stats_for
from async_cache.server.turns import LIGHT
from async_cache.server.writers import Writers

log = logging.getLogger(__name__)

A = TypeVar("A")

_RELEASED_AT_ONCE = 64  # of what a connection holds when it is gone: a millisecond or two
_SMALL_BYTES = 4096  # of an answer; what is larger is counted until it is read
_decoder = Decoder(messages.Request)


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
        keep_from_children(self.connection)
        self._making = Making(self.connection, self._turn, shared.makers, self._spawn, self._fail)
        self._administration = Administration(cache, tenant, account, shared.reload)
        self._queries = Queries(cache, tenant, account, shared.deletions)
        self._core = cache.core
        self._hold = shared.hold
        self._max_requests = config.max_requests
        self.tenant = tenant
        self._has_role = tenant.role != "all"
        self._closed = closed
        self._scope = scope = Scope(tenant, namespace)
        self._layouts = Layouts(cache, shared.layouts, tenant, account, config.max_message_objects)
        self._requests = Requests(self.held, self.connection, cache.core, scope, shared.holders, account, self._context)
        self._reads = Reads(
            self.held,
            self.connection,
            cache.core,
            self._layouts,
            scope,
            self._turn,
            shared.holders,
            account,
            lease_seconds=None if tenant.trusted else cache.core.config.lease_ttl_seconds,
            mapped=mapped,
        )
        self._writers = Writers(self.held, self.connection, segment, shared.copiers, self._turn, account)
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
                self._wait(message, partial(_WAITING.get(kind, _administered)(self), message))
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

    # What needs no waiting.

    def _cancel(self, message: messages.Cancel) -> None:
        held = self.held.get(message.call)
        if held is not None:
            held.undo()
        self._done(message)

    def _acquire_read(self, message: messages.AcquireRead) -> None:
        self._check_number(message.number)
        if not self._reads.acquire_nowait(message):
            self._wait(message, partial(self._reads.acquire, message))

    def _acquire_stream(self, message: messages.AcquireStream) -> None:
        self._check_number(message.number)
        self._wait(message, partial(self._reads.stream, message))

    def _release_read(self, message: messages.ReleaseRead) -> None:
        self._reads.release(message.read)
        self._requests.answer_soon(messages.Done(message.number))

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
        count = partial(stats_for, self._core, self.tenant, self._account)
        given = self._core.l1.rooms.given()
        self._requests.answer_caught_up(given, lambda: messages.Counted(message.number, count(self._hold())))

    def _events(self, message: messages.Events) -> None:
        self._check_number(message.number)
        if self.held.streams >= MAX_STREAMS:
            raise LimitError(f"a connection reads up to {MAX_STREAMS} streams of events")
        stream = self._core.events.stream(message.capacity, self.tenant.salts)
        events = HeldEvents(message.number, self.held, self.connection, stream)
        self._tasks.add(events.task)
        events.task.add_done_callback(self._tasks.discard)

    def _reserve_store(self, message: messages.ReserveStore, prompt: Prompt) -> None:
        expired = partial(self._writers.expired, message.number)
        make = partial(self._core.writing.writer, prompt, message.rank, message.start_chunk, expired)
        self._wait(message, partial(self._writers.open, message, prompt, lambda chunks: make(most=chunks)))

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


_Asks = Callable[[], Coroutine[Any, Any, Message | None]]


def _begins(session: Session, message: Any, asked: Prompt | Parts) -> None:
    session._requests.begin(message, asked)


def _answers(answer: Callable[[Queries, Any, A], Coroutine[Any, Any, Message]]) -> Callable[[Session, Any, A], None]:
    """Have a message about a prompt, or several, answered by a task."""
    return lambda session, message, asked: session._wait(message, partial(answer, session._queries, message, asked))


_OF_PROMPTS: dict[type[Message], Callable[[Session, Any, Prompt], None]] = {
    messages.Prefetch: _begins,
    messages.AwaitingPrefetch: _begins,
    messages.Lookup: _answers(Queries.lookup),
    messages.Explain: _answers(Queries.explain),
    messages.Retain: _answers(Queries.retain),
    messages.Warm: _answers(Queries.warm),
    messages.Hint: _answers(Queries.hint),
    messages.ReserveStore: Session._reserve_store,
    messages.Delete: _answers(Queries.delete),
}

_OF_PARTS: dict[type[Message], Callable[[Session, Any, Parts], None]] = {
    messages.PrefetchSegments: _begins,
    messages.LookupSegments: _answers(Queries.lookup),
}

_AT_ONCE: dict[type[Message], Callable[[Session, Any], None]] = {
    messages.RegisterLayout: Session._register_layout,
    messages.Cancel: Session._cancel,
    messages.Unclaim: lambda session, message: session._requests.unclaim(message),
    messages.AcquireRead: Session._acquire_read,
    messages.AcquireStream: Session._acquire_stream,
    messages.ReleaseRead: Session._release_read,
    messages.StoreData: Session._store_data,
    messages.CommitStore: Session._commit_store,
    messages.CloseStore: Session._close_store,
    messages.Renew: lambda session, message: session._requests.renew(message),
    messages.EndRequest: lambda session, message: session._requests.end(message),
    messages.Stats: Session._stats,
    messages.Events: Session._events,
    messages.Ping: Session._done,
}
_WAITING: dict[type[Message], Callable[[Session], Callable[[Any], Coroutine[Any, Any, Message | None]]]] = {
    messages.QueryPrefetchLookupHits: lambda session: session._requests.query_hits,
    messages.QueryPrefetchStatus: lambda session: session._requests.query_status,
    messages.ListRetained: lambda session: session._queries.list_retained,
    messages.Flush: lambda session: session._queries.flush,
    messages.DeleteModel: lambda session: session._queries.delete_model,
}


def _administered(session: Session) -> Callable[[Any], Coroutine[Any, Any, Message]]:
    return session._administration.answer
