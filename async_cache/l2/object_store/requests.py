"""Requests that are waited for to their end, and the threads that copy and hash what they bring."""

import asyncio
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from async_cache.errors import BackendError
from async_cache.l2.filesystem.workers import DaemonExecutor

P = ParamSpec("P")
T = TypeVar("T")

CLOSE_SECONDS = 2.0
THREADS = 2
STEP_BYTES = 4 * 2**20  # copied and hashed in one step of the loop: a millisecond


class Requests:
    """What is under way and must not be left behind, until the backend closes.

    obstore drops a request whose future is cancelled, but not what has left the machine: an upload may be stored after
    all, and one in parts is never put together nor thrown away. And a thread that copies cannot be stopped.
    """

    def __init__(self, name: str):
        self._threads = DaemonExecutor(THREADS, f"{name} copy")
        self._running: set[asyncio.Future[Any]] = set()
        self._loop = asyncio.get_running_loop()
        self._given_up: asyncio.Future[None] = self._loop.create_future()
        self._turn = asyncio.Lock()
        self._step_bytes = 0

    async def turn(self, size_bytes: int) -> None:
        """Wait until the loop may copy so much: all that it copies in one of its steps is at most STEP_BYTES."""
        async with self._turn:
            if self._step_bytes + size_bytes > STEP_BYTES:
                await asyncio.sleep(0)
            if not self._step_bytes:
                self._loop.call_soon(self._next_step)
            self._step_bytes += size_bytes

    def _next_step(self) -> None:
        self._step_bytes = 0

    async def in_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in a thread; where the caller is cancelled, he waits for its end all the same."""
        if self._given_up.done():
            raise BackendError("closed")
        return await self.to_its_end(asyncio.wrap_future(self._threads.submit(call, *args, **kwargs)))

    async def to_its_end(self, future: "asyncio.Future[T]") -> T:
        """Wait until it has ended, cancelled or not, however often. Raises BackendError if that outlasts `close`."""
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait((future, self._given_up), return_when=asyncio.FIRST_COMPLETED)
                if self._given_up.done() and not future.done():
                    future.cancel()
                    raise BackendError("closed")
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            if not future.cancelled():
                future.exception()  # looked at: nobody else does
            raise cancelled
        return future.result()

    async def close(self) -> None:
        """Wait for what is under way, but not for a dead service, and end the threads; idempotent."""
        try:
            if self._running:
                await asyncio.wait(set(self._running), timeout=CLOSE_SECONDS)
        finally:
            if not self._given_up.done():
                self._given_up.set_result(None)
            self._threads.shutdown()
        await self._threads.ended(CLOSE_SECONDS)
