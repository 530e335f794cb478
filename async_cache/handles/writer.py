"""`Writer`: chunks of one rank to fill and to commit, in an embedded cache and through a client alike."""

import asyncio
import ctypes
from collections.abc import Awaitable, Callable
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, overload

from msgspec import Struct, field

from async_cache.aio.forks import Process, process
from async_cache.errors import CacheClosedError, WriterClosedError
from async_cache.handles.scoped import Scoped
from async_cache.memory import tensors
from async_cache.prompt.layout import ModelLayout
from async_cache.values import Shortfall

if TYPE_CHECKING:
    import torch

Block = ctypes.Array[ctypes.c_ubyte]
"""The memory of one chunk and rank. Views and tensors keep it, whatever becomes of the writer."""


class Life(Struct, eq=False):
    """What the chunks of one writer act on, while it is open."""

    opened: "Opened | None" = None
    process: Process = field(default_factory=process)
    lent: "dict[int, WriteChunk]" = field(default_factory=dict)
    """Those of which somebody has seen the memory, by their positions."""


class WriteChunk(Struct, eq=False):
    """One chunk to fill: `index` in the prompt, `offset` of its block; private until it is `committed`.

    The offset counts from the beginning of the cache's `memory`, or through a client, of the client's own segment; it
    is None where the block lies in neither.
    """

    index: int
    offset: int | None
    _layout: ModelLayout
    _rank: int
    _position: int  # among the chunks of its writer
    _life: Life
    committed: bool = False
    _block: Block | None = None  # once somebody sees it
    _views: tuple[memoryview | None, ...] = ()

    @property
    def views(self) -> tuple[memoryview | None, ...]:
        """By group, the bytes to fill; None where the rank lacks the group. Raises WriterClosedError."""
        if not self._views:
            self._views = self._new_views()
        return self._views

    def tensors(self) -> "tuple[torch.Tensor | None, ...]":
        """By group, a tensor over the bytes to fill, without a copy. Raises WriterClosedError.

        A tensor keeps its memory, also when the writer has left; what is written to it then reaches nobody.
        """
        return tensors.over(self._new_views(), self._layout.groups)

    def commit(self) -> None:
        """Publish the chunk as it is now; it must not be written to any more. Raises WriterClosedError.

        In a forked child it raises CacheClosedError: it would reach nobody.
        """
        if not self.committed:
            opened = self._life.opened  # once: another thread may close the writer
            if opened is None:
                raise WriterClosedError("the writer is closed")
            if self._life.process is not process():
                raise CacheClosedError("the writer was opened before a fork: open another one in the child")
            opened.commit(self._position)
            self.committed = True

    def _new_views(self) -> tuple[memoryview | None, ...]:
        opened, block = self._life.opened, self._block  # once: another thread may close the writer
        if opened is None:
            raise WriterClosedError("the writer is closed")
        if block is None:
            block = self._block = opened.lend(self._position)
            self._life.lent[self._position] = self
        whole = memoryview(block).cast("B")
        spans = self._layout.objects.spans[self._rank]
        return tuple(whole[span[0] : span[1]] if span is not None else None for span in spans)

    def let_go(self) -> None:
        """Keep its memory no longer for whoever has looked at it; who looks again sees it anew."""
        self._release_views()
        self._views, self._block = (), None
        self._life.lent.pop(self._position, None)

    def _release_views(self) -> None:
        """Make the use of a view an error from now on, where nobody has built on it."""
        for view in self._views:
            if view is not None:
                try:
                    view.release()
                except BufferError:
                    continue

    def __repr__(self) -> str:
        state = "committed" if self.committed else "closed" if self._life.opened is None else "open"
        return f"<WriteChunk {self.index}, {state}>"


