"""Requests that are waited for to their end, and turns of the loop to copy what they bring."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from async_cache.aio.ending import to_its_end
from async_cache.errors import BackendError

T = TypeVar("T")

CLOSE_SECONDS = 2.0
STEP_BYTES = 2**20  # copied and hashed in one step of the loop: less than a millisecond
BLOCK_BYTES = 512 * 1024  # hashed while it is still in the processor's cache


async def side_by_side(
    limit: int, ask: Callable[..., Awaitable[T]], *arguments: Sequence[Any]
) -> list[T | BaseException]:
    """What a function answers to each of many arguments, or raises, in their order; so many are asked at a time.

    However many there are, the loop makes no more tasks in one step, nor stand they all before those of other calls.
    """
    todo = enumerate(zip(*arguments, strict=True))
    answers: dict[int, T | BaseException] = {}

    async def ask_on() -> None:
        for n, argument in todo:
            try:
                answers[n] = await ask(*argument)
            except Exception as error:  # it is an answer
                answers[n] = error

    await asyncio.gather(*(ask_on() for _ in range(min(limit, len(arguments[0])))))
    return [answers[n] for n in range(len(answers))]


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
        self._closing = asyncio.Event()

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

    async def result(self, future: "asyncio.Future[T]") -> T:
        """What it brings. A cancel is its cancel, too. Raises BackendError if it outlasts `close`."""
        try:
            return await self.own(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closing.is_set() and task is not None and not task.cancelling():
                raise BackendError("closed") from None
            raise

    async def to_its_end(self, future: "asyncio.Future[T]") -> T:
        """Wait until it has ended, cancelled or not, however often. Raises BackendError if that outlasts `close`."""
        if (await to_its_end(self.own(future))).cancelled():
            raise BackendError("closed")
        return future.result()

    async def close(self) -> None:
        """Wait for what is under way, but not for a dead service; idempotent."""
        self._closing.set()
        running = set(self._running)
        try:
            if running:
                await asyncio.wait(running, timeout=CLOSE_SECONDS)
        finally:
            for future in running:
                future.cancel()
        if running:
            await asyncio.wait(running, timeout=CLOSE_SECONDS)  # which is a matter of some turns of the loop
