"""Waiting for what must not be left behind, however often whoever waits is cancelled."""

import asyncio
from typing import TypeVar

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
        raise cancelled
    return future
