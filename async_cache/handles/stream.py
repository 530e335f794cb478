"""`ReadStream`: a reader's lease on what its request is loading, chunk by chunk while they arrive."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, overload

from async_cache.handles.lease import Lease, LeaseState, Memory, ReadChunk
from async_cache.prompt.layout import ModelLayout
from async_cache.values import LoadResult

_RELEASED = LeaseState.RELEASED


class Arrived(NamedTuple):
    """Chunks that are there, from the one of number `begin` on: where each is, and its objects, as `Entered` has them.

    Chunks that came before may come again, with other objects: a load that fell short may need others of its windows.
    """

    begin: int
    offsets: Sequence[int | None]
    objects: Sequence[int]


class Streamed(NamedTuple):
    """What entering a stream gives: as `Entered`, but for chunks that come one after the other.

    There will be up to `chunks`. `more` waits for the next of them, and returns the result when there are no more; it
    raises what the cache or the connection ends with, and RuntimeError once the reader has left.
    """

    layout: ModelLayout
    rank: int
    start_chunk: int
    chunks: int
    memory: Memory
    more: Callable[[], Awaitable[Arrived | LoadResult]]
    release: Callable[[], object]
    undo: Callable[[], object]
    held: Callable[[], bool] = lambda: True


class ReadStream(Lease[Streamed]):
    """A reader's lease on what a request is loading: `async with` it, or `await` it and `release()` later.

    `async for` gives the chunks in order, each as soon as it and those before it are in memory. It ends early where the
    load falls short, and `result` says after it how much was loaded. A stream is also a sequence of the chunks that
    have come so far. All of them keep their memory until the release, whatever happens to the request.
    """

    def __init__(self, enter: Callable[[], Awaitable[Streamed]]):
        super().__init__(enter)
        self._chunks: list[ReadChunk] = []
        self._result: LoadResult | None = None
        self._taking = asyncio.Lock()

    @property
    def result(self) -> LoadResult:
        """How much was loaded. Raises RuntimeError before the iteration has ended."""
        if self._result is None:
            raise RuntimeError("the result of a stream is there when its iteration has ended")
        return self._result

    @property
    def ended(self) -> bool:
        """Whether no more chunks will come, and `result` is there."""
        return self._result is not None

    async def arrived(self, count: int) -> bool:
        """Wait until so many chunks have come; whether they have, and the load has not fallen short before.

        Raises RuntimeError once it was released, CacheClosedError and ConnectionLostError.
        """
        while len(self._chunks) < count and self._result is None:
            async with self._taking:  # others may wait for less, or for the same
                if len(self._chunks) < count and self._result is None:
                    self._check_held()
                    self._add(await self._read.more())
        self._check_held()
        return len(self._chunks) >= count

    def _check_held(self) -> None:
        if self._state is _RELEASED:
            raise RuntimeError("the lease was released")

    def _add(self, more: Arrived | LoadResult) -> None:
        if isinstance(more, LoadResult):
            self._result = more
            return
        chunks, (layout, rank, start_chunk, _, memory, *_) = self._chunks, self._read
        for number, (offset, objects) in enumerate(zip(more.offsets, more.objects, strict=True), more.begin):
            if number < len(chunks):
                chunks[number].become(objects)
            else:
                chunks.append(ReadChunk(start_chunk + number, offset, objects, rank, layout, memory))

    def __len__(self) -> int:
        return len(self._chunks)

    @overload
    def __getitem__(self, position: int) -> ReadChunk: ...
    @overload
    def __getitem__(self, position: slice) -> list[ReadChunk]: ...
    def __getitem__(self, position: int | slice) -> ReadChunk | list[ReadChunk]:
        """A chunk that has come, by its place among them, or those of a slice."""
        return self._chunks[position]

    def __aiter__(self) -> AsyncIterator[ReadChunk]:
        return _Arrivals(self)

    def _made_chunks(self) -> Iterable[ReadChunk]:
        return self._chunks


class _Arrivals(AsyncIterator[ReadChunk]):
    """The chunks of a stream, from the first one on."""

    def __init__(self, stream: ReadStream):
        self._stream = stream
        self._given = 0

    async def __anext__(self) -> ReadChunk:
        if not await self._stream.arrived(self._given + 1):
            raise StopAsyncIteration
        self._given += 1
        return self._stream[self._given - 1]
