"""`Prefetch`: what a caller holds of a lookup and a load."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, cast

from async_cache.aio.promise import Promise
from async_cache.values import LoadResult, LookupHits, SegmentHits, SegmentResult


class Promised(Protocol):
    """The record of a request, as far as its handle knows it: hits are promised, and then a result."""

    request_id: str
    hits: Promise[LookupHits]
    result: Promise[LoadResult]


class Prefetch:
    """A lookup and a load of one prompt, each with its future. `prefetch` of a cache or client makes it."""

    __slots__ = ("_cancel", "promised")

    def __init__(self, promised: Promised, cancel: Callable[[Any], None]):
        self.promised = promised
        """What the futures are made from, for those who pass it on: see `Promise.tell`."""
        self._cancel = cancel

    @property
    def request_id(self) -> str:
        """The id by which the other calls of the cache know this request."""
        return self.promised.request_id

    @property
    def lookup_done(self) -> "asyncio.Future[LookupHits]":
        """A future of how much is cached, known as soon as the lookup is done.

        Each access gives the caller a future of its own, so that to cancel it cancels nothing for others. It raises
        only CacheClosedError and ConnectionLostError.
        """
        return self.promised.hits.future()

    @property
    def load_done(self) -> "asyncio.Future[LoadResult]":
        """A future that says that the bytes are in memory, and how many; otherwise as `lookup_done`."""
        return self.promised.result.future()

    def cancel(self) -> None:
        """Stop looking up and loading; both futures resolve. Does nothing once it has loaded."""
        self._cancel(self.promised)

    def __repr__(self) -> str:
        promised = self.promised
        state = "looking up" if promised.hits.pending else "loading" if promised.result.pending else "done"
        return f"<Prefetch {self.request_id!r}, {state}>"


class SegmentPrefetch(Prefetch):
    """A lookup and a load of several prompts at once; `prefetch_segments` of a cache or client makes it."""

    __slots__ = ()

    @property
    def lookup_done(self) -> "asyncio.Future[SegmentHits]":  # type: ignore[override]  # it is only looked at
        """A future of how much of each prompt is cached; otherwise as that of a `Prefetch`."""
        return cast("asyncio.Future[SegmentHits]", self.promised.hits.future())

    @property
    def load_done(self) -> "asyncio.Future[SegmentResult]":  # type: ignore[override]
        """A future that says that the bytes are in memory, and how many of each prompt."""
        return cast("asyncio.Future[SegmentResult]", self.promised.result.future())
