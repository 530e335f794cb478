"""One connection to a server: what is under way on it, and breaks with it."""

import asyncio
import itertools
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from async_cache.aio.forks import keep_from_children
from async_cache.aio.worker import Worker
from async_cache.client.calls import Call, Commit, EventsCall, PrefetchCall, Question, ReadCall, StreamCall
from async_cache.client.claims import Claims
from async_cache.client.layouts import Layouts
from async_cache.client.memory import Segment
from async_cache.errors import ConnectionLostError, LimitError, ProtocolError, ServiceError
from async_cache.handles.events import EventStream
from async_cache.prompt.layout import Prompt
from async_cache.prompt.parts import Parts
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.messages import (
    MAX_CHUNKS,
    MAX_EVENTS,
    MAX_TOKENS,
    Decoder,
    Message,
    SegmentIds,
    TokenIds,
    error_of,
)

A = TypeVar("A")

Lost = Callable[["Link", Exception], None]
"""Is called once with the link and the reason, when its connection is lost."""

_decoder = Decoder(messages.Answer)


class Link:
    """One connection and its calls. With the connection, all that is under way gets ConnectionLostError.

    `calls` has what is under way, by the number of its message; `requests` the prefetches among them, by request id.
    """

    def __init__(self, welcome: messages.Welcome, arena: memoryview | None, segment: Segment | None, lost: Lost):
        self.arena = arena
        self.segment = segment
        self.connection = Connection(_decoder, self._received, self._connection_lost)
        self.calls: dict[int, Call] = {}
        self.requests: dict[str, PrefetchCall] = {}
        self.claims = Claims(self)
        self.result_ttl_seconds = welcome.result_ttl_seconds
        self.layouts = Layouts(self)
        self._trusted = welcome.trusted
        self._knows = frozenset(welcome.knows)
        self._numbers = itertools.count(1)
        self._reason: Exception | None = None
        self._gone = asyncio.Event()
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        keep_from_children(self)

    def descriptors(self) -> list[int]:
        """The descriptors of the socket and the segment, as long as they are open."""
        segment = [self.segment.fd] if self.segment is not None and not self._gone.is_set() else []
        return self.connection.descriptors() + segment

    @property
    def heard(self) -> int:
        """How many messages have come so far."""
        return self.connection.received_frames

    @property
    def reason(self) -> Exception:
        """Why the connection is not open, if it is not."""
        return self._reason or ConnectionLostError("the connection to the server was lost")

    # Sending.

    def next_number(self) -> int:
        """The number of the next message."""
        return next(self._numbers)

    def send(self, message: Message) -> None:
        """Send a message whose answer does not matter; nothing if the connection is not open."""
        self.connection.send(message)

    def begin(self, message: Any, call: Call) -> None:
        """Send a message whose answers go to the call. Where the connection is not open, the call is lost at once."""
        if self.connection.is_open:
            self.connection.send(message)
            self.calls[message.number] = call
        else:
            call.lost(self.reason)

    async def ask(self, kind: type[A], message: Any, question: Question | None = None) -> A:
        """Send a message, and wait for its answer. Where the caller is cancelled, the server undoes what it began.

        Raises ConnectionLostError, what the server fails with, and ProtocolError for an answer of another kind.
        """
        question = question if question is not None else Question()
        self.begin(message, question)
        try:
            answer = await question.answer
        except asyncio.CancelledError:
            self.undo(message.number)
            raise
        if not isinstance(answer, kind):
            raise ProtocolError(f"the server answered with {type(answer).__name__}, not {kind.__name__}")
        return answer

    def cancel(self, number: int) -> None:
        """Have the server give a call up; it answers all the same."""
        self.send(messages.Cancel(self.next_number(), number))

    def undo(self, number: int) -> None:
        """Have the server undo what a call began or did; no answer to it is looked at any more."""
        self.calls.pop(number, None)
        self.cancel(number)

    # Prompts and requests.

    def check_knows(self, kind: type[messages.Message]) -> None:
        """Check that the server knows what not every server does. Raises ServiceError."""
        if kind.__name__ not in self._knows:
            raise ServiceError(f"the server is older than this client: it does not know {kind.__name__}")

    def pack(self, prompt: Prompt) -> messages.WirePrompt:
        """A prompt to send, behind its layout; by its token ids, if it is not hashed yet and they fit a frame."""
        if self._trusted and prompt.tokens + prompt.base_tokens > MAX_TOKENS:
            prompt.hash()
        return self.layouts.pack(prompt, trusted=self._trusted and prompt.hashed)

    async def pack_hashed(self, prompt: Prompt, hashing: Worker) -> messages.WirePrompt:
        """A prompt to send, hashed here: who waits anyway spares the server that, and itself the next time."""
        await self.hash(prompt, hashing)
        return self.pack(prompt)

    async def hash(self, prompt: Prompt | Parts, hashing: Worker) -> None:
        """Hash what is to be sent, unless that is for the server to do."""
        if self._trusted and not prompt.hashed:
            await hashing.run(prompt.hash)

    def pack_all(self, parts: Parts) -> list[messages.WirePrompt]:
        """Prompts to send, as `pack` does each. Raises LimitError if they are too many for a message."""
        if len(parts) > MAX_CHUNKS:
            raise LimitError(f"the prompts of a message have at most {MAX_CHUNKS} chunks together, not {len(parts)}")
        wires = [self.pack(prompt) for prompt in parts.parts]
        sent = zip(wires, parts.parts, strict=True)
        tokens = sum(it.tokens + it.base_tokens for wire, it in sent if isinstance(wire, TokenIds | SegmentIds))
        if tokens > MAX_TOKENS:
            raise LimitError(f"prompts that the server hashes have at most {MAX_TOKENS} tokens together, not {tokens}")
        return wires

    def pack_source(self, prompt: Prompt) -> messages.WirePrompt:
        """A prompt to send by what its hashes are made from, if that is known and fits a frame."""
        if prompt.source is None or prompt.tokens > MAX_TOKENS:
            return self.pack(prompt)
        return self.layouts.pack(prompt, trusted=False)

    def prefetch(
        self,
        call: PrefetchCall,
        deadline_seconds: float | None,
        traceparent: str | None,
        wait_for_writers_seconds: float | None,
    ) -> None:
        """Begin a prefetch. Raises what a layout or prompt is refused with, and ServiceError."""
        layout, number, request_id = call.prompt.layout, call.number, call.request_id
        ranks = None if len(call.ranks) == layout.world_size else list(call.ranks)
        message: Message
        if isinstance(call.prompt, Parts):
            self.check_knows(messages.PrefetchSegments)
            wires = self.pack_all(call.prompt)
            message = messages.PrefetchSegments(number, wires, request_id, ranks, deadline_seconds, traceparent)
        else:
            if wait_for_writers_seconds:
                self.check_knows(messages.AwaitingPrefetch)
            wire, skip_tokens = self.pack(call.prompt), call.start_chunk * layout.chunk_tokens
            asked = number, wire, request_id, skip_tokens, ranks, deadline_seconds, traceparent
            if wait_for_writers_seconds:
                message = messages.AwaitingPrefetch(*asked, wait_for_writers_seconds)
            else:
                message = messages.Prefetch(*asked)
        self.detach(request_id)
        self.begin(message, call)
        self.requests[call.request_id] = call

    def detach(self, request_id: str) -> None:
        """Let the id mean a new request: who waits for the old one hears of its end, and of no other's."""
        self.requests.pop(request_id, None)
        self.claims.detach(request_id)

    async def acquire(self, message: messages.AcquireRead) -> tuple[messages.ReadAcquired, memoryview]:
        """Begin a read; what there is to read, and the memory in which it lies. Raises as `ask`."""
        call, arena = ReadCall(), self.arena  # of now: a connection that is lost has none
        acquired = await self.ask(messages.ReadAcquired, message, call)
        if call.buffer is not None:
            return acquired, call.buffer
        return acquired, arena if arena is not None else memoryview(b"")

    async def acquire_stream(
        self, message: messages.AcquireStream, call: StreamCall
    ) -> tuple[messages.StreamAcquired, memoryview]:
        """Begin a stream; what is known of it, and the memory in which its chunks will lie. Raises as `ask`."""
        arena = self.arena  # of now: a connection that is lost has none
        acquired = await self.ask(messages.StreamAcquired, message, call)
        call.begin(self.layouts.find(acquired.layout))
        if call.buffer is not None:
            return acquired, call.buffer
        return acquired, arena if arena is not None else memoryview(b"")

    def events(self, capacity: int) -> EventStream:
        """A stream of events, which ends on the server as well when nobody has it any more."""
        number = self.next_number()
        stream = EventStream(capacity, lambda stream: gone())
        gone = weakref.finalize(stream, self._undo_soon, number)
        gone.atexit = False
        self.begin(messages.Events(number, min(capacity, MAX_EVENTS)), EventsCall(stream))
        return stream

    def _undo_soon(self, number: int) -> None:
        """Undo a call from whatever thread."""
        with suppress(RuntimeError):  # the loop is closed, and the connection with it
            self._loop.call_soon_threadsafe(self.undo, number)

    # Answers, as they come.

    def _received(self, answer: Any) -> None:
        call = self.calls.get(answer.number)
        if call is not None:
            if call.on(answer):
                self.calls.pop(answer.number, None)
        elif type(answer) is messages.Failed and not answer.number:
            self._reason = ConnectionLostError(f"the server closed the connection: {error_of(answer)}")

    # The end.

    async def close(self, error: Exception, timeout_seconds: float) -> None:
        """Wait for what was committed, and close; all else that is under way gets the error."""
        self._reason = error
        commits = {number: call for number, call in self.calls.items() if isinstance(call, Commit)}
        calls, self.calls = self.calls, dict(commits)
        for number, call in calls.items():
            if number not in commits:
                call.lost(error)
        try:
            async with asyncio.timeout(timeout_seconds):
                if commits:
                    await asyncio.wait([commit.answered for commit in commits.values()])
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
        calls, self.calls = self.calls, {}
        for call in calls.values():
            call.lost(reason)
        self.requests.clear()
        self.arena = None  # unmapped with the last view of it, and not when this link is collected
        if self.segment is not None:
            self.segment.close()
        self._gone.set()
        self._lost(self, reason)
