"""A value that comes once, and the futures of those who wait for it."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Promise(Generic[T]):
    """A value that many await: PENDING -> RESOLVED with it, or -> BROKEN with an error; the first outcome stays.

    Every waiter has a future of its own, so that one who is cancelled cancels nothing for the others. `loop` is theirs,
    by default the one that runs where they ask: to find that out is a system call up to Python 3.11 (getpid).
    """

    __slots__ = ("_error", "_loop", "_told", "_waiters", "value")

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop
        self.value: T | None = None
        """The value, None where there is none yet; not to be set from outside."""
        self._error: Exception | None = None
        # Most promises nobody waits for in the end: none of these, then.
        self._waiters: list[asyncio.Future[T]] | None = None
        self._told: list[Callable[[T], None]] | None = None

    @property
    def pending(self) -> bool:
        """Whether there is neither a value nor an error yet."""
        return self.value is None and self._error is None

    def resolve(self, value: T) -> bool:
        """Give the value to all who wait, and to all who ask later; whether it is the promise's outcome."""
        if self.value is not None or self._error is not None:
            return False
        self.value = value
        if self._told is not None:
            told, self._told = self._told, None
            for callback in told:
                (self._loop or asyncio.get_running_loop()).call_soon(callback, value)
        if self._waiters is not None:
            for waiter in self._take_waiters():
                waiter.set_result(value)
        return True

    def break_with(self, error: Exception) -> None:
        """Give an error to all who wait, and to all who ask later: no value will come."""
        if self.pending:
            self._error = error
            for waiter in self._take_waiters():
                self._fail(waiter, error)
            self._told = None

    def tell(self, callback: Callable[[T], None]) -> None:
        """Call this with the value: now, if it has come, else in the loop's next turn after it has; not if it breaks.

        So whatever it does or raises comes after the step that resolved the promise, and before its waiters go on.
        """
        if self.value is not None:
            callback(self.value)
        elif self._error is None:
            if self._told is None:
                self._told = []
            self._told.append(callback)

    @property
    def error(self) -> Exception | None:
        """Why no value will come, if the promise is broken."""
        return self._error

    def future(self) -> "asyncio.Future[T]":
        """A new future of the outcome, which is its caller's own."""
        future: asyncio.Future[T] = (self._loop or asyncio.get_running_loop()).create_future()
        if self.value is not None:
            future.set_result(self.value)
        elif self._error is not None:
            self._fail(future, self._error)
        else:
            future.add_done_callback(self._drop)
            if self._waiters is None:
                self._waiters = []
            self._waiters.append(future)
        return future

    async def wait(self) -> T:
        """Return the value as soon as it is there; raises the error if the promise breaks."""
        return self.value if self.value is not None else await self.future()

    def _take_waiters(self) -> "list[asyncio.Future[T]]":
        waiters, self._waiters = self._waiters, None
        return [waiter for waiter in waiters or () if not waiter.done()]

    def _drop(self, future: "asyncio.Future[T]") -> None:
        if future.cancelled() and self._waiters is not None and future in self._waiters:
            self._waiters.remove(future)

    @staticmethod
    def _fail(future: "asyncio.Future[T]", error: Exception) -> None:
        future.set_exception(error)
        future.exception()  # looked at: who never awaits it need not find it in the log
