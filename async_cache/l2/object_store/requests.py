"""Requests that are waited for to their end, and turns of the loop to copy what they bring."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from async_cache.errors import BackendError

T = TypeVar("T")

CLOSE_SECONDS = 2.0
STEP_BYTES = 2**20  # copied and hashed in one step of the loop: less than a millisecond
BLOCK_BYTES = 512 * 1024  # hashed while it is still in the processor's cache


class Requests:
    """What is under way and must not be left behind, until the backend closes.

    obstore drops a request whose future is cancelled, but not what has left the machine: an upload may be stored after
    all, and one in parts is never put together nor thrown away.

    What is copied, the loop copies, a little in each of its steps: a thread would hold the interpreter's lock for it
    all the same, and, where the machine is busy, be stopped with it for a tenth of a second.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Future[Any]] = set()
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._step_bytes = 0

    async def blocks(self, size_bytes: int) -> AsyncIterator[slice]:
        """Blocks of so many bytes, each when the loop has the time: all that it copies in a step is STEP_BYTES."""
        for begin in range(0, size_bytes, BLOCK_BYTES):
            block = slice(begin, min(begin + BLOCK_BYTES, size_bytes))
            async with self._turn:
                if self._step_bytes + block.stop - begin > STEP_BYTES:
                    await asyncio.sleep(0)
                if not self._step_bytes:
                    self._loop.call_soon(self._next_step)
                self._step_bytes += block.stop - begin
            yield block

    def _next_step(self) -> None:
        self._step_bytes = 0

    def own(self, future: "asyncio.Future[T]") -> "asyncio.Future[T]":
        """Let `close` wait for it, and cancel it after that."""
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    async def to_its_end(self, future: "asyncio.Future[T]") -> T:
        """Wait until it has ended, cancelled or not, however often. Raises BackendError if that outlasts `close`."""
        self.own(future)
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait((future,))
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            if not future.cancelled():
                future.exception()  # looked at: nobody else does
            raise cancelled
        if future.cancelled():
            raise BackendError("closed")
        return future.result()

    async def close(self) -> None:
        """Wait for what is under way, but not for a dead service; idempotent."""
        running = set(self._running)
        try:
            if running:
                await asyncio.wait(running, timeout=CLOSE_SECONDS)
        finally:
            for future in running:
                future.cancel()
        if running:
            await asyncio.wait(running, timeout=CLOSE_SECONDS)  # which is a matter of some turns of the loop
