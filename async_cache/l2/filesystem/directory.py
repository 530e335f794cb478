"""A directory with the log of one store: what it is, and what is recorded in it. It blocks: for threads.

Each kind of thread has its own: some write bodies (`write`), one changes all else (`commit`, `drop`, `rewrite`), one
searches (`look`), and one recovers.
"""

import errno
import os
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event

from msgspec import Struct

from async_cache.l2.backend import Reader, Sealer
from async_cache.l2.filesystem import notes, origins
from async_cache.l2.filesystem.bodies import Bodies, Body
from async_cache.l2.filesystem.clearing import Clearing, Hole
from async_cache.l2.filesystem.files import FULL, Files, OpenFile, names_in
from async_cache.l2.filesystem.format import (
    PAGE_BYTES,
    RECORD_BYTES,
    Record,
    pages,
    parse_begun,
    unfinished_name,
)
from async_cache.l2.filesystem.journal import GROWTH_BYTES, Journal
from async_cache.l2.filesystem.marker import check_marker
from async_cache.l2.filesystem.notes import Notes
from async_cache.l2.filesystem.origins import Origins
from async_cache.l2.filesystem.runs import Runs
from async_cache.l2.filesystem.transfers import Transfers
from async_cache.l2.filesystem.writers import Writers

CHECK_SECONDS = 5.0  # after which it is not believed that nothing was removed, whatever the time of the directory says
_AWAY = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENOTCONN, errno.ENODEV}


class Moved(OSError):
    """The path of a directory means another one by now, or none."""

    def __init__(self, path: str):
        super().__init__(errno.ENOENT, "it was removed, or another one has its place", path)


class Commit(Struct, eq=False):
    """The records of bodies that were written, by segment, and of each segment why they are not recorded, if so."""

    records: dict[str, bytes]
    faults: dict[str, Exception] = {}

    def __post_init__(self) -> None:
        self.faults = dict.fromkeys(self.records, OSError(errno.EIO, "it was not recorded"))


