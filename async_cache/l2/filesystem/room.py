"""The room that a directory takes: what is evicted or given up, and when its bytes are gone. Decided in the loop."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from async_cache.aio.slices import InTurns
from async_cache.l2.filesystem.catalog import Catalog
from async_cache.l2.filesystem.clearing import Hole
from async_cache.l2.filesystem.directory import Directory, Moved
from async_cache.l2.filesystem.format import PAGE_BYTES
from async_cache.l2.filesystem.segments import Segment
from async_cache.l2.filesystem.work import Work
from async_cache.prompt.keys import ObjectKey
from async_cache.values import Removal

logger = logging.getLogger(__name__)

SLICE = 256  # what the loop does with many objects, it does for so many at a time: a millisecond


class Room:
    """The bound of one directory, and what leaves it."""

    def __init__(self, directory: Directory, catalog: Catalog, work: Work, capacity_bytes: int | None):
        self._directory, self._catalog, self._work = directory, catalog, work
        self._threads = work.threads
        self._capacity_bytes = capacity_bytes
        self._clearing: asyncio.Future[None] | None = None

    def make(self, size_bytes: int) -> bool:
        """Evict until so many bytes fit; False, and nothing is evicted, if the pins do not allow it."""
        if self._capacity_bytes is None or self._work.over:
            return True
        used = self._catalog.segments.pages * PAGE_BYTES + self._directory.room_bytes
        holes = self._catalog.evict(used + size_bytes - self._capacity_bytes)
        if holes:
            self.clear(holes)
        return holes is not None

    def make_on_disk(self, sizes: Sequence[int]) -> bool:
        """Evict as much as was not taken by a full disk, if that can be; or as the first object needs."""
        for count in (len(sizes), 1):
            holes = self._catalog.evict(sum(map(self._catalog.index.room_bytes, sizes[:count])) + PAGE_BYTES)
            if holes:
                self.clear(holes)
                return True
        return False

    def clear(self, holes: list[Hole]) -> "asyncio.Future[None] | None":
        """Record what was given up, and give its room back, after the changes that were submitted before."""
        emptied = self._catalog.segments.emptied()
        if self._work.over or not (holes or emptied):
            return None
        self._clearing = self._threads.run(self._threads.changes, self._directory.drop, holes, emptied)
        self._clearing.add_done_callback(self._cleared)
        return self._clearing

    def _cleared(self, future: "asyncio.Future[None]") -> None:
        if future is self._clearing:
            self._clearing = None
        if not future.cancelled() and (error := future.exception()):
            logger.warning("%s: cannot remove: %s", self._directory.name, error)

    async def cleared(self) -> None:
        """Wait until the room of all that was given up is there."""
        if self._clearing is not None:
            await self._threads.wait(self._clearing)  # the last one of a thread that does them in order

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        """Take objects out, and wait until their bytes are gone; how many there were. Raises OSError, and Moved."""
        if self._work.over:
            raise Moved(self._directory.path)
        deleted = sum(self._catalog.index.present(keys))
        clearing = self.clear(self._catalog.give_up(keys, Removal.DELETED))
        await self._threads.recorded()  # also what was given up before
        if clearing is not None:
            clearing.result()
        return deleted

    async def give_up(self, lost: Sequence[tuple[ObjectKey, tuple[int, bytes]]], removal: Removal) -> None:
        """Take those objects out that still lie at these places, in slices."""
        async for batch in InTurns(lost, SLICE):
            if self._work.over:
                return
            now = self._catalog.index.placed([key for key, _ in batch])
            still = [key for (key, found), at in zip(batch, now, strict=True) if at == found]
            self.clear(self._catalog.give_up(still, removal))

    async def choose(self, keys: Sequence[ObjectKey]) -> None:
        """Give up what others have, too, in slices."""
        async for some in InTurns(keys, SLICE):
            self.clear(self._catalog.choose(some))

    async def set_aside(self, segment: Segment) -> None:
        """Take all objects of a segment out, in slices, and give the file another name: it can not be opened."""
        self._catalog.segments.set_aside(segment)
        with suppress(OSError):  # it keeps its name, then
            await self._threads.run(self._threads.changes, self._directory.clearing.set_aside, segment.name)
        await self.lose(lambda each, _: each is segment)

    async def lose(self, is_lost: Callable[[Segment, int], bool]) -> None:
        """Take out the objects that are there no more, given their segment and page, in slices."""
        async for chunks in InTurns(self._catalog.index.chunks(), SLICE):
            self._catalog.lose(
                [ObjectKey(chunk.chunk_hash, *which) for chunk in chunks for which in chunk.shape.sizes], is_lost
            )
        self._catalog.lose(self._catalog.doubles(), is_lost)
