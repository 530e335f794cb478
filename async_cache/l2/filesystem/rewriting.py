"""Our index files are written anew when most of what they say is of things that are gone, and in the end."""

import logging
from functools import partial
from itertools import islice

from async_cache.aio.slices import InTurns
from async_cache.l2.filesystem.catalog import Catalog
from async_cache.l2.filesystem.directory import Directory
from async_cache.l2.filesystem.following import Following
from async_cache.l2.filesystem.format import PAGE_BYTES, RECORD_BYTES
from async_cache.l2.filesystem.room import SLICE, Room
from async_cache.l2.filesystem.work import Work

logger = logging.getLogger(__name__)

ORDERED_OBJECTS = 100_000  # whose order is kept when the index is written anew: it is listed in one step
MOST_FILES = 16  # of ours, before they are folded into one
BODIES_A_BYTE = 125  # of index files may have, before those that are twice as long as need be are written anew
SPARE_BYTES = 65_536  # of index files that say what nobody needs, before they are written anew


class Rewriting:
    """The index files of one directory that are ours."""

    def __init__(self, directory: Directory, catalog: Catalog, work: Work, room: Room, following: Following):
        self._directory, self._catalog, self._work = directory, catalog, work
        self._room, self._following, self._threads = room, following, work.threads
        self._rewriting = False

    def begin_if_long(self) -> None:
        """Write them anew if they are much longer than they need to be."""
        if self._rewriting or self._work.over or not self._following.complete:
            return
        size_bytes = sum(journal.size_bytes for journal in self._directory.writers.ours())
        needed_bytes = RECORD_BYTES * self._catalog.index.objects  # at most
        beside_bytes = self._catalog.segments.pages * PAGE_BYTES // BODIES_A_BYTE
        most_bytes = min(2 * needed_bytes, max(beside_bytes, needed_bytes * 5 // 4)) + SPARE_BYTES
        is_long = size_bytes > max(SPARE_BYTES, most_bytes)
        if is_long or len(self._directory.writers.settled()) > MOST_FILES:
            self._rewriting = True
            self._work.spawn(self._rewrite())

    async def fold(self) -> None:
        """Have one index file instead of many, if many dead writers left theirs: each of them is open."""
        if len(self._directory.writers.settled()) > MOST_FILES and not self._rewriting:
            self._rewriting = True
            await self._rewrite()

    async def _rewrite(self) -> None:
        directory, catalog, threads = self._directory, self._catalog, self._threads
        try:
            if self._following.complete:
                await self._forget_drops()
            if new := catalog.origins.lacks(catalog.index.origins):  # of what was asked for since it was found
                await threads.run(threads.changes, catalog.origins.give, new)
            directory.promised_bytes = directory.rewriting_bytes(catalog.segments.count_owned())
            self._room.make(0)
            await threads.run(threads.changes, directory.rewrite)
            in_order = catalog.index.objects <= ORDERED_OBJECTS
            data = catalog.records(catalog.index.in_order() if in_order else catalog.index.chunks())
            while batch := list(islice(data, SLICE)):
                await threads.run(threads.changes, directory.append, b"".join(batch))
            await threads.run(threads.changes, directory.end_rewrite)
        except OSError as error:
            logger.warning("%s: the index cannot be written anew: %s", directory.name, error)
        finally:
            directory.promised_bytes = 0
            self._rewriting = False

    async def _forget_drops(self, *, beside_ours: bool = False) -> bool:
        """Forget the drops that no other index file needs any more; whether there are some that one needs.

        `beside_ours`: those that are ours do not count, since they are about to go.
        """
        existing = set(await self._threads.run(self._threads.changes, self._directory.writers.names))
        await self._following.look()  # so that what is told by those that exist is known
        if not self._directory.writers.are_known:
            return True
        existing.update(journal.name for journal in self._directory.writers.all())  # and by those that came meanwhile
        if beside_ours:
            existing -= {journal.name for journal in self._directory.writers.settled()}
        left = False
        async for segments in InTurns(self._catalog.segments.all(), SLICE):
            left |= self._catalog.segments.forget_drops(segments, existing)
        return left

    async def put_in_order(self) -> None:
        """Have the order of use survive, and leave nothing behind that says nothing."""
        directory, catalog, complete = self._directory, self._catalog, self._following.complete
        try:
            if complete and not all(journal.swept for journal in directory.writers.ours()):
                await self._following.sweep()
            owns = catalog.segments.count_owned() > 0
            if owns and catalog.index.objects <= ORDERED_OBJECTS and self._work.used and complete:
                await self._rewrite()
            if complete and not directory.writers.has_others:
                await self._threads.run(self._threads.changes, catalog.origins.forget, set(catalog.index.origins))
            tells = await self._forget_drops(beside_ours=not owns)
            keeps = tells or not complete or owns
            closing = partial(directory.close, emptied=catalog.segments.emptied(), keeps=keeps)
            await self._threads.run(self._threads.changes, closing)
        except OSError as error:
            logger.warning("%s: cannot be left in order: %s", directory.name, error)
