"""Leases, lease -> release: `ReadLease`, a reader's on what its request has loaded, and what others have in common."""

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from enum import Enum
from itertools import chain, islice
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar, overload

from msgspec import Struct

from async_cache.handles.scoped import Scoped
from async_cache.memory import tensors
from async_cache.prompt.layout import ModelLayout
from async_cache.values import LoadResult, SegmentResult

if TYPE_CHECKING:
    import torch

_MADE_AT_ONCE = 1024  # chunks, in a millisecond


class Memory:
    """What the chunks of one lease are read from, until it is released."""

    __slots__ = ("view",)

    def __init__(self, view: memoryview):
        self.view: memoryview | None = view


def spans_of(layout: ModelLayout, rank: int, offset: int | None, objects: int) -> Iterator[tuple[int, int] | None]:
    """Where the bytes of each group of a chunk are in memory, as `ReadChunk.spans` gives them."""
    readable = objects >> layout.objects.bit(rank, 0)
    for group, span in enumerate(layout.objects.spans[rank]):
        if offset is None or span is None or not readable >> group & 1:
            yield None
        else:
            yield offset + span[0], offset + span[1]


class ReadChunk(Struct, eq=False):
    """One chunk of one rank to read: `index` in its prompt, `offset` in the cache's `memory`.

    `offset` is None if nothing of it is needed. `objects` are those that can be read, of all ranks, by bit (see
    `prompt.objects`). `part` is the number of its prompt, where several were asked for.
    """

    index: int
    offset: int | None
    objects: int
    _rank: int
    _layout: ModelLayout
    _memory: Memory
    part: int = 0
    _views: tuple[memoryview | None, ...] | None = None

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
        return spans_of(self._layout, self._rank, self.offset, self.objects)

    def __repr__(self) -> str:
        return f"<ReadChunk {self.index}>"

    def become(self, objects: int) -> None:
        """Have these objects to read from now on."""
        self.objects, self._views = objects, None

    def _release_views(self) -> None:
        """Make a use after the release an error, where nobody has built on the views."""
        views, self._views = self._views, None
        for view in views or ():
            if view is not None:
                try:
                    view.release()
                except BufferError:
                    continue


def _places(result: LoadResult) -> Iterator[tuple[int, int]]:
    """The prompt and the index in it of each chunk that was loaded, in order."""
    for part, loaded in enumerate(result.parts if isinstance(result, SegmentResult) else (result,)):
        for index in range(loaded.start_chunk, loaded.start_chunk + loaded.chunks):
            yield part, index


class Entered(NamedTuple):
    """What entering a read gives: the load's result, its layout, where the chunks are, and what acts on the read.

    `offsets` and `objects` say by chunk what a `ReadChunk` of the rank has of them, all of it in `memory`. `release`
    ends the read; `undo` ends it as if it had not been entered. `held` says whether its memory is still kept.
    """

    result: LoadResult
    layout: ModelLayout
    rank: int
    offsets: Sequence[int | None]
    objects: Sequence[int]
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


class Reads(Protocol):
    """What entering any lease gives: see `Entered`."""

    @property
    def layout(self) -> ModelLayout: ...
    @property
    def memory(self) -> Memory: ...
    @property
    def release(self) -> Callable[[], object]: ...
    @property
    def undo(self) -> Callable[[], object]: ...
    @property
    def held(self) -> Callable[[], bool]: ...


R = TypeVar("R", bound=Reads)


class Lease(Scoped[ReadChunk], Generic[R]):
    """Chunks of which the memory stays as it is from the entry until the release. See `LeaseState`."""

    def __init__(self, enter: Callable[[], Awaitable[R]]):
        self._enter_read = enter
        self._entered: R | None = None
        self._entering = asyncio.Lock()
        self._state = _NEW

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

    def _check_entered(self) -> None:
        _ = self._read

    @property
    def _read(self) -> R:
        if self._entered is None:
            raise RuntimeError("the lease was not entered: `async with` or `await` it first")
        return self._entered

    @abstractmethod
    def _made_chunks(self) -> Iterable[ReadChunk]:
        """Those chunks that somebody may have looked at."""

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
        for chunk in [chunk for chunk in self._made_chunks() if chunk._views is not None]:
            chunk._release_views()
        return True

    async def _enter(self) -> None:
        async with self._entering:  # whoever else enters it meanwhile enters the same read
            if self._entered is None:
                self._entered = await self._enter_read()
                self._state = _ENTERED

    def _leave(self) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, {self._state.value}, {len(self)} chunks>"


class ReadLease(Lease[Entered]):
    """A reader's lease on what a request has loaded: `async with` it, or `await` it and `release()` later.

    Once it is entered it is a sequence of the chunks in order, and `result` says how many there are. Its memory stays
    as it is until the release, whatever happens to the request.
    """

    def __init__(self, enter: Callable[[], Awaitable[Entered]]):
        super().__init__(enter)
        self._made: dict[int, list[ReadChunk]] = {}  # in slices, by where each begins

    @property
    def result(self) -> LoadResult:
        """How much was loaded. Raises RuntimeError before it is entered."""
        return self._read.result

    def __len__(self) -> int:
        return len(self._entered.offsets) if self._entered is not None else 0

    def __iter__(self) -> Iterator[ReadChunk]:
        self._check_entered()
        return chain.from_iterable(map(self._slice, range(0, len(self), _MADE_AT_ONCE)))

    @overload
    def __getitem__(self, position: int) -> ReadChunk: ...
    @overload
    def __getitem__(self, position: slice) -> tuple[ReadChunk, ...]: ...
    def __getitem__(self, position: int | slice) -> ReadChunk | tuple[ReadChunk, ...]:
        if isinstance(position, slice):
            return tuple(map(self.__getitem__, range(len(self))[position]))
        position = range(len(self))[position]
        return self._slice(position - position % _MADE_AT_ONCE)[position % _MADE_AT_ONCE]

    def _slice(self, begin: int) -> list[ReadChunk]:
        """Some chunks, which are made when somebody looks at them: a server does not."""
        chunks = self._made.get(begin)
        if chunks is None:
            result, layout, rank, offsets, objects, memory, *_ = self._read
            end = begin + _MADE_AT_ONCE
            chunks = self._made[begin] = [
                ReadChunk(index, offset, readable, rank, layout, memory, part)
                for (part, index), offset, readable in zip(
                    islice(_places(result), begin, end), offsets[begin:end], objects[begin:end], strict=True
                )
            ]
        return chunks

    def _made_chunks(self) -> Iterable[ReadChunk]:
        return chain.from_iterable(self._made.values())
