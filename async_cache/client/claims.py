"""Who waits for results through one connection: each is handed out once, however many ask for it."""

import asyncio
from functools import partial
from typing import Any, Protocol

from async_cache.errors import ProtocolError, UnknownRequestError
from async_cache.protocol import messages
from async_cache.protocol.messages import Message
from async_cache.values import LoadResult


class Line(Protocol):
    """What is used of the connection."""

    def number(self) -> int:
        """Of the next message."""

    def send(self, message: Any) -> "asyncio.Future[Any]":
        """Send a message; the future of its answer."""

    def tell(self, message: Message) -> None:
        """Send a message of which the answer does not matter."""


class Query:
    """Those who wait for one result: the first of them takes it, and then the others hear of it.

    Who is cancelled when it has come passes it on; the last one gives it back to the server.
    """

    __slots__ = ("number", "result", "waiters")

    def __init__(self, number: int) -> None:
        self.number = number
        self.result: LoadResult | None = None
        self.waiters: list[asyncio.Future[LoadResult]] = []

    def pass_on(self) -> bool:
        """Give the result to the first who still waits. False if there is none."""
        assert self.result is not None
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(self.result)
                return True
        return False


class Claims:
    """By request id, the query that is under way for all who wait."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._queries: dict[str, Query] = {}

    async def claim(self, request_id: str) -> LoadResult:
        """Wait for the result of a request, and take it."""
        query = self._queries.get(request_id) or self._ask(request_id)
        waiter: asyncio.Future[LoadResult] = asyncio.get_running_loop().create_future()
        query.waiters.append(waiter)
        try:
            result = await waiter
        except asyncio.CancelledError:
            self._given_up(request_id, query, waiter)
            raise
        for other in query.waiters:
            fail(other, UnknownRequestError(f"request {request_id!r} was claimed or ended"))
        return result

    def _ask(self, request_id: str) -> Query:
        query = Query(self._line.number())
        answer = self._line.send(messages.QueryPrefetchStatus(query.number, request_id))
        answer.add_done_callback(partial(self._answered, request_id, query))
        self._queries[request_id] = query
        return query

    def _given_up(self, request_id: str, query: Query, waiter: "asyncio.Future[LoadResult]") -> None:
        query.waiters.remove(waiter)
        if query.result is not None:
            if waiter.done() and not waiter.cancelled() and not query.pass_on():
                self.unclaim(request_id)
        elif not query.waiters:
            self._forget(request_id, query)
            self._line.tell(messages.Cancel(self._line.number(), query.number))

    def _answered(self, request_id: str, query: Query, answer: "asyncio.Future[Any]") -> None:
        self._forget(request_id, query)
        error = answer.exception()
        if error is None and not isinstance(answer.result(), messages.Loaded):
            error = ProtocolError(f"the server answered with {type(answer.result()).__name__}, not Loaded")
        if error is not None:
            for waiter in query.waiters:
                fail(waiter, error)
            return
        query.result = answer.result().result
        if not query.pass_on():
            self.unclaim(request_id)

    def _forget(self, request_id: str, query: Query) -> None:
        if self._queries.get(request_id) is query:
            del self._queries[request_id]

    def unclaim(self, request_id: str) -> None:
        """Give back a result that nobody waits for any more: it is for who asks next, through whatever client."""
        self._line.tell(messages.Unclaim(self._line.number(), request_id))

    def freed(self, request_id: str) -> None:
        """The id is to be used anew: who waits for the old request hears of its end, and of no other's."""
        self._queries.pop(request_id, None)


def fail(waiting: "asyncio.Future[Any]", error: BaseException) -> None:
    """Have whoever waits get the error, if it has not got anything yet."""
    if not waiting.done():
        waiting.set_exception(error)
        waiting.exception()  # looked at: who waits is told by it all the same
