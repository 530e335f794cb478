"""What is done for a backend while it is open: calls in threads, and tasks of the loop."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from async_cache.errors import BackendError
from async_cache.l2.workers import DaemonExecutor

T = TypeVar("T")

WRITERS = 2  # one hashes while the other one writes


class Threads:
    """Those of a backend. Changes of the directory keep the order in which they were decided; loads wait for nothing.

    `given_up` is done when the backend is closed and waits for no thread any more.
    """

    def __init__(self, name: str, readers: int):
        self._loop = asyncio.get_running_loop()
        self.given_up: asyncio.Future[None] = self._loop.create_future()
        self.loads = DaemonExecutor(readers, f"{name} load")
        self.stores = DaemonExecutor(WRITERS, f"{name} store")
        self.changes = DaemonExecutor(1, f"{name} change")
        self.searches = DaemonExecutor(1, f"{name} search")
        self.scans = DaemonExecutor(1, f"{name} scan")
        self._all = (self.loads, self.stores, self.changes, self.searches, self.scans)

    def run(self, executor: DaemonExecutor, function: Callable[..., T], *arguments: Any) -> "asyncio.Future[T]":
        """Call a function in a thread. A caller that is cancelled does not keep it from being done."""
        return asyncio.wrap_future(executor.submit(function, *arguments), loop=self._loop)

    async def recorded(self) -> None:
        """Wait until all changes that were decided before are made. Raises BackendError, as `wait` does."""
        await self.wait(self.run(self.changes, int))

    async def wait(self, *futures: "asyncio.Future[Any]") -> None:
        """Wait until these are done, whatever came of them. Raises BackendError when the threads are given up."""
        waiting: set[asyncio.Future[Any]] = set(futures)
        while any(not future.done() for future in waiting):
            if self.given_up.done():
                raise BackendError("closed while a thread was stuck")
            await asyncio.wait({self.given_up, *waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting = {future for future in waiting if not future.done()}

    def shutdown(self) -> None:
        """End after what is queued."""
        for executor in self._all:
            executor.shutdown()

    async def ended(self, timeout_seconds: float) -> bool:
        """Wait until all have ended, or the time is over; whether they have."""
        return all(await asyncio.gather(*(executor.ended(timeout_seconds) for executor in self._all)))


class Work:
    """What is done with one directory until it is `over`: it was closed, or another one has its path.

    What ends later changes nothing any more. `used`: something was asked or changed since the start.
    """

    def __init__(self, threads: Threads):
        self.threads = threads
        self.over = self.used = False
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None], name: str | None = None) -> "asyncio.Task[None]":
        """Begin a task, whose exception is for those who wait for it."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()

    async def end_tasks(self) -> None:
        """Cancel all tasks, and wait for their end."""
        ending = set(self._tasks)
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending)

    async def idle(self) -> None:
        """Wait until no task is left."""
        while self._tasks:
            await asyncio.wait(self._tasks)
