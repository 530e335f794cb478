"""The log of one open directory: the parts that work on it, from its opening on."""

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from async_cache.l2.faults import Faults
from async_cache.l2.filesystem.ahead import Ahead
from async_cache.l2.filesystem.catalog import Catalog
from async_cache.l2.filesystem.directory import Directory
from async_cache.l2.filesystem.following import Following
from async_cache.l2.filesystem.loading import Loading
from async_cache.l2.filesystem.recovery import recover
from async_cache.l2.filesystem.rewriting import Rewriting
from async_cache.l2.filesystem.room import Room
from async_cache.l2.filesystem.storing import Storing
from async_cache.l2.filesystem.work import Threads, Work
from async_cache.l2.index import Index
from async_cache.prompt.keys import ObjectKey


class Settings(NamedTuple):
    """What a backend was asked for."""

    capacity_bytes: int | None
    segment_bytes: int
    readers: int


class Log:
    """One directory, opened, and what is known of it. Recovery begins at once.

    The index outlives it, with its pins and its policy: it is empty when a log begins.
    """

    def __init__(self, directory: Directory, index: Index, threads: Threads, settings: Settings):
        self.directory, self._faults = directory, Faults()
        self._threads = threads
        self.work = Work(threads)
        self.catalog = Catalog(index, directory.origins)
        self.catalog.segments.writers.add(directory.writer)
        self.room = Room(directory, self.catalog, self.work, settings.capacity_bytes)
        self.following = Following(directory, self.catalog, self.work, self.room, self._faults)
        self.rewriting = Rewriting(directory, self.catalog, self.work, self.room, self.following)
        self.ahead = Ahead(directory, self.catalog, self.work)
        self.loading = Loading(
            directory,
            self.catalog,
            threads,
            self.ahead,
            self.room,
            self.following,
            self._faults,
            readers=settings.readers,
        )
        self.storing = Storing(
            directory,
            self.catalog,
            self.work,
            self.room,
            self.following,
            self.rewriting,
            self._faults,
            segment_bytes=settings.segment_bytes,
        )
        self.work.spawn(recover(directory, self.following, self.rewriting, threads), f"{directory.name} recovery")
        if directory.writers.beats:
            self.work.spawn(self.following.beat(), f"{directory.name} heartbeat")

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        """Take objects out, also those that are being written; how many there were. Raises BackendError, and Moved."""
        self.work.used = True
        writing = self.storing.deleting(keys)
        await self.following.recovery(None)  # what it knows would come back
        await self._threads.wait(*writing)
        if not self.following.knows_all():
            with suppress(OSError):
                await self.following.look()  # what others have deleted is not counted
        self._faults.over(keys)
        return await self.room.delete(keys)

    async def put_in_order(self) -> None:
        """Leave the directory as a later start finds it best."""
        self.following.adopts = False
        await self.work.end_tasks()
        await self.storing.end()
        await self.rewriting.put_in_order()

    async def abandon(self) -> None:
        """Change nothing any more: another directory has the path, or this one is closed."""
        self.work.over = True
        await self.work.end_tasks()

    def check_integrity(self) -> None:
        """Assert that the totals are those of the objects, and of what is being written."""
        if self.work.over:
            self.catalog.index.check_integrity()
        else:
            self.catalog.check_integrity(self.storing.objects)
