"""A directory with the log of one store: what it is, who writes in it, and what is recorded. It blocks: for threads.

Three threads use it, each for its own: one changes (`commit`, `drop`, `rewrite`), one searches (`look`), one recovers.
"""

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from secrets import randbits
from threading import Event, Lock

from msgspec import Struct

from async_cache.l2.filesystem.bodies import Bodies, Body
from async_cache.l2.filesystem.files import FULL, NO_FILE, Files, OpenFile, open_file
from async_cache.l2.filesystem.format import (
    PAGE_BYTES,
    RECORD_BYTES,
    Record,
    is_unfinished,
    pages,
    parse_index,
    unfinished_name,
)
from async_cache.l2.filesystem.journal import GROWTH_BYTES, Journal, is_left
from async_cache.l2.filesystem.marker import check_marker

logger = logging.getLogger(__name__)

_TICK_NS = 50_000_000  # in which several changes of a directory may have the same time


class Moved(Exception):
    """The path of a directory means another one by now, or none."""


class Hole(Struct, eq=False):
    """Pages of a segment that are to be cleared, and the records that say so."""

    segment: str
    page: int
    end: int
    record: bytes


class Commit(Struct, eq=False):
    """Records of bodies that were written to these segments, and why they could not be appended."""

    segments: set[str]
    records: bytes
    fault: OSError | None = None


