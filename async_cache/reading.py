"""A reader's lease on what its request has loaded: lease -> release."""

import importlib
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from async_cache.l1.entry import Entry
from async_cache.layout import ModelLayout
from async_cache.prefetch import PrefetchController
from async_cache.request import Request
from async_cache.values import LoadResult

if TYPE_CHECKING:
    import torch


class ReadChunk:
    """One chunk of one rank: `index` in the prompt, `offset` in the arena (None if nothing of it is needed)."""

    __slots__ = ("_arena", "_layout", "_needed", "_rank", "_views", "index", "offset")

    def __init__(self, index: int, entry: Entry | None, rank: int, needed: int, layout: ModelLayout, arena: memoryview):
        self.index = index
        self.offset = entry.offset(rank) if entry is not None and entry.ranks >> rank & 1 else None
        self._arena, self._layout, self._rank, self._needed = arena, layout, rank, needed
        self._views: tuple[memoryview | None, ...] | None = None

    @property
    def views(self) -> tuple[memoryview | None, ...]:
        """By group, the object's bytes, read-only; None outside its window, or where the rank lacks the group."""
        if self._views is None:
            self._views = tuple(view.toreadonly() if view is not None else None for view in self._slices())
        return self._views

    def tensors(self) -> "tuple[torch.Tensor | None, ...]":
        """By group, a tensor over the same memory, which must not be written to."""
        tensors: tuple[torch.Tensor | None, ...] = importlib.import_module("async_cache.tensors").over(
            self._slices(), self._layout.groups
        )
        return tensors

    def _slices(self) -> Iterator[memoryview | None]:
        for group, span in enumerate(self._layout.spans[self._rank]):
            if self.offset is None or span is None or not self._needed >> self._layout.bit(self._rank, group) & 1:
                yield None
            else:
                yield self._arena[self.offset + span[0] : self.offset + span[1]]

    def _forget(self) -> None:
        """Make a use after the release an error, where nobody has built on the views."""
        self._arena = memoryview(b"")
        for view in self._views or ():
            if view is not None:
                try:
                    view.release()
                except BufferError:
                    continue


class ReadLease:
    """`async with` it, or `await` it and `release()` later: ENTERED once the load is done, LEFT by the release.

    Afterwards it is a sequence of the chunks in order, and `result` says how many there are. Its memory stays as it is
    until the release, whatever happens to the request.
    """

    def __init__(self, controller: PrefetchController, arena: memoryview, request_id: str, rank: int, reader: int):
        self._controller = controller
        self._arena = arena
        self._request_id, self._rank, self._reader = request_id, rank, reader
        self._request: Request | None = None
        self._chunks: tuple[ReadChunk, ...] = ()
        self._result: LoadResult | None = None

    @property
    def result(self) -> LoadResult:
        """How much was loaded."""
        if self._result is None:
            raise RuntimeError("the lease was not entered: `async with` or `await` it first")
        return self._result

    @property
    def chunks(self) -> tuple[ReadChunk, ...]:
        """The chunks in order."""
        return self._chunks

    def release(self) -> None:
        """Leave; the views must not be used any more. May be called more than once."""
        request, self._request = self._request, None
        if request is not None:
            for chunk in self._chunks:
                chunk._forget()
            self._controller.leave(request)

    async def _enter(self) -> Self:
        if self._result is None:
            request = await self._controller.enter(self._request_id, self._rank, self._reader)
            self._request = request
            self._result = await request.result.wait()
            layout, start = request.prompt.layout, request.start_chunk
            self._arena = memoryview(self._arena)  # of its own, which lives as long as the lease
            self._chunks = tuple(
                ReadChunk(start + n, request.entries[n], self._rank, needed, layout, self._arena)
                for n, needed in enumerate(request.needed)
            )
        return self

    def __await__(self) -> Generator[object, None, Self]:
        return self._enter().__await__()

    async def __aenter__(self) -> Self:
        return await self._enter()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __iter__(self) -> Iterator[ReadChunk]:
        return iter(self._chunks)

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, position: int) -> ReadChunk:
        return self._chunks[position]
