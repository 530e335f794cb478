"""To the end although cancelled: for what touches memory that is the caller's again when it has ended."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def at_its_end(future: "asyncio.Future[T]") -> T:
    """What a future brings. A cancel is raised when it is done, however often it is repeated."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return future.result()
    if not future.cancelled():
        future.exception()  # looked at: nobody else does
    try:
        raise cancelled
    finally:
        del cancelled  # it knows this frame, and the frame must not know it: both would wait for the garbage collector


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function returns, called in a thread of the loop's own. A cancel is raised when it has ended."""
    call = partial(function, *args, **kwargs)
    return await at_its_end(asyncio.get_running_loop().run_in_executor(None, call))