class Directory:
    """One directory, opened once: `has_moved` says whether its path means another one by now.

    Raises Foreign or OSError.
    """

    def __init__(self, path: str, *, name: str, fsync: bool, direct: bool, seal: Sealer, read: Reader):
        self.path, self.name, self._fsync = path, name, fsync
        self._file = OpenFile(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        self.fd = self._file.fd
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            code = errno.EROFS if os.fstatvfs(self.fd).f_flag & os.ST_RDONLY else errno.EACCES
            raise PermissionError(code, os.strerror(code), path)
        check_marker(self.fd, path, os.listdir(self.fd), fsync=fsync)
        self.files = Files(self.fd)
        transfers = Transfers(self.files, direct=direct)
        self.bodies, self.runs = Bodies(self.files, transfers), Runs(self.files, transfers)
        journal = Journal.create(self.fd)
        journal.probe(self.bodies.puncher)
        self.writer = journal.writer
        self.origins, self.notes = Origins(self.fd, self.writer, seal, read), Notes(self.fd, self.writer)
        self.origins.learn_all()
        self.notes.count()
        self.writers = Writers(self.fd, name, journal)
        self.clearing = Clearing(self.fd, self.files, self.bodies)
        self._untold = bytearray()  # records of what is there no more
        self._is_stale = False  # our index file is not what it was when it was opened
        self._checked: tuple[int, float] = -1, 0.0  # the time that the directory had, and when it was looked at
        self.promised_bytes = 0  # of room for an index file that is written anew
        self._fresh: list[Journal] = []  # an index file that is being written anew
        self.waiting: deque[Commit] = deque()
        self._named: set[str] = set()  # files whose names survive a power failure
        self.doubtful: set[str] = set()  # segments of which a sync has failed: nothing more is recorded of them
        if fsync:
            os.fsync(self.fd)

    @property
    def journal(self) -> Journal:
        """The index file that we write."""
        return self.writers.journal

    def has_moved(self) -> bool:
        """Whether the path is that of another directory by now, or of none, or our index file was removed from it.

        Or can be written no more, since its handle is stale.
        """
        if self._is_stale:
            return True
        try:
            status = os.fstat(self.fd)
            if not os.path.samestat(os.stat(self.path), status):
                return True
            while status.st_mtime_ns != self._checked[0] or time.monotonic() > self._checked[1] + CHECK_SECONDS:
                journal = self.journal
                try:
                    os.stat(journal.name, dir_fd=self.fd)
                except FileNotFoundError:
                    if journal is self.journal:  # else it was written anew
                        return True
                else:
                    self._checked = status.st_mtime_ns, time.monotonic()
        except OSError as error:
            if error.errno not in _AWAY:
                raise
            return True
        return False

    def look(self, *, adopt: bool, lists: bool) -> Iterator[tuple[Journal, list[Record]]]:
        """What others have recorded since it was looked for last, in steps, see `Writers`. Raises Moved."""
        if self.has_moved():
            raise Moved(self.path)
        if adopt:
            self.notes.count()
        yield from self.writers.look(adopt=adopt, lists=lists)

    @property
    def makes_holes(self) -> bool:
        """Whether single bodies give their room back; where not, files do when they are removed."""
        return self.bodies.puncher.makes_holes

    @property
    def room_bytes(self) -> int:
        """The room on the disk of all that is no body of ours.

        That is the marker, index files with a page to spare, what tells of origins, notes, and what another version
        stores.
        """
        fresh_bytes = sum(journal.allocated_bytes for journal in self._fresh)
        sizes = [max(fresh_bytes, self.promised_bytes), *(each.allocated_bytes for each in self.writers.all())]
        small_files = len(self.origins.known)  # and the marker, since 0 has no file
        others_bytes = self.notes.room_bytes + self.clearing.left_bytes + self.writers.former_bytes
        return PAGE_BYTES * (small_files + sum(map(pages, sizes))) + others_bytes

    def keep_note(self, name: str, note: bytes | None) -> None:
        """Have a note, see `Notes`. Raises OSError, and Moved where it would not be found."""
        if self.has_moved():
            raise Moved(self.path)
        self.notes.write(name, note)

    def begun(self) -> list[tuple[str, int]]:
        """The small files that were begun, as far as can be said, and the writer of each."""
        begun = []
        for folder in (origins.DIRECTORY, notes.DIRECTORY):
            with suppress(OSError):
                begun += [
                    (f"{folder}/{name}", writer)
                    for name in names_in(self.fd, folder)
                    if (writer := parse_begun(name)) is not None
                ]
        return begun

    # What is recorded.

    def write(self, bodies: Sequence[Body], stop: Event) -> None:
        """Write bodies, see `Bodies`. Raises Moved where they would not be found."""
        if self.has_moved():
            raise Moved(self.path)
        with self._watched():
            self.journal.reserve(len(bodies))
        self.bodies.write(bodies, stop)

    def commit(self) -> None:
        """Record the bodies of all commits that wait, each of which has the faults of what is not recorded then.

        Nothing waits where they were done together with another one.
        """
        batch = []
        with suppress(IndexError):
            while True:
                batch.append(self.waiting.popleft())
        segments = {segment for each in batch for segment in each.records}
        faults: dict[str, Exception] = {}
        try:
            if self._fsync:
                faults |= self._sync(segments)
            recorded = [data for each in batch for segment, data in each.records.items() if segment not in faults]
            if recorded:
                with self._watched():
                    self.journal.append(b"".join(recorded))
                    if self._fsync:
                        self.journal.sync()
        except Exception as error:  # it may be recorded, and is not told
            faults = dict.fromkeys(segments, error.with_traceback(None)) | faults
        for each in batch:
            each.faults = {segment: faults[segment] for segment in each.records if segment in faults}

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Have the directory be opened anew where our index file cannot be written for good."""
        try:
            yield
        except OSError as error:
            self._is_stale |= error.errno in _AWAY
            raise

    def _sync(self, segments: Iterable[str]) -> dict[str, Exception]:
        """Have segments survive a power failure; why some may not. Raises OSError where none does.

        Where the sync of one failed once, no later try tells anything: the kernel takes for written what it could not
        write.
        """
        faults: dict[str, Exception] = {}
        for segment in segments:
            try:
                if segment in self.doubtful:
                    raise OSError(errno.EIO, "a sync of its segment failed", segment)
                self.bodies.sync(segment)
            except OSError as error:
                self.doubtful.add(segment)
                faults[segment] = error.with_traceback(None)
        names = {self.journal.name, *segments}
        if unnamed := names - faults.keys() - self._named:
            try:
                os.fsync(self.fd)
            except OSError as error:
                if self.journal.name in unnamed:
                    raise
                faults |= dict.fromkeys(unnamed, error.with_traceback(None))
            else:
                self._named |= unnamed
        return faults

    def drop(self, holes: Sequence[Hole], emptied: Collection[str]) -> None:
        """Record that bodies are there no more, clear them, and remove segments that are empty.

        Raises OSError: what could not be done is done another time.
        """
        self._untold += b"".join([hole.record for hole in holes])
        try:
            self._tell()
        except OSError as error:
            if error.errno not in FULL:
                self.clearing.put_off(holes, emptied)
                raise
            self.clearing.clear(holes, emptied)  # which makes room for the record
            self._tell()
        else:
            self.clearing.clear(holes, emptied)

    def _tell(self) -> None:
        """Record what is there no more, and could not be recorded before."""
        with self._watched():
            self.journal.append(bytes(self._untold))
        self._untold.clear()

    @staticmethod
    def rewriting_bytes(count: int) -> int:
        """The room that a new index file of so many objects takes beside the old ones."""
        return count * RECORD_BYTES + 3 * GROWTH_BYTES

    def rewrite(self) -> None:
        """Begin an index file that is to take the place of all of ours: `append` fills it."""
        generation = self.journal.generation + 1
        for unfinished in self._fresh:  # it was given up
            with suppress(OSError):
                os.unlink(unfinished_name(self.writer, unfinished.generation), dir_fd=self.fd)
        journal = Journal.create_unfinished(self.fd, self.writer, generation)
        self._fresh, self._begun_at = [journal], self.journal.size_bytes
        self._retiring = self.writers.settled()

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
        self.writers.add(fresh)  # first: else it is taken for that of another
        try:
            os.rename(temporary, fresh.name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError:
            self.writers.drop(fresh)
            raise
        self.writers.journal = fresh
        self._fresh = []
        if self._fsync:
            os.fsync(self.fd)
        for journal in self._retiring:
            # What could not be removed must have a writer whom an index tells to be ours.
            if journal.writer == self.writer or not self.clearing.has_failed:
                self._remove_journal(journal)

    def _remove_journal(self, journal: Journal) -> None:
        with suppress(FileNotFoundError):
            os.unlink(journal.name, dir_fd=self.fd)
        self.writers.drop(journal)
        journal.close()

    def close(self, *, emptied: Collection[str], keeps: bool) -> None:
        """Remove segments that are empty, and the index files of ours if there is nothing that they tell."""
        with suppress(OSError):
            self._tell()
        self.clearing.try_again()
        with suppress(OSError):
            self.clearing.clear((), emptied)
        keeps |= self.clearing.has_failed
        ours_last = sorted(self.writers.settled(), key=lambda each: each is self.journal)
        for journal in ours_last:  # it has what the others must be told
            if not keeps or journal.size_bytes <= RECORD_BYTES:
                self._remove_journal(journal)
            else:
                journal.cut()

    def release(self) -> None:
        """Let go of the files, and of the locks with them: others may answer for what is ours. No thread works here."""
        self.writers.release()
        self._fresh = []
        del self.files, self.bodies, self.runs, self.clearing, self._file
