"""`ReadLease`: a reader's lease on what its request has loaded, lease -> release."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from async_cache.handles.scoped import Scoped
from async_cache.memory import tensors
from async_cache.prompt.layout import ModelLayout
from async_cache.values import LoadResult

if TYPE_CHECKING:
    import torch


class Memory:
    """What the chunks of one lease are read from, until it is released."""

    __slots__ = ("view",)

    def __init__(self, view: memoryview):
        self.view: memoryview | None = view


class ReadChunk:
    """One chunk of one rank to read: `index` in the prompt, `offset` in the cache's `memory`.

    `offset` is None if nothing of it is needed. `objects` are those that can be read, of all ranks, by bit (see
    `prompt.objects`).
    """

    __slots__ = ("_layout", "_memory", "_rank", "_views", "index", "objects", "offset")

    def __init__(self, index: int, offset: int | None, rank: int, objects: int, layout: ModelLayout, memory: Memory):
        self.index = index
        self.offset = offset
        self.objects = objects
        self._memory = memory
        self._layout, self._rank = layout, rank
        self._views: tuple[memoryview | None, ...] | None = None

    @property
    def views(self) -> tuple[memoryview | None, ...]:
        """The bytes of each group's object, read-only; None outside its window, or where the rank lacks the group.

        Raises RuntimeError once the lease was released.
        """
        if self._views is None:
            self._views = tuple(view.toreadonly() if view is not None else None for view in self._slices())
        return self._views

    def tensors(self) -> "tuple[torch.Tensor | None, ...]":
        """A tensor over each group's bytes, without a copy, which must not be written to; None as in `views`.

        Raises ImportError where torch is not installed, and RuntimeError once the lease was released.
        """
        return tensors.over(self._slices(), self._layout.groups)

    def _slices(self) -> Iterator[memoryview | None]:
        view = self._memory.view
        if view is None:
            raise RuntimeError("the lease was released")
        for span in self.spans():
            yield view[span[0] : span[1]] if span is not None else None

    def spans(self) -> Iterator[tuple[int, int] | None]:
        """Where the bytes of each group are in `memory`: (begin, end), or None as in `views`."""
        readable = self.objects >> self._layout.objects.bit(self._rank, 0)
        for group, span in enumerate(self._layout.objects.spans[self._rank]):
            if self.offset is None or span is None or not readable >> group & 1:
                yield None
            else:
                yield self.offset + span[0], self.offset + span[1]

    def __repr__(self) -> str:
        return f"<ReadChunk {self.index}>"

    def _release_views(self) -> None:
        """Make a use after the release an error, where nobody has built on the views."""
        views, self._views = self._views, None
        for view in views or ():
            if view is not None:
                try:
                    view.release()
                except BufferError:
                    continue


class Entered(NamedTuple):
    """What entering a read gives: the load's result, its layout, the chunks, their memory, and what acts on the read.

    `release` ends the read; `undo` ends it as if it had not been entered. `held` says whether its memory is still kept.
    """

    result: LoadResult
    layout: ModelLayout
    chunks: tuple[ReadChunk, ...]
    memory: Memory
    release: Callable[[], object]
    undo: Callable[[], object]
    held: Callable[[], bool] = lambda: True


class LeaseState(Enum):
    """NEW -> ENTERED, once the load is done, -> RELEASED."""

    NEW = "new"
    ENTERED = "entered"
    RELEASED = "released"


_NEW, _ENTERED, _RELEASED = LeaseState  # each access to a member by its enum is a call, in Python 3.11


class ReadLease(Scoped[ReadChunk]):
    """A reader's lease on what a request has loaded: `async with` it, or `await` it and `release()` later.

    Once it is entered it is a sequence of the chunks in order, and `result` says how many there are. Its memory stays
    as it is until the release, whatever happens to the request.
    """

    def __init__(self, enter: Callable[[], Awaitable[Entered]]):
        self._enter_read = enter
        self._entered: Entered | None = None
        self._entering = asyncio.Lock()
        self._state = _NEW

    @property
    def result(self) -> LoadResult:
        """How much was loaded. Raises RuntimeError before it is entered."""
        return self._read.result

    @property
    def held(self) -> bool:
        """Whether its memory stays as it is: until the release, or until the connection that it came by is lost.

        Whoever copies from a server's memory looks once more when the copy is done.
        """
        return self._state is _ENTERED and self._read.held()

    @property
    def layout(self) -> ModelLayout:
        """The layout of the request's prompt. Raises RuntimeError before it is entered."""
        return self._read.layout

    @property
    def _read(self) -> Entered:
        if self._entered is None:
            raise RuntimeError("the lease was not entered: `async with` or `await` it first")
        return self._entered

    def release(self) -> None:
        """Give the memory back; the views must not be used any more. May be called more than once."""
        if self._end():
            self._read.release()

    def undo(self) -> None:
        """Give the memory back as if it had never been entered: the same rank and reader may read again."""
        if self._end():
            self._read.undo()

    def _end(self) -> bool:
        if self._state is not _ENTERED:
            return False
        self._state = _RELEASED
        self._read.memory.view = None
        for chunk in [chunk for chunk in self._chunks if chunk._views is not None]:
            chunk._release_views()
        return True

    async def _enter(self) -> None:
        async with self._entering:  # whoever else enters it meanwhile enters the same read
            if self._entered is None:
                self._entered = await self._enter_read()
                self._chunks = self._entered.chunks
                self._state = _ENTERED

    def _leave(self) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<ReadLease, {self._state.value}, {len(self)} chunks>"
