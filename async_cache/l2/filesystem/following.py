"""What others record in the directory: their index files are followed as they grow, and the dead are answered for.

Decided in the loop.
"""

import asyncio
import errno
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from async_cache.aio.slices import InTurns
from async_cache.l2.faults import Faults
from async_cache.l2.filesystem.catalog import Catalog
from async_cache.l2.filesystem.directory import Directory, Moved
from async_cache.l2.filesystem.format import Record
from async_cache.l2.filesystem.journal import BEAT_SECONDS, Journal
from async_cache.l2.filesystem.room import SLICE, Room
from async_cache.l2.filesystem.sweep import sweep
from async_cache.l2.filesystem.work import Work

T = TypeVar("T")

RECOVERY_SECONDS = 0.25  # for which a lookup of what is not known waits for recovery
SEEN_SECONDS = 0.1  # for which nobody is taken to have come to a directory in which we were alone
ADOPT_SECONDS = 5.0


class Look:
    """A look at what others have recorded, for all who asked for it before it began.

    `lists`: it finds index files that are new, however long that takes.
    """

    def __init__(self, *, lists: bool) -> None:
        self.lists, self.begun = lists, False
        self.task: asyncio.Task[None]

    def step(self, news: Iterator[T]) -> T | None:
        """The next piece of news, in a thread."""
        self.begun = True
        return next(news, None)


class Following:
    """What is known of one directory is kept up with what is recorded there.

    `recovered` is set when recovery has ended, and `complete` is true if all that there was is known since then.
    """

    def __init__(self, directory: Directory, catalog: Catalog, work: Work, room: Room, faults: Faults):
        self._directory, self._catalog, self._work, self._room, self._faults = directory, catalog, work, room, faults
        self._threads, self._origins = work.threads, directory.origins
        self._loop = asyncio.get_running_loop()
        self.recovered = asyncio.Event()
        self.complete = False
        self.adopts = True  # what dead writers left, from time to time
        self._look: Look | None = None
        self._looked_at = -SEEN_SECONDS
        self._adopted_at = 0.0

    def knows_all(self) -> bool:
        """Whether what is not known is not there: nobody else is here, or was a moment ago, or they have no news."""
        writers = self._directory.writers
        return (
            self.recovered.is_set()
            and self._loop.time() - self._looked_at < SEEN_SECONDS
            and (not writers.has_others or (self._has_learned() and not writers.has_news()))
        )

    def _has_learned(self) -> bool:
        """Whether all that was read is known: what a look has read is no news any more."""
        return self._look is None or self._look.task.done()

    async def recovery(self, timeout_seconds: float | None = RECOVERY_SECONDS) -> None:
        """Wait until recovery has ended, or the time is over."""
        if not self.recovered.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await self.recovered.wait()

    async def catch_up(self) -> None:
        """Hear of what others stored, and wait a little for recovery. Raises OSError, and Moved."""
        await self.recovery()
        await self.look(lists=False)

    async def look(self, *, lists: bool = True) -> None:
        """Hear of all that others have recorded by now. Raises OSError, and Moved.

        Where it takes long to list the directory, it hears only of those whom it knew a while ago, unless it `lists`.
        """
        if self._work.over:
            raise Moved(self._directory.path)
        look = self._look
        # It may have missed what one that has not begun will hear.
        if look is None or look.begun or look.task.done() or (lists and not look.lists):
            self._look = Look(lists=lists)
            self._look.task = self._work.spawn(self._run(self._look, after=look))
            look = self._look
        await asyncio.wait([look.task])
        if look.task.cancelled():
            raise OSError(errno.ESHUTDOWN, "it was closed")
        look.task.result()

    async def _run(self, look: Look, *, after: Look | None) -> None:
        if after is not None and not after.task.done():
            await asyncio.wait([after.task])  # what it has read and not told yet is no news
        began, complete = self._loop.time(), self.complete
        adopt = complete and self.adopts and began - self._adopted_at > ADOPT_SECONDS
        if adopt:
            self._adopted_at = began
        news = self._directory.look(adopt=adopt, lists=look.lists)
        while (step := await self._threads.run(self._threads.searches, look.step, news)) is not None:
            await self._learn(*step, latest=True)
        for name in self._directory.writers.take_vanished():
            await self._forget(name)
        self._looked_at = began
        if complete:
            await self._take_over()
            await self._room.choose(self._catalog.doubles())

    async def _forget(self, name: str) -> None:
        """An index file is there no more: what only it has told of was given up, as a younger one has said."""
        places: set[tuple[int, int]] = set()
        async for segments in InTurns(self._catalog.segments.all(), SLICE):
            places |= self._catalog.segments.told_only_by(segments, name)
        if places:
            await self._room.lose(lambda segment, page: (segment.here, page) in places)

    async def _take_over(self) -> None:
        """Answer for what index files tell that were adopted: they are read once more, as ours."""
        ours = self._directory.writers.ours()
        adopted = [journal for journal in ours if journal.is_readable and not journal.known]
        for journal in adopted:
            await self.learn_all(journal)
        self.answer_for_all()
        if adopted:
            self._work.spawn(self.sweep())

    async def learn_all(self, journal: Journal) -> None:
        """Take over all that an index file says, the latest first, as far as it can be read."""
        steps = journal.backward()
        try:
            while (records := await self._threads.run(self._threads.scans, next, steps, None)) is not None:
                await self._learn(journal, records, latest=False)
        except OSError as error:
            journal.is_readable = False
            self._directory.writers.cannot(journal.name, "read", error)

    async def _learn(self, journal: Journal, records: Sequence[Record], *, latest: bool) -> None:
        """Take over what an index file says, in slices."""
        if new := {record[6] for record in records}.difference(self._origins.known):
            await self._threads.run(self._threads.scans, self._origins.learn, new)
        async for some in InTurns(records, SLICE):
            self._faults.over(self._catalog.learn(journal, some, latest=latest))
            self._room.make(0)

    async def sweep(self) -> None:
        """Have cleared away what dead writers left beside what they recorded. Raises OSError."""
        await sweep(self._directory, self._catalog, self._threads, self.look, is_complete=self.complete)

    def answer_for_all(self) -> None:
        """What is recorded in the index files that became ours is known."""
        for journal in self._directory.writers.ours():
            if journal.is_readable:
                journal.known = True
                self._catalog.segments.writers.add(journal.writer)

    def is_old(self) -> None:
        """Have the next miss look, whatever was seen just now."""
        self._looked_at = self._loop.time() - SEEN_SECONDS

    async def beat(self) -> None:
        """Say again and again that we live, where a lock cannot."""
        while self._directory.writers.beats:
            await asyncio.sleep(BEAT_SECONDS)
            with suppress(OSError):  # the next one may work
                await self._threads.run(self._threads.scans, self._directory.writers.beat)
