"""A writer of one rank's chunks: reserve -> commit | discard."""

import asyncio
import ctypes
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from async_cache.aio.sweeper import Expiry
from async_cache.errors import CacheClosedError, WriterClosedError
from async_cache.handles.scoped import Scoped
from async_cache.l1.entry import Reservation
from async_cache.l1.store import L1Store
from async_cache.memory import tensors
from async_cache.prompt.layout import Prompt
from async_cache.values import Shortfall
from async_cache.write.writeback import Writeback

if TYPE_CHECKING:
    import torch


class WriteChunk:
    """One chunk to fill: `index` in the prompt, `offset` in the arena. Private until it is `committed`."""

    __slots__ = ("_export", "_reservation", "_views", "_writer", "committed", "index", "offset")

    def __init__(self, writer: "Writer", index: int, reservation: Reservation):
        self.index = index
        self.offset = reservation.offset
        self._writer: Writer | None = writer
        self._reservation = reservation
        self.committed = False
        self._export: ctypes.Array[ctypes.c_ubyte] | None = None  # its room, once somebody sees it
        self._views: tuple[memoryview | None, ...] = ()

    @property
    def views(self) -> tuple[memoryview | None, ...]:
        """By group, the bytes to fill; None where the rank lacks the group."""
        if not self._views:
            self._views = self._export_views()
        return self._views

    def _open_writer(self) -> "Writer":
        if self._writer is None:
            raise WriterClosedError("the writer is closed")
        return self._writer

    def tensors(self) -> "tuple[torch.Tensor | None, ...]":
        """By group, a tensor over the bytes to fill, without a copy."""
        return tensors.over(self._export_views(), self._reservation.layout.groups)

    def commit(self) -> None:
        """Publish the chunk as it is now; it must not be written to any more. Raises WriterClosedError."""
        if not self.committed:
            self._open_writer()._commit(self)
            self.committed = True

    def _export_views(self) -> tuple[memoryview | None, ...]:
        """New views. A tensor keeps those that it was made over, which are not those of `views`."""
        writer = self._open_writer()
        writer._check_open()
        spans = self._reservation.layout.objects.spans[self._reservation.rank]
        if self._export is None:
            self._export = writer._l1.arena.export(self.offset, max(span[1] for span in spans if span is not None))
        whole = memoryview(self._export).cast("B")
        return tuple(whole[span[0] : span[1]] if span is not None else None for span in spans)

    def _discard(self) -> None:
        """Its owner has left: a view used after this is an error, where nobody has built on it."""
        for view in self._views:
            if view is not None:
                try:
                    view.release()
                except BufferError:
                    continue
        self._take_back()

    def _take_back(self) -> None:
        """Give back the room, or where somebody still sees it, quarantine it until the last view is gone."""
        l1, reservation = self._open_writer()._l1, self._reservation
        if self._export is None:
            l1.discard((reservation,))
            return
        weakref.finalize(self._export, l1.discard, (reservation,)).atexit = False
        self._views, self._export = (), None
        l1.quarantine(reservation)  # if that did not discard it already


class Writer(Scoped[WriteChunk]):
    """`async with` it, or `await` it and `close()` later: OPEN until closed by its owner, the sweeper or the cache.

    While open it is a sequence of the chunks that L1 lacks of this rank, in order. If L1 can not make room for all,
    there are fewer, and `shortfall` says why. Leaving discards what was not committed.
    """

    def __init__(
        self,
        l1: L1Store,
        writeback: Writeback,
        open_writers: "Expiry[Writer]",
        prompt: Prompt,
        rank: int,
        start_chunk: int,
    ):
        self.shortfall: Shortfall | None = None
        self.on_expired: Callable[[], None] | None = None
        """Called when it is closed from outside."""
        self._l1 = l1
        self._writeback = writeback
        self._open_writers = open_writers
        self._prompt, self._rank, self._start_chunk = prompt, rank, start_chunk
        self._opened = False

    def close(self) -> None:
        """Discard what was not committed. May be called more than once."""
        if self in self._open_writers:
            self._open_writers.discard(self)
            for chunk in self._uncommitted():
                chunk._discard()
            self._part()

    def expire(self) -> None:
        """Close it from outside."""
        self._open_writers.discard(self)
        for chunk in self._uncommitted():
            chunk._take_back()
        self._part()
        if self.on_expired is not None:
            self.on_expired()

    def _part(self) -> None:
        """A chunk and its writer know each other: thousands of them would wait for a collection of garbage."""
        for chunk in self._chunks:
            chunk._views, chunk._export = (), None
            chunk._writer = None

    def _uncommitted(self) -> Iterator[WriteChunk]:
        return (chunk for chunk in self._chunks if not chunk.committed)

    def _check_open(self) -> None:
        if self not in self._open_writers:
            raise WriterClosedError("the writer is closed")

    def _commit(self, chunk: WriteChunk) -> None:
        self._check_open()
        hashes = self._prompt.chunk_hashes
        mask = self._prompt.layout.objects.rank_masks[self._rank]
        before = hashes[chunk.index - 1] if chunk.index else None
        entry = self._l1.commit(chunk._reservation, mask, before)
        self._writeback.enqueue(entry)
        self._open_writers.add(self)

    async def _enter(self) -> None:
        if self._opened:
            return
        if not self._prompt.hashed:
            await asyncio.to_thread(self._prompt.hash)
            if self._opened:  # by another task meanwhile
                return
        if self._l1.closed:
            raise CacheClosedError("the cache was closed")
        self._opened = True
        layout, hashes = self._prompt.layout, self._prompt.chunk_hashes
        mask = layout.objects.rank_masks[self._rank]
        missing = [
            index
            for index in range(self._start_chunk, len(hashes) if mask else 0)
            if (entry := self._l1.index.get(hashes[index])) is None or mask & ~entry.present
        ]
        resident = [entry for entry in map(self._l1.index.get, hashes) if entry is not None]
        self._l1.lease(resident)  # the room for a tail must not be taken from its own head
        made = self._l1.reserve(layout, [(hashes[index], self._rank) for index in missing])
        self._l1.release(reversed(resident))
        for entry in resident:
            if entry.dropped:  # whoever stores a prompt again wants it in L2
                self._writeback.enqueue(entry)
        if len(made) < len(missing):
            self.shortfall = Shortfall.MEMORY
        self._chunks = tuple(WriteChunk(self, i, reservation) for i, reservation in zip(missing, made, strict=False))
        self._open_writers.add(self)

    def _leave(self) -> None:
        self.close()
