"""A value that comes once, and the futures of those who wait for it; `Prefetch`, which has two."""

import asyncio
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from async_cache.values import LoadResult, LookupHits

T = TypeVar("T")


class Promise(Generic[T]):
    """PENDING -> RESOLVED with a value, or -> BROKEN with an error; the first outcome stays.

    Every waiter has a future of its own, so that one who is cancelled cancels nothing for the others.
    """

    __slots__ = ("_error", "_told", "_value", "_waiters")

    def __init__(self) -> None:
        self._value: T | None = None
        self._error: Exception | None = None
        self._waiters: list[asyncio.Future[T]] = []
        self._told: list[Callable[[T], None]] = []

    @property
    def pending(self) -> bool:
        """Whether nothing has come yet."""
        return self._value is None and self._error is None

    def resolve(self, value: T) -> None:
        """Hand out the value, now and to all who ask later."""
        if self.pending:
            self._value = value
            for waiter in self._take_waiters():
                waiter.set_result(value)
            told, self._told = self._told, []
            for tell in told:
                tell(value)

    def break_with(self, error: Exception) -> None:
        """Nothing will come: whoever waits gets the error."""
        if self.pending:
            self._error = error
            for waiter in self._take_waiters():
                self._fail(waiter, error)
            self._told.clear()

    def tell(self, told: Callable[[T], None]) -> None:
        """Call this with the value in the very step in which it comes, or now; never if the promise breaks."""
        if self._value is not None:
            told(self._value)
        elif self._error is None:
            self._told.append(told)

    def future(self) -> "asyncio.Future[T]":
        """A new future of the outcome."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self._value is not None:
            future.set_result(self._value)
        elif self._error is not None:
            self._fail(future, self._error)
        else:
            future.add_done_callback(self._forget)
            self._waiters.append(future)
        return future

    async def wait(self) -> T:
        """The value, as soon as it is there."""
        return self._value if self._value is not None else await self.future()

    def _take_waiters(self) -> "list[asyncio.Future[T]]":
        waiters, self._waiters = self._waiters, []
        return [waiter for waiter in waiters if not waiter.done()]

    def _forget(self, future: "asyncio.Future[T]") -> None:
        if future.cancelled() and future in self._waiters:
            self._waiters.remove(future)

    @staticmethod
    def _fail(future: "asyncio.Future[T]", error: Exception) -> None:
        future.set_exception(error)
        future.exception()  # whoever does not look at it need not be told in the log


class Promised(Protocol):
    """Whoever is promised hits, and then a result."""

    request_id: str
    hits: Promise[LookupHits]
    result: Promise[LoadResult]


class Prefetch:
    """One prefetch: a lookup and a load, each with its future."""

    __slots__ = ("_cancel", "promised")

    def __init__(self, promised: Promised, cancel: Callable[[], None]):
        self.promised = promised
        self._cancel = cancel

    @property
    def request_id(self) -> str:
        """What the other calls know it by."""
        return self.promised.request_id

    @property
    def lookup_done(self) -> "asyncio.Future[LookupHits]":
        """How much is cached. Each access gives a future of the caller's own."""
        return self.promised.hits.future()

    @property
    def load_done(self) -> "asyncio.Future[LoadResult]":
        """That it is in memory. Each access gives a future of the caller's own."""
        return self.promised.result.future()

    def cancel(self) -> None:
        """Stop looking up and loading; both futures resolve. Does nothing once it has loaded."""
        self._cancel()

    def __repr__(self) -> str:
        promised = self.promised
        state = "looking up" if promised.hits.pending else "loading" if promised.result.pending else "done"
        return f"<Prefetch {self.request_id!r}, {state}>"
