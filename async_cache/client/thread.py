"""A client in a thread and loop of its own, and the ways into them."""

import asyncio
import concurrent.futures
import threading
import warnings
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any, TypeVar

import uvloop

from async_cache.aio.forks import process
from async_cache.client.client import CacheClient
from async_cache.client.writing import Post
from async_cache.errors import CacheClosedError, ConnectionLostError
from async_cache.protocol.descriptors import above_standard

T = TypeVar("T")


class ThreadState(Enum):
    """NEW -> OPENING -> OPEN -> CLOSING -> CLOSED; from OPENING to CLOSED where the client cannot be opened.

    While it is CLOSING, what was posted is still called, and then nothing more.
    """

    NEW = "new"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class ClientThread:
    """Runs a client, which `make` makes, in a thread of its own. Its methods may be called from any thread."""

    def __init__(self, make: Callable[[Post], CacheClient]):
        self._make = make
        self._state = ThreadState.NEW
        self.client: CacheClient | None = None
        """The client, while it is open."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._process = process()
        self._closing = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()  # of which nobody waits for the end
        self._lock = threading.RLock()  # of what is posted, and the end of that; it may be dropped anywhere

    # Life.

    def open(self) -> None:
        """Start the thread, and open the client. Raises what keeps it from opening."""
        with self._lock:
            if self._state is not ThreadState.NEW:
                raise CacheClosedError("a client is opened once")
            self._state = ThreadState.OPENING
        opened: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="async_cache client", daemon=True)
        self._thread.start()
        opened.result()

    def close(self) -> None:
        """Close the client, and let the thread end; idempotent. In a forked child it does nothing.

        In the client's own thread, as in a callback of a future, it begins that and does not wait.
        """
        thread = self._thread
        if not self.is_forked and self._loop is not None and thread is not None and thread.is_alive():
            self.post(self._closing.set)
            if thread is not threading.current_thread():
                thread.join()

    def drop(self) -> None:
        """Close the client without waiting, as nobody has it any more, and warn if it was open."""
        if self._state is ThreadState.OPEN and self.post(self._closing.set):
            warnings.warn("a BlockingClient was not closed", ResourceWarning, stacklevel=2)

    def _run(self, opened: "concurrent.futures.Future[None]") -> None:
        try:
            with above_standard(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve(opened))
        except OSError as error:  # a loop needs descriptors, of which there may be no more
            if opened.done():
                raise
            self._end()
            opened.set_exception(ConnectionLostError(f"no connection can be made here: {error.strerror or error}"))

    async def _serve(self, opened: "concurrent.futures.Future[None]") -> None:
        self._loop = asyncio.get_running_loop()
        try:
            client = self._make(self.post)
            await client.open()
        except Exception as error:
            self._end()
            opened.set_exception(error)
            return
        self.client, self._state = client, ThreadState.OPEN
        opened.set_result(None)
        try:
            await self._closing.wait()
        finally:
            self.client, self._state = None, ThreadState.CLOSING
            await client.close()
            self._end()
            await asyncio.sleep(0)  # and what was posted until now is called

    def _end(self) -> None:
        with self._lock:
            self._state = ThreadState.CLOSED

    # To the loop and back.

    @property
    def is_forked(self) -> bool:
        """Whether this is a child of the process that made it: the thread is not here."""
        return self._process is not process()

    def post(self, call: Callable[..., object], *args: Any) -> bool:
        """Have the client's thread call something; whether it does: a client that is closed holds nothing any more.

        Nor does a forked child, where nothing runs the loop, and whoever had the lock as it forked never gives it back.
        """
        if self.is_forked:
            return False
        assert self._loop is not None
        if self._thread is threading.current_thread():
            call(*args)
            return True
        with self._lock:
            accepts = self._state is not ThreadState.CLOSED
            if accepts:
                self._loop.call_soon_threadsafe(call, *args)
            return accepts

    def spawn(
        self, call: Callable[[], Coroutine[Any, Any, Any]], told: Callable[[Any], object] = lambda answer: None
    ) -> bool:
        """Have something asked without waiting: `told` gets the answer, in the client's thread, where there is one."""
        return self.post(self._spawn, call, told)

    def _spawn(self, call: Callable[[], Coroutine[Any, Any, Any]], told: Callable[[Any], object]) -> None:
        async def tell() -> None:
            told(await call())

        task = asyncio.get_running_loop().create_task(tell())
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the connection is lost, and what was held with it

    def opened(self) -> CacheClient:
        """The client. Raises CacheClosedError unless it is open, and in a forked child."""
        client = self.client  # once: another thread may close it
        if client is None or self.is_forked:
            raise self._refusal()
        return client

    def check_not_forked(self) -> None:
        """Raise CacheClosedError in a forked child, also where nothing has to be waited for."""
        if self.is_forked:
            raise self._refusal()

    def _refusal(self) -> CacheClosedError:
        if self.is_forked:
            return CacheClosedError("the client was opened before a fork: open another one in the child")
        is_new = self._state is ThreadState.NEW
        return CacheClosedError(f"the client {'is not open: use `with`, or `open`' if is_new else 'was closed'}")

    def wait(
        self,
        call: Coroutine[Any, Any, T],
        timeout_seconds: float | None = None,
        undo: Callable[[T], object] | None = None,
    ) -> T:
        """The outcome of a call. One that comes as its waiter gives up is undone.

        Raises what the call raises, TimeoutError, and CacheClosedError where the client closes meanwhile,
        and in a forked child.
        """
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        if self._thread is threading.current_thread():
            call.close()
            raise RuntimeError("a call that waits was made from the client's own thread")
        if not self.post(self._begin, call, outcome, undo):
            call.close()
            raise self._refusal()
        try:
            return outcome.result(None if timeout_seconds is None else min(timeout_seconds, threading.TIMEOUT_MAX))
        except concurrent.futures.CancelledError:
            raise CacheClosedError("the client was closed") from None
        except TimeoutError:
            if not outcome.cancel():  # there is a value after all, or its own error
                return outcome.result()
            raise
        finally:
            outcome.cancel()

    def _begin(
        self,
        call: Coroutine[Any, Any, T],
        outcome: "concurrent.futures.Future[T]",
        undo: Callable[[T], object] | None,
    ) -> None:
        task = asyncio.get_running_loop().create_task(_deliver(call, outcome, undo))
        task.add_done_callback(lambda _: (call.close(), outcome.cancel()))
        outcome.add_done_callback(lambda outcome: outcome.cancelled() and self.post(task.cancel))


async def _deliver(
    call: Coroutine[Any, Any, T],
    outcome: "concurrent.futures.Future[T]",
    undo: Callable[[T], object] | None,
) -> None:
    try:
        value = await call
    except Exception as error:
        if outcome.set_running_or_notify_cancel():
            outcome.set_exception(error)
        return
    if outcome.set_running_or_notify_cancel():
        outcome.set_result(value)
    elif undo is not None:
        undo(value)
