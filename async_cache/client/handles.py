"""What a `BlockingClient` gives out beside prefetches: writers, streams and events, for any thread."""

from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

from async_cache.client.thread import ClientThread
from async_cache.errors import CacheClosedError
from async_cache.handles.events import EventStream
from async_cache.handles.lease import ReadChunk
from async_cache.handles.stream import ReadStream
from async_cache.handles.writer import Opened, Writer
from async_cache.values import Event, LoadResult

T = TypeVar("T")


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
        self._thread.check_not_forked()
        return self._stream.take(most)

    def __next__(self) -> Event:
        self._thread.check_not_forked()
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
