"""Readers to whom the chunks of a request are given while it loads: each as soon as all before it are there, too."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from async_cache.handles.stream import Arrived, Streamed
from async_cache.l1.entry import offsets_of
from async_cache.l1.store import L1Store
from async_cache.prompt.parts import Parts
from async_cache.read.loads import Loader
from async_cache.read.request import Request
from async_cache.read.requests import Requests
from async_cache.values import LoadResult

_GIVEN_AT_ONCE = 1024  # chunks, in a millisecond; then the loop gets its turn


class Stream:
    """One reader's way through a request. `given` is how far it has come, and `left` ends it."""

    def __init__(self, request: Request, rank: int, l1: L1Store, loader: Loader):
        self.given = 0
        self._request = request
        self._rank = rank
        self._l1 = l1
        self._loader = loader
        self._woken = asyncio.Event()
        self._objects: list[int] = []  # what it was given of each chunk
        self._is_inside, self._is_watching = True, request.pending
        request.streams.append(self)
        if self._is_watching:
            loader.watch()

    def wake(self) -> None:
        """Have it look for what there is by now."""
        self._woken.set()

    def left(self, leave: Callable[[], object]) -> None:
        """Give it nothing more, and have its reader leave."""
        self._is_inside = False
        self._unwatch()
        self._request.leave(self, self._l1)
        self.wake()
        leave()

    def _unwatch(self) -> None:
        if self._is_watching:
            self._is_watching = False
            self._loader.unwatch()

    async def more(self) -> Arrived | LoadResult:
        """The next chunks, at least one, or what came before and has changed; the result when there are no more.

        Raises CacheClosedError, and RuntimeError where the reader has left.
        """
        promise = self._request.result
        while self._is_inside:
            if promise.error is not None:
                raise promise.error.with_traceback(None)
            result = promise.value  # of now: what is looked at next is no older
            begin, end = self._next(result)
            if begin < end:
                return self._give(begin, end)
            if result is not None:
                self._unwatch()
                return result
            self._woken.clear()
            await self._woken.wait()
        raise RuntimeError("the lease was released")

    def _next(self, result: LoadResult | None) -> tuple[int, int]:
        """From where to where chunks may be given now."""
        request, begin = self._request, self.given
        most = min(request.length, begin + _GIVEN_AT_ONCE)
        if result is None:
            loads, reasons, end = request.loads, request.reasons, begin
            while end < most and end not in loads and end not in reasons:
                end += 1
            return begin, end
        if begin >= most and result.shortfall is not None:
            begin = self._changed(request.needed)
            most = min(self.given, request.length, begin + _GIVEN_AT_ONCE)
        return begin, most

    def _changed(self, needed: Sequence[int]) -> int:
        """The first chunk of which another part is needed than was given: the end of the prefix has moved."""
        pairs = enumerate(zip(needed, self._objects, strict=False))
        return next((number for number, (need, given) in pairs if need != given), self.given)

    def _give(self, begin: int, end: int) -> Arrived:
        request = self._request
        objects = list(request.needed[begin:end])
        self._objects[begin:end] = objects
        self.given = max(self.given, end)
        return Arrived(begin, offsets_of(request.entries[begin:end], self._rank), objects)


class Streams:
    """Lets readers into requests before their load is done."""

    def __init__(self, requests: Requests, loader: Loader, l1: L1Store):
        self._requests, self._loader, self._l1 = requests, loader, l1

    async def enter(self, request_id: str, rank: int, reader: int) -> Streamed:
        """Begin to read a request as soon as its lookup is done. Raises as `Requests.enter`.

        A request for several prompts has no stream: raises ValueError.
        """
        request = self._requests.readable(request_id, rank, reader)
        if isinstance(request.prompt, Parts):
            raise ValueError(f"request {request_id!r} is for several prompts: it is read when it has loaded")
        await request.hits.wait()
        memory, leave, undo = self._requests.admit(request, rank, reader)
        stream = Stream(request, rank, self._l1, self._loader)
        leave, undo = partial(stream.left, leave), partial(stream.left, undo)
        layout, start_chunk, chunks = request.prompt.layout, request.start_chunk, request.length
        return Streamed(layout, rank, start_chunk, chunks, memory, stream.more, leave, undo)