class Directory:
    """One directory, opened once: `has_moved` says whether its path means another one by now.

    Raises Foreign or OSError.
    """

    def __init__(self, path: str, *, fsync: bool, direct: bool):
        self.path, self._fsync = path, fsync
        self._file = OpenFile(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        self.fd = self._file.fd
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        self._listing = Lock()  # a directory has one place to list from
        check_marker(self.fd, self.names(), fsync=fsync)
        self.files = Files(self.fd)
        self.bodies = Bodies(self.files, direct=direct)
        while (journal := Journal.create(self.fd, randbits(64), 0)) is None:
            pass
        self.journal, self.writer = journal, journal.writer
        self.journal.probe(self.bodies.puncher)
        self.journals: dict[str, Journal] = {self.journal.name: self.journal}
        self._listed_at = -1
        self._checked_at = -1
        self._unremoved: set[str] = set()
        self.promised_bytes = 0  # of room for an index file that is written anew
        self._fresh: list[Journal] = []  # an index file that is being written anew
        self.waiting: deque[Commit] = deque()
        self._named: set[str] = set()  # segments whose names survive a power failure
        self.doubtful: set[str] = set()  # segments of which a sync has failed: nothing more is recorded of them
        self.find_journals(adopt=True)
        if fsync:
            os.fsync(self.fd)

    # What it is.

    def names(self) -> list[str]:
        """What is in the directory."""
        with self._listing:
            return os.listdir(self.fd)

    def has_moved(self) -> bool:
        """Whether the path is that of another directory by now, or of none, or our index file was removed from it."""
        try:
            status = os.fstat(self.fd)
            if not os.path.samestat(os.stat(self.path), status):
                return True
        except FileNotFoundError:
            return True
        while status.st_mtime_ns != self._checked_at:
            journal = self.journal
            try:
                os.stat(journal.name, dir_fd=self.fd)
            except FileNotFoundError:
                if journal is self.journal:  # else it was written anew
                    return True
            else:
                self._checked_at = status.st_mtime_ns
        return False

    # Who writes in it.

    def find_journals(self, *, adopt: bool) -> None:
        """Index files that are new here; those of dead writers are ours from now on, if they are to be adopted."""
        changed_ns = os.fstat(self.fd).st_mtime_ns
        is_settled = time.time_ns() - changed_ns > _TICK_NS  # else the next change may have the same time
        self._listed_at = changed_ns if is_settled else -1
        now_ns = self.journal.touch() if adopt else 0
        names = self._latest(self.names(), remove=adopt, now_ns=now_ns)
        for name in sorted(names - self.journals.keys()):
            if (parsed := parse_index(name)) is not None:
                try:
                    journal = Journal.open(self.fd, name, *parsed)
                    if journal is None or (adopt and not journal.adopt(self.fd, now_ns)):
                        continue
                except OSError as error:
                    logger.warning("%s: the index %s cannot be opened: %s", self.path, name, error)
                    continue
                if not adopt:
                    journal.size_bytes = 0  # all of it is news
                self.journals = {**self.journals, journal.name: journal}
        self.journals = {name: journal for name, journal in self.journals.items() if name in names or journal.owned}

    def _latest(self, names: list[str], *, remove: bool, now_ns: int) -> set[str]:
        """The index files that count: the youngest of each writer. Others, and unfinished ones, are rests."""
        youngest: dict[int, tuple[int, str]] = {}
        rests = [name for name in names if is_unfinished(name)]
        for name in names:
            if (parsed := parse_index(name)) is not None:
                writer, generation = parsed
                older = youngest.get(writer)
                if older is None or generation > older[0]:
                    youngest[writer] = generation, name
                    rests += [older[1]] if older is not None else []
                else:
                    rests.append(name)
        for name in rests if remove else ():
            with suppress(OSError):
                file = open_file(self.fd, name)
                if is_left(file.fd, now_ns):
                    os.unlink(name, dir_fd=self.fd)
        return {name for _, name in youngest.values()}

    def look(self, *, adopt: bool) -> Iterator[tuple[Journal, list[Record]]]:
        """What others have recorded since it was looked for last, in steps; what dead ones left is ours on demand."""
        if self.has_moved():
            raise Moved(self.path)
        if adopt:
            now_ns = self.journal.touch()
            for journal in self.journals.values():
                if not journal.owned:
                    journal.adopt(self.fd, now_ns)
            self.journals = {journal.name: journal for journal in self.journals.values()}
        if os.fstat(self.fd).st_mtime_ns != self._listed_at:
            gone = [journal for journal in self.journals.values() if not journal.owned]
            self.find_journals(adopt=False)
            for journal in gone:
                if journal.name not in self.journals:
                    yield from self._news(journal)  # its last words
        for journal in list(self.journals.values()):
            if not (journal.owned and journal.known):
                yield from self._news(journal)

    def _news(self, journal: Journal) -> Iterator[tuple[Journal, list[Record]]]:
        try:
            for found in journal.news():
                yield journal, found
        except OSError as error:
            if error.errno not in (errno.ESTALE, errno.ENOENT):
                raise
            self.journals = {name: each for name, each in self.journals.items() if each is not journal}
            self._listed_at = -1  # it has gone, over NFS; if it is there still, it is found again

    @property
    def beats(self) -> bool:
        """Whether our index files are to be touched again and again, by `beat`: the file system has no locks."""
        return self.journal.beats

    def beat(self) -> None:
        """Say that we live. Raises OSError."""
        for journal in self.journals.values():
            if journal.owned:
                journal.touch()

    @property
    def has_others(self) -> bool:
        """Whether others use the directory, as far as is known."""
        return any(not journal.owned for journal in self.journals.values())

    @property
    def makes_holes(self) -> bool:
        """Whether single bodies give their room back; where not, files do when they are removed."""
        return self.bodies.puncher.makes_holes

    @property
    def room_bytes(self) -> int:
        """The room on the disk of all that is no body: index files, with a page to spare, and the marker."""
        fresh_bytes = sum(journal.allocated_bytes for journal in self._fresh)
        sizes = [max(fresh_bytes, self.promised_bytes), *(each.allocated_bytes for each in self.journals.values())]
        return PAGE_BYTES * (1 + sum(map(pages, sizes)))

    # What is recorded.

    def write(self, bodies: Sequence[Body], stop: Event) -> None:
        """Write bodies, see `Bodies`. Raises Moved where they would not be found."""
        if self.has_moved():
            raise Moved(self.path)
        self.journal.reserve(len(bodies))
        self.bodies.write(bodies, stop)

    def commit(self, commit: Commit) -> None:
        """Record that bodies are there, together with all others that wait for it. Raises OSError: then none is."""
        batch = []
        with suppress(IndexError):
            while True:
                batch.append(self.waiting.popleft())
        if batch:  # else it was done together with another one
            try:
                self._commit({segment for each in batch for segment in each.segments}, batch)
            except OSError as error:
                for each in batch:
                    each.fault = error.with_traceback(None)
        if commit.fault is not None:
            raise commit.fault

    def _commit(self, segments: set[str], batch: list[Commit]) -> None:
        if self._fsync:
            for segment in segments:
                self._sync(segment)
            if segments - self._named:
                os.fsync(self.fd)
                self._named |= segments
        self.journal.append(b"".join([each.records for each in batch]))
        if self._fsync:
            self.journal.sync()

    def _sync(self, segment: str) -> None:
        """Have a segment survive a power failure. Where that failed once, no later try tells anything: the kernel takes
        for written what it could not write."""
        if segment in self.doubtful:
            raise OSError(errno.EIO, "a sync of its segment failed", segment)
        try:
            self.bodies.sync(segment)
        except OSError:
            self.doubtful.add(segment)
            raise

    def drop(self, holes: Sequence[Hole], emptied: Collection[str]) -> None:
        """Record that bodies are there no more, clear them, and remove segments that are empty. Raises OSError."""
        data = b"".join([hole.record for hole in holes])
        try:
            self.journal.append(data)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._clear(holes, emptied)  # which makes room for the record
            self.journal.append(data)
        self._clear(holes, emptied)

    def _clear(self, holes: Sequence[Hole], emptied: Collection[str]) -> None:
        fault = self._remove_all(emptied)
        left = sorted(
            [(hole.segment, hole.page, hole.end) for hole in holes if hole.segment not in emptied], reverse=True
        )
        while left:
            segment, begin, end = left.pop()
            while left and left[-1][0] == segment and left[-1][1] == end:
                end = left.pop()[2]
            try:
                self.bodies.clear(segment, begin, end)
            except OSError as error:
                fault = error
        if fault is not None:
            raise fault

    def _remove_all(self, names: Collection[str]) -> OSError | None:
        """Remove segments, and those that could not be removed before; why not, if not all were."""
        fault = None
        self._unremoved |= set(names)
        for name in list(self._unremoved):
            try:
                self.remove(name)
                self._unremoved.discard(name)
            except OSError as error:
                fault = error
        return fault

    def remove(self, name: str) -> None:
        """Remove a file, and its room even where others have it open."""
        try:
            file = open_file(self.fd, name)
            os.truncate(file.fd, 0)
            os.unlink(name, dir_fd=self.fd)
        except OSError as error:
            if error.errno not in NO_FILE:  # what is no file is not ours
                raise
        self.files.forget(name)

    @staticmethod
    def rewriting_bytes(count: int) -> int:
        """The room that a new index file of so many objects takes beside the old ones."""
        return count * RECORD_BYTES + 3 * GROWTH_BYTES

    def rewrite(self) -> None:
        """Begin an index file that is to take the place of all of ours: `append` fills it."""
        generation = self.journal.generation + 1
        for unfinished in self._fresh:  # it was given up
            with suppress(FileNotFoundError):
                os.unlink(unfinished_name(self.writer, unfinished.generation), dir_fd=self.fd)
        while (journal := Journal.create(self.fd, self.writer, generation, finished=False)) is None:
            generation += 1
        self._fresh, self._begun_at = [journal], self.journal.size_bytes
        self._retiring = [each for each in self.journals.values() if each.owned and each.known and each.swept]

    def append(self, records: bytes) -> None:
        """Record in the new index file what is there."""
        (fresh,) = self._fresh
        fresh.append(records)

    def end_rewrite(self) -> None:
        """Put the new index file in the place of the others, with what was recorded since it was begun."""
        (fresh,) = self._fresh
        fresh.append(self.journal.behind(self._begun_at))
        fresh.sync()
        temporary = unfinished_name(fresh.writer, fresh.generation)
        os.rename(temporary, fresh.name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        self.journal = fresh
        self.journals = {**self.journals, fresh.name: fresh}
        self._fresh = []
        if self._fsync:
            os.fsync(self.fd)
        for journal in self._retiring:
            if journal.writer == self.writer or not self._unremoved:  # whose writer an index must tell to be ours
                self._remove_journal(journal)

    def _remove_journal(self, journal: Journal) -> None:
        with suppress(FileNotFoundError):
            os.unlink(journal.name, dir_fd=self.fd)
        self.journals = {name: each for name, each in self.journals.items() if each is not journal}
        journal.close()

    def close(self, *, emptied: Collection[str], keeps: bool) -> None:
        """Remove segments that are empty, and the index files of ours if there is nothing that they tell."""
        keeps |= self._remove_all(emptied) is not None
        ours = [each for each in self.journals.values() if each.owned and each.known and each.swept]
        for journal in sorted(ours, key=lambda each: each is self.journal):  # which has what the others must be told
            if not keeps or journal.size_bytes <= RECORD_BYTES:
                self._remove_journal(journal)
            else:
                journal.cut()

    def release(self) -> None:
        """Let go of the files, and of the locks with them: others may answer for what is ours. No thread works here."""
        for journal in self.journals.values():
            journal.close()
        self.journals = {}
        self._fresh = []
        del self.journal, self.files, self.bodies, self._file
