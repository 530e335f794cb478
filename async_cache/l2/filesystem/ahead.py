"""What was found is announced to the kernel while its load waits for its turn, so that a disk has begun by then."""

import asyncio
from collections.abc import Iterable, Sequence

from async_cache.aio.slices import InTurns
from async_cache.l2.chunks import placed_of
from async_cache.l2.filesystem.catalog import Catalog
from async_cache.l2.filesystem.directory import Directory
from async_cache.l2.filesystem.room import SLICE
from async_cache.l2.filesystem.runs import Wanted, runs
from async_cache.l2.filesystem.work import Work
from async_cache.prompt.keys import ObjectKey

AHEAD_SECONDS = 0.01  # for which nothing is announced: most loads begin at once
AHEAD_BYTES = 256 * 2**20  # that are announced and not loaded yet
PROBES = 4  # chunks among those that wait, by which it is found out whether the page cache has them


class Ahead:
    """The chunks of one directory that were found, and whose loads have not begun.

    What is not pinned any more, since the promise was given up, is not announced.
    """

    def __init__(self, directory: Directory, catalog: Catalog, work: Work):
        self._directory, self._catalog, self._work = directory, catalog, work
        self._waiting: dict[bytes, None] = {}
        self._announced: dict[bytes, int] = {}  # how many bytes each has
        self._timer: asyncio.TimerHandle | None = None

    def found(self, chunk_hashes: Iterable[bytes]) -> None:
        """A lookup has pinned these."""
        if not self._directory.runs.goes_through_the_cache:
            return
        self._waiting.update(dict.fromkeys(chunk_hashes))
        if self._timer is None and self._waiting:
            self._timer = asyncio.get_running_loop().call_later(AHEAD_SECONDS, self._begin)

    def taken(self, keys: Sequence[ObjectKey]) -> None:
        """The load of these begins."""
        if self._waiting or self._announced:
            for key in keys:
                self._waiting.pop(key.chunk_hash, None)
                self._announced.pop(key.chunk_hash, None)

    def _begin(self) -> None:
        self._timer = None
        if self._waiting and not self._work.over:
            self._work.spawn(self._announce())

    async def _announce(self) -> None:
        """Announce as many as may be, those first that were found first; none where the page cache has them."""
        index, pins = self._catalog.index, self._catalog.index.pins
        threads, reads = self._work.threads, self._directory.runs
        some = self._wanted(list(self._waiting)[:: max(1, len(self._waiting) // PROBES)])
        if some and not await threads.run(threads.scans, reads.is_cold, some):
            self._waiting.clear()
            return
        self._announced = {each: size_bytes for each, size_bytes in self._announced.items() if each in pins}
        room_bytes = AHEAD_BYTES - sum(self._announced.values())
        wanted: list[Wanted] = []
        async for chunk_hashes in InTurns(list(self._waiting), SLICE):
            for chunk_hash in chunk_hashes if room_bytes > 0 else ():
                if chunk_hash not in self._waiting:
                    continue  # its load has begun meanwhile
                del self._waiting[chunk_hash]
                chunk = index.get(chunk_hash)
                if chunk is not None and chunk_hash in pins:
                    self._announced[chunk_hash] = chunk.shape.size_bytes
                    room_bytes -= chunk.shape.size_bytes
                    wanted += self._wanted([chunk_hash])
        if wanted:
            await threads.run(threads.scans, reads.announce, list(runs(wanted)))
        self.found(())

    def _wanted(self, chunk_hashes: Iterable[bytes]) -> list[Wanted]:
        """Where the objects of these chunks lie, of those that are there."""
        wanted: list[Wanted] = []
        for chunk in map(self._catalog.index.get, chunk_hashes):
            for _, size_bytes, place in placed_of(chunk) if chunk is not None else ():
                segment, page, checksum = self._catalog.segments.at(place)
                wanted.append(Wanted(segment.name, page, len(wanted), size_bytes, checksum))
        return wanted
