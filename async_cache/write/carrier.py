"""Carries things out to their end, whoever waits for them and is cancelled."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from async_cache.errors import CacheClosedError

T = TypeVar("T")


class Carrier:
    """The tasks of what is being carried out. `close` ends them: whoever waits gets CacheClosedError."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def carry_out(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it in a task of its own, and wait for that."""
        return await self.wait(self.begin(work))

    def begin(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Do it in a task of its own, for any number of waiters. Raises CacheClosedError after `close`."""
        if self._closed:
            work.close()
            raise CacheClosedError("the cache was closed")
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def wait(self, task: "asyncio.Task[T]") -> T:
        """The outcome of such a task. Raises CacheClosedError where it was cancelled, and not the waiter."""
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise CacheClosedError("the cache was closed") from None
            raise

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, also where its caller is gone

    async def close(self) -> None:
        """Cancel what is being carried out, wait for its end, and begin no more."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
