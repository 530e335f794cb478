"""What a `BlockingClient` gives out: futures of a prefetch, writers, streams and events, each for any thread."""

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from async_cache.aio.forks import process
from async_cache.client.thread import ClientThread
from async_cache.errors import CacheClosedError
from async_cache.handles.events import EventStream
from async_cache.handles.lease import ReadChunk
from async_cache.handles.stream import ReadStream
from async_cache.handles.writer import Opened, Writer
from async_cache.values import Event, LoadResult, LookupHits, SegmentHits, SegmentResult

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

    __slots__ = ("_cancel", "load_done", "lookup_done", "request_id")

    def __init__(self, request_id: str, cancel: "Callable[[BlockingPrefetch], object]"):
        self.request_id = request_id
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


class BlockingWriter(Writer):
    """A writer that waits where it is left by `with`: what was committed can then be found over every connection."""

    def __init__(
        self,
        open_chunks: Callable[[Writer], Awaitable[Opened]],
        wait: Callable[[Coroutine[Any, Any, None]], None],
    ):
        super().__init__(open_chunks)
        self._wait = wait

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        try:
            self._wait(self.settled())
        except Exception:
            if error is None:  # else the error of the body is the one to hear of
                raise


class BlockingStream:
    """What a request is loading, for one thread: iterating waits for the next chunk, up to `timeout_seconds` each time.

    Leave it by `with`, or by `release`, from any thread. Iterating raises TimeoutError, after which it may go on,
    ConnectionLostError and CacheClosedError.
    """

    def __init__(self, stream: ReadStream, thread: ClientThread, timeout_seconds: float | None):
        self.lease = stream
        """The chunks that have come so far, their layout, and whether their memory is still held."""
        self._thread = thread
        self._timeout_seconds = timeout_seconds

    @property
    def result(self) -> LoadResult:
        """How much was loaded. Raises RuntimeError before the iteration has ended."""
        return self.lease.result

    def __iter__(self) -> Iterator[ReadChunk]:
        number = 0
        while self._has_come(number):
            yield self.lease[number]
            number += 1

    def _has_come(self, number: int) -> bool:
        if number < len(self.lease) and self.lease.held:  # without asking the client's thread
            return True
        return self._thread.wait(self.lease.arrived(number + 1), self._timeout_seconds)

    def release(self) -> None:
        """Give the memory back; the views must not be used any more. May be called more than once."""
        self.lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class BlockingEvents(Iterator[Event]):
    """Events in their order, for one thread: iterating waits for the next one, and `take` does not.

    It ends with `close`, or when nobody has it any more. Both raise CacheClosedError or ConnectionLostError once all
    that came before has been taken.
    """

    def __init__(self, stream: EventStream, thread: ClientThread, keeps: object):
        self._stream = stream
        self._thread = thread
        self._keeps = keeps

    def take(self, most: int = 256) -> list[Event]:
        """Those of the next events that have come, up to `most`."""
        return self._stream.take(most)

    def __next__(self) -> Event:
        while not (events := self._stream.take(1)):
            try:
                self._thread.wait(self._stream.arrived())
            except StopAsyncIteration:
                raise StopIteration from None
        return events[0]

    def close(self) -> None:
        """Read nothing more. May be called more than once."""
        with suppress(CacheClosedError):  # then it has ended
            self._thread.wait(self._stream.aclose())


def pass_on(to: BlockingFuture[T], outcome: "asyncio.Future[T]") -> None:
    """Give a future the outcome of another one, unless its owner has cancelled it."""
    if not to.set_running_or_notify_cancel():  # its owner has cancelled it
        return
    error = outcome.exception()
    if error is not None:
        to.set_exception(error)
    else:
        to.set_result(outcome.result())
