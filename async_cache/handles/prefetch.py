"""`Prefetch`: what a caller holds of a lookup and a load."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from async_cache.aio.promise import Promise
from async_cache.values import LoadResult, LookupHits


class Promised(Protocol):
    """Whoever is promised hits, and then a result."""

    request_id: str
    hits: Promise[LookupHits]
    result: Promise[LoadResult]


class Prefetch:
    """One prefetch: a lookup and a load, each with its future."""

    __slots__ = ("_cancel", "promised")

    def __init__(self, promised: Promised, cancel: Callable[[], None]):
        self.promised = promised
        self._cancel = cancel

    @property
    def request_id(self) -> str:
        """What the other calls know it by."""
        return self.promised.request_id

    @property
    def lookup_done(self) -> "asyncio.Future[LookupHits]":
        """How much is cached. Each access gives a future of the caller's own."""
        return self.promised.hits.future()

    @property
    def load_done(self) -> "asyncio.Future[LoadResult]":
        """That it is in memory. Each access gives a future of the caller's own."""
        return self.promised.result.future()

    def cancel(self) -> None:
        """Stop looking up and loading; both futures resolve. Does nothing once it has loaded."""
        self._cancel()

    def __repr__(self) -> str:
        promised = self.promised
        state = "looking up" if promised.hits.pending else "loading" if promised.result.pending else "done"
        return f"<Prefetch {self.request_id!r}, {state}>"
