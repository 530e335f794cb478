"""A value that comes once, and the futures of those who wait for it."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

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
            told, self._told = self._told, []
            for callback in told:
                self._tell(callback, value)
            for waiter in self._take_waiters():
                waiter.set_result(value)

    def break_with(self, error: Exception) -> None:
        """Nothing will come: whoever waits gets the error."""
        if self.pending:
            self._error = error
            for waiter in self._take_waiters():
                self._fail(waiter, error)
            self._told.clear()

    def tell(self, callback: Callable[[T], None]) -> None:
        """Call this with the value once it has come, in the loop's next turn; never if the promise breaks.

        Whatever it does or raises comes after the step that resolved the promise, and before its waiters go on.
        """
        if self._value is not None:
            self._tell(callback, self._value)
        elif self._error is None:
            self._told.append(callback)

    @staticmethod
    def _tell(callback: Callable[[T], None], value: T) -> None:
        asyncio.get_running_loop().call_soon(callback, value)

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
