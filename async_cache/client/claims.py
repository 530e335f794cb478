"""Who waits for results through one link: each result is handed out once, however many ask for it."""

import asyncio
from typing import Any

from async_cache.client.calls import Call, Line, fail
from async_cache.errors import ProtocolError, UnknownRequestError
from async_cache.protocol import messages
from async_cache.protocol.messages import error_of
from async_cache.protocol.parts import join_result
from async_cache.values import LoadResult

_MAX_KEPT = 1024  # results of 0 chunks


class ClaimCall(Call):
    """One query for all who wait for a result: the first of them takes it, and then the others hear of it.

    A waiter that is cancelled when the result has come passes it on; the last one returns it to the server. Where all
    have been cancelled before, the server is asked to give the query up. Until it has answered, which it may have done
    already, those who ask again join the query.
    """

    __slots__ = ("_claims", "is_given_up", "number", "request_id", "result", "waiters")

    def __init__(self, claims: "Claims", number: int, request_id: str, waiters: "list[asyncio.Future[LoadResult]]"):
        self._claims = claims
        self.number = number
        self.request_id = request_id
        self.result: LoadResult | None = None
        self.waiters = waiters
        self.is_given_up = False

    def on(self, answer: Any) -> bool:
        self._claims.detach(self.request_id, self)
        if type(answer) is messages.Loaded:
            self.result = join_result(answer.result, answer.parts)
            self.pass_on()
        elif type(answer) is not messages.Failed:
            self._fail(ProtocolError(f"the server answered with {type(answer).__name__}, not Loaded"))
        elif self.is_given_up and answer.code == "cancelled":
            if self.waiters:  # they came after it was given up
                self._claims.ask(self.request_id, self.waiters)
        else:
            self._fail(error_of(answer))
        return True

    def lost(self, reason: Exception) -> None:
        self._claims.detach(self.request_id, self)
        self._fail(reason)

    def _fail(self, error: Exception) -> None:
        for waiter in self.waiters:
            fail(waiter, error)

    def pass_on(self) -> None:
        """Give the result to the first who still waits, or where nobody does, return it."""
        assert self.result is not None
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(self.result)
                return
        self._claims.unclaim(self.result)


class Claims:
    """The queries of one link that are under way, by request id, and results of 0 chunks that nobody came to know.

    A claim of 0 chunks ends its request, so that its result can only be kept here for those who ask again.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._calls: dict[str, ClaimCall] = {}
        self._kept: dict[str, LoadResult] = {}

    async def claim(self, request_id: str) -> LoadResult:
        """Wait for the result of a request, and take it. Raises UnknownRequestError where somebody else has."""
        kept = self._kept.pop(request_id, None)
        if kept is not None:
            return kept
        waiter: asyncio.Future[LoadResult] = asyncio.get_running_loop().create_future()
        call = self._calls.get(request_id)
        if call is not None:
            call.waiters.append(waiter)
        else:
            call = self.ask(request_id, [waiter])
        try:
            result = await waiter
        except asyncio.CancelledError:
            self._given_up(call, waiter)
            raise
        for other in call.waiters:
            fail(other, UnknownRequestError(f"request {request_id!r} was claimed or ended"))
        return result

    def ask(self, request_id: str, waiters: "list[asyncio.Future[LoadResult]]") -> ClaimCall:
        """Ask the server for a result, for all who wait."""
        call = self._calls[request_id] = ClaimCall(self, self._line.next_number(), request_id, waiters)
        self._line.begin(messages.QueryPrefetchStatus(call.number, request_id), call)
        return call

    def _given_up(self, call: ClaimCall, waiter: "asyncio.Future[LoadResult]") -> None:
        call.waiters.remove(waiter)
        if call.result is not None:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                call.pass_on()  # unless another one has taken it, and this one was told so
        elif not call.waiters and not call.is_given_up:
            call.is_given_up = True
            self._line.cancel(call.number)

    def detach(self, request_id: str, call: ClaimCall | None = None) -> None:
        """Let nobody join the query any more (with `call`, only if it is this one). Those who wait still wait."""
        if call is None:
            self._calls.pop(request_id, None)
            self._kept.pop(request_id, None)
        elif self._calls.get(request_id) is call:
            del self._calls[request_id]

    def unclaim(self, result: LoadResult) -> None:
        """Return a result that nobody waits for any more: it is for who asks next, through whatever client."""
        if result.chunks:
            self._line.send(messages.Unclaim(self._line.next_number(), result.request_id))
        elif len(self._kept) < _MAX_KEPT:
            self._kept[result.request_id] = result
