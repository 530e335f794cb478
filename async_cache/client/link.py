"""One connection to a server: what is under way on it, and breaks with it."""

import asyncio
import itertools
import logging
import os
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from async_cache.aio.promise import Promise
from async_cache.client.claims import Claims, fail
from async_cache.client.memory import Segment
from async_cache.errors import ConnectionLostError, LimitError, ProtocolError
from async_cache.handles.prefetch import Prefetch
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.messages import MAX_CHUNKS, Decoder, Message, encode, error_of
from async_cache.protocol.prompts import describe, difference, layout_of, pack
from async_cache.values import LoadResult, LookupHits

A = TypeVar("A")

_links: "weakref.WeakSet[Link]" = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A forked child has its parent's sockets, and would keep the connections alive beyond the parent."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for link in _links:
        for descriptor in link.descriptors():
            os.dup2(null, descriptor, inheritable=False)  # the number stays taken: who closes it closes nothing else
    os.close(null)


os.register_at_fork(after_in_child=_let_go_in_child)

log = logging.getLogger(__name__)

_told: set[tuple[str, str]] = set()  # in what layouts differ, once for all connections of the process
_MAX_TOLD = 100

Lost = Callable[[Exception], None]

_decoder = Decoder(messages.Answer)


class Store(Protocol):
    """A writer, as its link knows it."""

    def closed_from_outside(self) -> None:
        """The server has closed it, or is gone."""


class RemoteRequest:
    """The record of a prefetch: what it asked for, and what the server says of it."""

    __slots__ = (
        "claimed", "hits", "maybe_over", "number", "prefetch", "prompt", "ranks", "request_id", "result", "start_chunk",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        start_chunk: int,
        ranks: tuple[int, ...],
        cancel: "Callable[[RemoteRequest], None]",
    ):
        self.request_id = request_id
        self.prompt = prompt
        self.start_chunk = start_chunk
        self.ranks = ranks
        self.claimed = False
        self.maybe_over = False  # a reader has left, maybe the last: only the server knows
        self.number = 0
        self.hits: Promise[LookupHits] = Promise()
        self.result: Promise[LoadResult] = Promise()
        self.prefetch = Prefetch(self, partial(cancel, self))

    def break_with(self, error: Exception) -> None:
        """Nothing more will be said."""
        self.hits.break_with(error)
        self.result.break_with(error)


class Incoming:
    """The bytes of a read that come in pieces: the answer that announced them waits for the last."""

    __slots__ = ("acquired", "buffer", "missing_bytes")

    def __init__(self, acquired: messages.ReadAcquired):
        self.acquired = acquired
        self.buffer = memoryview(bytearray(acquired.buffer_bytes))
        self.missing_bytes = acquired.data_bytes


