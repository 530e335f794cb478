"""Who waits for results through one link: each result is handed out once, however many ask for it."""

import asyncio
from typing import Any

from async_cache.client.calls import Call, Line, fail
from async_cache.errors import ProtocolError, UnknownRequestError
from async_cache.protocol import messages
from async_cache.protocol.messages import error_of
from async_cache.values import LoadResult


class ClaimCall(Call):
    """One query for all who wait for a result: the first of them takes it, and then the others hear of it.

    A waiter that is cancelled when the result has come passes it on; the last one returns it to the server.
    """

    __slots__ = ("_claims", "number", "request_id", "result", "waiters")

    def __init__(self, claims: "Claims", number: int, request_id: str, first: "asyncio.Future[LoadResult]") -> None:
        self._claims = claims
        self.number = number
        self.request_id = request_id
        self.result: LoadResult | None = None
        self.waiters = [first]

    def on(self, answer: Any) -> bool:
        self._claims.detach(self.request_id, self)
        if type(answer) is messages.Loaded:
            self.result = answer.result
            self.pass_on()
        elif type(answer) is messages.Failed:
            self.lost(error_of(answer))
        else:
            self.lost(ProtocolError(f"the server answered with {type(answer).__name__}, not Loaded"))
        return True

    def lost(self, reason: Exception) -> None:
        for waiter in self.waiters:
            fail(waiter, reason)

    def pass_on(self) -> None:
        """Give the result to the first who still waits, or where nobody does, return it to the server."""
        assert self.result is not None
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(self.result)
                return
        self._claims.unclaim(self.request_id)


class Claims:
    """The queries of one link that are under way, by request id."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._calls: dict[str, ClaimCall] = {}

    async def claim(self, request_id: str) -> LoadResult:
        """Wait for the result of a request, and take it. Raises UnknownRequestError where somebody else has."""
        waiter: asyncio.Future[LoadResult] = asyncio.get_running_loop().create_future()
        call = self._calls.get(request_id)
        if call is not None:
            call.waiters.append(waiter)
        else:
            call = self._ask(request_id, waiter)
        try:
            result = await waiter
        except asyncio.CancelledError:
            self._given_up(call, waiter)
            raise
        for other in call.waiters:
            fail(other, UnknownRequestError(f"request {request_id!r} was claimed or ended"))
        return result

    def _ask(self, request_id: str, waiter: "asyncio.Future[LoadResult]") -> ClaimCall:
        call = self._calls[request_id] = ClaimCall(self, self._line.next_number(), request_id, waiter)
        self._line.begin(messages.QueryPrefetchStatus(call.number, request_id), call)
        return call

    def _given_up(self, call: ClaimCall, waiter: "asyncio.Future[LoadResult]") -> None:
        call.waiters.remove(waiter)
        if call.result is not None:
            if waiter.done() and not waiter.cancelled():
                call.pass_on()
        elif not call.waiters:
            self.detach(call.request_id, call)
            self._line.cancel(call.number)

    def detach(self, request_id: str, call: ClaimCall | None = None) -> None:
        """Let nobody join the query any more (with `call`, only if it is this one). Those who wait still wait."""
        if call is None or self._calls.get(request_id) is call:
            self._calls.pop(request_id, None)

    def unclaim(self, request_id: str) -> None:
        """Return a result that nobody waits for any more: it is for who asks next, through whatever client."""
        self._line.send(messages.Unclaim(self._line.next_number(), request_id))
