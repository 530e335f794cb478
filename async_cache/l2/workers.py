"""Threads for calls that block. A dead disk holds up neither a cancelled caller for ever, nor the exit."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from itertools import count
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, ParamSpec, TypeVar

from async_cache.aio.ending import until_done
from async_cache.errors import BackendError

P = ParamSpec("P")
R = TypeVar("R")

_Queue = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class DaemonExecutor(Executor):
    """A fixed number of daemon threads that serve one queue.

    The executors of the standard library join their threads when the interpreter exits: a thread that waits for a
    dead disk would keep the process for ever.
    """

    def __init__(self, threads: int, name: str):
        self._queue: _Queue = SimpleQueue()
        self._ends: list[Future[None]] = [Future() for _ in range(threads)]
        self._stopped = False
        for number, ended in enumerate(self._ends):
            Thread(target=_work, args=(self._queue, ended), name=f"{name} {number}", daemon=True).start()

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Queue a call. Raises RuntimeError after `shutdown`."""
        if self._stopped:
            raise RuntimeError("the executor was shut down")
        future: Future[R] = Future()
        self._queue.put((future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:
        """End the threads after what is queued. It never waits: `ended` does."""
        if not self._stopped:
            self._stopped = True
            for _ in self._ends:
                self._queue.put(None)

    async def ended(self, timeout_seconds: float) -> bool:
        """Wait until all threads have ended, or the time is over; whether they have."""
        ends = [asyncio.wrap_future(end) for end in self._ends]
        _, stuck = await asyncio.wait(ends, timeout=timeout_seconds)
        return not stuck


def _work(queue: _Queue, ended: Future[None]) -> None:
    while (call := queue.get()) is not None:
        future, function = call
        del call
        if not future.set_running_or_notify_cancel():
            del function  # and the buffers with it, as below: from here on they are the caller's
            continue
        try:
            result = function()
        except BaseException as error:  # the root of a call: whoever waits for it gets it
            del function
            future.set_exception(error)
        else:
            del function
            future.set_result(result)
    ended.set_result(None)


async def settle(futures: Sequence[Future[Any]], stop: Event, given_up: "asyncio.Future[None]") -> None:
    """Wait until no thread works on any of the futures. Raises what one of them raised.

    They share their work: once one has ended, those that did not begin are not needed.

    A cancel sets `stop`, which the functions look at between two steps, drops the calls that did not begin, and waits
    for the others before it goes on, however often it is repeated: only then are their buffers free. When the threads
    are `given_up`, at the close, it waits no longer and raises BackendError, since a stuck call would keep the loop.
    """
    loop = given_up.get_loop()
    ended: asyncio.Future[None] = loop.create_future()
    numbers = count(1)
    together = list(futures)  # not after the last: it knows this function, which knows it

    def settled(_: object) -> None:
        for future in together:
            future.cancel()
        if next(numbers) == len(together):  # one wakeup for all
            together.clear()
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(ended.set_result, None)

    for future in futures:
        future.add_done_callback(settled)
    cancelled: asyncio.CancelledError | None = None
    while futures and not ended.done():
        try:
            await until_done(loop, ended, given_up)
            if not ended.done():
                raise BackendError("closed while a thread was stuck")
        except asyncio.CancelledError as error:
            cancelled = error
            stop.set()
            for future in futures:
                future.cancel()
    if cancelled is not None:
        raise cancelled
    for future in futures:
        if not future.cancelled():
            future.result()