class Link:
    """OPEN -> LOST: then all that waits for it gets ConnectionLostError, and what was held through it is gone."""

    def __init__(self, welcome: messages.Welcome, arena: memoryview | None, segment: Segment | None, lost: Lost):
        self.arena = arena
        self.segment = segment
        self.connection = Connection(_decoder, self._received, self._connection_lost)
        self.requests: dict[str, RemoteRequest] = {}
        self.stores: dict[int, Store] = {}
        self.commits: set[asyncio.Future[Any]] = set()
        self.claims = Claims(self)
        self.result_ttl_seconds = welcome.result_ttl_seconds
        self._trusted = welcome.trusted
        self._lost = lost
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._prefetches: dict[int, RemoteRequest] = {}
        self._refused: dict[int, Exception] = {}  # layouts that the server did not register
        self._registrations: dict[int, int] = {}  # of layouts, by the number of the message
        self._incoming: dict[int, Incoming] = {}
        self._layouts: list[ModelLayout] = []
        self._layout_numbers: dict[ModelLayout, int] = {}
        self._described: dict[bytes, ModelLayout] = {}
        self._reason: Exception | None = None
        self._gone = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        _links.add(self)

    # Asking.

    def descriptors(self) -> list[int]:
        """Of the socket and the segment, as long as they are open."""
        segment = [self.segment.fd] if self.segment is not None and not self._gone.is_set() else []
        return self.connection.descriptors() + segment

    def number(self) -> int:
        """Of the next request."""
        return next(self._numbers)

    def prompt(self, prompt: Prompt) -> messages.WirePrompt:
        """A prompt to send, behind its layout. One that is not hashed yet is hashed by the server."""
        number = self._layout_numbers.get(prompt.layout)
        if number is None:
            number = self._layout_numbers[prompt.layout] = len(self._layouts)
            self._layouts.append(prompt.layout)
            registration = messages.RegisterLayout(self.number(), number, describe(prompt.layout))
            self._registrations[registration.number] = number
            self.connection.send(registration)
        if number in self._refused:
            raise self._refused[number].with_traceback(None)
        if len(prompt) > MAX_CHUNKS:
            raise LimitError(f"a prompt has at most {MAX_CHUNKS} chunks, not {len(prompt)}")
        return pack(prompt, number, trusted=self._trusted and prompt.hashed)

    async def hashed(self, prompt: Prompt) -> messages.WirePrompt:
        """The same, hashed here: whoever waits anyway spares the server that, and itself the next time."""
        if self._trusted and not prompt.hashed:
            await asyncio.to_thread(prompt.hash)
        return self.prompt(prompt)

    def check_open(self) -> None:
        """Raises why the connection is closed, if it is."""
        if not self.connection.is_open:
            reason = self._reason or ConnectionLostError("the connection to the server was lost")
            raise reason.with_traceback(None)

    def send(self, message: Any) -> "asyncio.Future[Any]":
        """Send a request; the future of its answer. Raises ConnectionLostError."""
        self.check_open()
        self.connection.send(message)
        self._waiting[message.number] = answer = self._loop.create_future()
        return answer

    async def ask(self, kind: type[A], message: Any) -> A:
        """Send a request, and wait for its answer. Where the caller is cancelled, the server undoes what it began."""
        answer = self.send(message)
        try:
            outcome = await answer
        except asyncio.CancelledError:
            self.tell(messages.Cancel(self.number(), message.number))
            raise
        if not isinstance(outcome, kind):
            raise ProtocolError(f"the server answered with {type(outcome).__name__}, not {kind.__name__}")
        return outcome

    async def acquire(self, message: messages.AcquireRead) -> tuple[messages.ReadAcquired, memoryview]:
        """Begin to read; what there is, and the memory that it lies in."""
        try:
            acquired = await self.ask(messages.ReadAcquired, message)
        finally:
            incoming = self._incoming.pop(message.number, None)
        if incoming is not None:
            return acquired, incoming.buffer
        return acquired, self.arena if self.arena is not None else memoryview(b"")

    def freed(self, request_id: str) -> None:
        """The id is to be used anew: who waits for the old request hears of its end, and of no other's."""
        self.requests.pop(request_id, None)
        self.claims.freed(request_id)

    def tell(self, message: Message) -> None:
        """Send a request of which the answer does not matter."""
        self.connection.send(message)

    def prefetch(self, request: RemoteRequest, skip_tokens: int, deadline_seconds: float | None) -> None:
        """Begin one; its record is told what comes of it."""
        number = request.number = self.number()
        self.freed(request.request_id)
        everywhere = len(request.ranks) == request.prompt.layout.world_size
        ranks = None if everywhere else list(request.ranks)
        prompt = self.prompt(request.prompt)
        self.connection.send(
            messages.Prefetch(number, prompt, request.request_id, skip_tokens, ranks, deadline_seconds)
        )
        self._prefetches[number] = self.requests[request.request_id] = request

    def cancel(self, request: RemoteRequest) -> None:
        """Give up a prefetch."""
        self.tell(messages.Cancel(self.number(), request.number))

    def layout(self, acquired: messages.ReadAcquired) -> ModelLayout:
        """That of a request, which others may have prefetched."""
        if isinstance(acquired.layout, int):
            return self._layouts[acquired.layout]
        key = encode(acquired.layout)
        if key not in self._described:
            self._described[key] = layout_of(acquired.layout)
        return self._described[key]

    # Answers, as they come.

    def _received(self, answer: Any) -> None:
        kind = type(answer)
        if kind is messages.LookupDone:
            if (request := self._prefetches.get(answer.number)) is not None:
                request.hits.resolve(answer.hits)
        elif kind is messages.LoadDone:
            if (request := self._prefetches.get(answer.number)) is not None:
                request.result.resolve(answer.result)
        elif kind is messages.RequestOver:
            self._forget(answer.number)
        elif kind is messages.RequestClaimed:
            if (request := self._prefetches.get(answer.number)) is not None:
                request.claimed = answer.claimed
        elif kind is messages.ReadData:
            self._take(answer)
        elif kind is messages.StoreClosed:
            if (store := self.stores.pop(answer.number, None)) is not None:
                store.closed_from_outside()
        elif kind is messages.LayoutRegistered:
            self._layout_registered(answer)
        elif kind is messages.Failed:
            self._failed(answer)
        elif kind is messages.ReadAcquired and answer.data_bytes and self._is_waited_for(answer.number):
            self._incoming[answer.number] = Incoming(answer)
        else:
            self._answered(answer.number, answer)

    def _is_waited_for(self, number: int) -> bool:
        waiting = self._waiting.get(number)
        return waiting is not None and not waiting.done()

    def _answered(self, number: int, answer: Any) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def _layout_registered(self, answer: messages.LayoutRegistered) -> None:
        number = self._registrations.pop(answer.number, None)
        if number is None:
            return
        layout = self._layouts[number]
        for other in answer.others:
            what = layout.model, difference(describe(layout), other)
            if what not in _told and len(_told) < _MAX_TOLD:
                _told.add(what)
                log.warning("model %r is cached in another layout too, which shares nothing with this one: %s", *what)

    def _failed(self, answer: messages.Failed) -> None:
        error = error_of(answer)
        if not answer.number:
            self._reason = ConnectionLostError(f"the server closed the connection: {error}")
            return
        layout = self._registrations.pop(answer.number, None)
        if layout is not None:
            self._refused[layout] = error
        waiting = self._waiting.pop(answer.number, None)
        if waiting is not None:
            fail(waiting, error)
        if (request := self._forget(answer.number)) is not None:
            request.break_with(error)

    def _forget(self, number: int) -> RemoteRequest | None:
        request = self._prefetches.pop(number, None)
        if request is not None and self.requests.get(request.request_id) is request:
            del self.requests[request.request_id]
        return request

    def _take(self, answer: messages.ReadData) -> None:
        incoming = self._incoming.get(answer.number)
        if incoming is None:
            return
        begin, end = answer.offset, answer.offset + len(answer.data)
        if end > len(incoming.buffer):
            raise ProtocolError("bytes of a read that do not fit into it")
        incoming.buffer[begin:end] = answer.data
        incoming.missing_bytes -= len(answer.data)
        if incoming.missing_bytes <= 0:
            self._answered(answer.number, incoming.acquired)

    # The end.

    async def close(self, error: Exception, timeout_seconds: float) -> None:
        """Wait for what was committed, and close; whoever waits for something else gets the error."""
        for waiting in self._waiting.values():
            if waiting not in self.commits:
                fail(waiting, error)
        for request in self._prefetches.values():
            request.break_with(error)
        self._reason = error
        try:
            async with asyncio.timeout(timeout_seconds):
                if self.commits:
                    await asyncio.wait(self.commits)
                self.connection.close()
                await self._gone.wait()
        except TimeoutError:
            self.connection.abort()

    def abort(self, reason: str) -> None:
        """Close at once."""
        self._reason = ConnectionLostError(reason)
        self.connection.abort()

    def _connection_lost(self, error: Exception | None) -> None:
        reason = self._reason or ConnectionLostError(f"the connection to the server was lost: {error or 'it is gone'}")
        self._reason = reason
        for waiting in self._waiting.values():
            fail(waiting, reason)
        for request in self._prefetches.values():
            request.break_with(reason)
        for store in self.stores.values():
            store.closed_from_outside()
        for records in (self._waiting, self._prefetches, self.requests, self.stores, self._incoming):
            records.clear()
        if self.segment is not None:
            self.segment.close()
        self._gone.set()
        self._lost(reason)