class Opened(NamedTuple):
    """What opening a writer gives: chunks, why there may be fewer than are missing, and what acts on them.

    `lend` gives the memory of the chunk at a position among them, and `commit` publishes it. `close` discards what was
    not committed, and is called once, with a list to take from: the positions of those of these that were lent, each
    with its block. `settled` returns when all that was committed can be found.
    """

    chunks: tuple[WriteChunk, ...]
    life: Life
    shortfall: Shortfall | None
    lend: Callable[[int], Block]
    commit: Callable[[int], None]
    close: Callable[[list[tuple[int, Block]]], None]
    settled: Callable[[], Awaitable[None]]


class WriterState(Enum):
    """NEW -> OPEN -> CLOSED, by its owner, by the sweeper, by the server, or with the cache or connection."""

    NEW = "new"
    OPEN = "open"
    CLOSED = "closed"


_NEW, _OPEN, _CLOSED = WriterState  # each access to a member by its enum is a call, in Python 3.11


class Writer(Scoped[WriteChunk]):
    """A writer of one rank's chunks: `async with` it, or `await` it and `close()` later.

    While it is open it is a sequence of the chunks that L1 lacks of this rank, in order. If L1 cannot make room for
    all, there are fewer, and `shortfall` says why. Leaving discards what was not committed; leaving by `async with`
    also waits until what was committed can be found. Its views end with it, those of committed chunks as well.
    """

    def __init__(self, open_chunks: "Callable[[Writer], Awaitable[Opened]]"):
        self._shortfall: Shortfall | None = None
        self._open_chunks = open_chunks
        self._opened: Opened | None = None
        self._chunks: tuple[WriteChunk, ...] = ()
        self._entering = asyncio.Lock()
        self._state = _NEW

    @property
    def shortfall(self) -> Shortfall | None:
        """Why there are fewer chunks than L1 lacks; None where there are not."""
        self._check_entered()
        return self._shortfall

    def __len__(self) -> int:
        return len(self._chunks)

    @overload
    def __getitem__(self, position: int) -> WriteChunk: ...
    @overload
    def __getitem__(self, position: slice) -> tuple[WriteChunk, ...]: ...
    def __getitem__(self, position: int | slice) -> WriteChunk | tuple[WriteChunk, ...]:
        return self._chunks[position]

    @property
    def is_open(self) -> bool:
        """Whether chunks can be committed."""
        return self._state is _OPEN

    def close(self) -> None:
        """Discard what was not committed. May be called more than once."""
        self._close(release=True)

    def expire(self) -> None:
        """Close it from outside: who still writes to a chunk keeps its memory, and writes for nobody."""
        self._close(release=False)

    async def settled(self) -> None:
        """Return when what was committed can be found by whoever asks for it."""
        if self._opened is not None:
            await self._opened.settled()

    def _close(self, *, release: bool) -> None:
        self._state, before = _CLOSED, self._state
        if before is _OPEN:
            assert self._opened is not None
            life = self._opened.life
            life.opened = None
            lent, life.lent = life.lent, {}
            uncommitted: list[tuple[int, Block]] = []
            for position, chunk in lent.items():
                if release:
                    chunk._release_views()
                if not chunk.committed and chunk._block is not None:
                    uncommitted.append((position, chunk._block))
                chunk._views, chunk._block = (), None
            self._opened.close(uncommitted)

    def _check_entered(self) -> None:
        if self._state is _NEW:
            raise RuntimeError("the writer was not entered: `async with` or `await` it first")

    async def _enter(self) -> None:
        async with self._entering:
            if self._opened is not None:
                return
            self._opened = opened = await self._open_chunks(self)
            self._shortfall, self._chunks = opened.shortfall, opened.chunks
            if self._state is _CLOSED:  # from outside, before it was open
                opened.close([])
                return
            self._state = _OPEN
            opened.life.opened = opened

    def _leave(self) -> None:
        self.close()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        await self.settled()

    def __repr__(self) -> str:
        return f"<Writer, {self._state.value}, {len(self)} chunks>"
