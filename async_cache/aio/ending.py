"""Waiting for what must not be left behind, however often whoever waits is cancelled."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

from async_cache.aio.countdown import Countdown

P = ParamSpec("P")
T = TypeVar("T")


async def to_its_end(future: "asyncio.Future[T]") -> "asyncio.Future[T]":
    """Wait until a future is done, and return it. A cancel of the caller is raised then, and not before."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not future.cancelled():
            future.exception()  # looked at: nobody else does
        try:
            raise cancelled
        finally:
            del cancelled  # it knows this frame: if the frame knew it, both would wait for the garbage collector
    return future


async def until_done(
    loop: asyncio.AbstractEventLoop, *futures: "asyncio.Future[Any]", timeout_seconds: float | None = None
) -> None:
    """Wait until one of these is done, whatever came of it, or the time is over. Cancelled, it cancels none of them.

    Time for which the loop was held does not count, see `Countdown`. It is what `asyncio.wait` does for the first that
    completes, in a third of the time: each load waits so twice.
    """
    if any(future.done() for future in futures):
        return
    waiter = loop.create_future()

    def wake(_: object = None) -> None:
        if not waiter.done():
            waiter.set_result(None)

    timer = Countdown(loop, timeout_seconds, wake) if timeout_seconds is not None else None
    for future in futures:
        future.add_done_callback(wake)
    try:
        await waiter
    finally:
        if timer is not None:
            timer.cancel()
        for future in futures:
            future.remove_done_callback(wake)


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function returns, called in a thread of the loop's own. A cancel is raised when it has ended.

    Only then is what it touches the caller's again.
    """
    call = partial(function, *args, **kwargs)
    return (await to_its_end(asyncio.get_running_loop().run_in_executor(None, call))).result()
