"""The prefetches of a `BlockingClient`: futures for any thread, and how a client's futures get to them."""

import asyncio
import concurrent.futures
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from async_cache.aio.forks import process
from async_cache.client.client import CacheClient
from async_cache.client.thread import ClientThread
from async_cache.errors import CacheClosedError
from async_cache.handles.prefetch import Prefetch
from async_cache.prompt.arguments import Wanted
from async_cache.values import LoadResult, LookupHits, SegmentHits, SegmentResult

T = TypeVar("T")

_DONE = (
    concurrent.futures._base.FINISHED,
    concurrent.futures._base.CANCELLED,
    concurrent.futures._base.CANCELLED_AND_NOTIFIED,
)


class BlockingFuture(concurrent.futures.Future[T]):
    """A future whose `done()` takes no lock: a scheduler asks in every step.

    In a child that was forked while it was pending, nothing comes any more: it is done, with a CacheClosedError.
    """

    def __init__(self) -> None:
        super().__init__()
        self._process = process()

    def done(self) -> bool:
        """Whether there is a value, or an error."""
        return self._state in _DONE or self._process is not process()

    def result(self, timeout: float | None = None) -> T:
        """The value, when it is there. Raises its error, and TimeoutError."""
        if (error := self._left_by_fork()) is not None:
            raise error
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error, or None, when it is known. Raises TimeoutError."""
        return self._left_by_fork() or super().exception(timeout)

    def _left_by_fork(self) -> CacheClosedError | None:
        if self._process is process() or self._state in _DONE:
            return None
        return CacheClosedError("the prefetch was begun before a fork: begin another one in the child")


class BlockingPrefetch:
    """One prefetch: a lookup and a load, each with a future that resolves without anybody asking for it.

    The futures are those of `concurrent.futures`: `result(timeout)` waits, and `done()` costs next to nothing.
    """

    __slots__ = ("_cancel", "keeps", "load_done", "lookup_done", "request_id")

    def __init__(self, request_id: str, cancel: "Callable[[BlockingPrefetch], object]", keeps: object = None):
        self.request_id = request_id
        self.keeps = keeps
        """What is not let go as long as this is there, or under way."""
        self.lookup_done: BlockingFuture[LookupHits] = BlockingFuture()
        self.load_done: BlockingFuture[LoadResult] = BlockingFuture()
        self._cancel = cancel

    def cancel(self) -> None:
        """Stop looking up and loading; both futures resolve. Does nothing once it has loaded."""
        self._cancel(self)

    def break_with(self, error: Exception) -> None:
        """Have both futures raise the error: nothing will come."""
        for future in (self.lookup_done, self.load_done):
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def __repr__(self) -> str:
        state = "done" if self.load_done.done() else "loading" if self.lookup_done.done() else "looking up"
        return f"<BlockingPrefetch {self.request_id!r}, {state}>"


class BlockingSegmentPrefetch(BlockingPrefetch):
    """A lookup and a load of several prompts at once."""

    __slots__ = ()

    lookup_done: BlockingFuture[SegmentHits]  # type: ignore[assignment]  # it is only looked at
    load_done: BlockingFuture[SegmentResult]  # type: ignore[assignment]


P = TypeVar("P", bound=BlockingPrefetch)


class BlockingPrefetches:
    """Begins prefetches in a client's thread, and has their futures resolve by those of the client."""

    def __init__(self, thread: ClientThread):
        self._thread = thread
        self._begun: dict[BlockingPrefetch, Prefetch] = {}

    def begin(self, client: CacheClient, kind: type[P], asked: Wanted, keeps: object) -> P:
        """A prefetch of what is asked for, under an id: it begins soon, or breaks. It `keeps` what it is given."""
        assert asked.request_id is not None
        prefetch = kind(asked.request_id, partial(self._thread.post, self._cancel), keeps)
        if not self._thread.post(self._begin, client, asked, prefetch):
            prefetch.break_with(CacheClosedError("the client was closed"))
        return prefetch

    def _begin(self, client: CacheClient, asked: Wanted, prefetch: BlockingPrefetch) -> None:
        try:
            begun = client.begin(asked)
        except Exception as error:
            prefetch.break_with(error)
            return
        self._begun[prefetch] = begun
        begun.lookup_done.add_done_callback(partial(_pass_on, prefetch.lookup_done))
        begun.load_done.add_done_callback(partial(_pass_on, prefetch.load_done))
        begun.load_done.add_done_callback(lambda _: self._begun.pop(prefetch))

    def _cancel(self, prefetch: BlockingPrefetch) -> None:
        begun = self._begun.get(prefetch)
        if begun is not None:
            begun.cancel()


def _pass_on(to: BlockingFuture[T], outcome: "asyncio.Future[T]") -> None:
    """Give a future the outcome of another one, unless its owner has cancelled it."""
    if not to.set_running_or_notify_cancel():  # its owner has cancelled it
        return
    error = outcome.exception()
    if error is not None:
        to.set_exception(error)
    else:
        to.set_result(outcome.result())
