"""Index files: our own, which we append to, and those of others, which we follow. All of it blocks: it is for threads.

Who lives holds a lock on its index file. An index file that can be locked is that of a dead writer: whoever locks it
answers for it from then on, and for its segments. Where a file system has no locks, who lives touches its index file
instead, again and again, and a file that nobody touches any more is that of a dead writer: whoever renames it first
answers for it.
"""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from secrets import randbits
from threading import Lock

from async_cache.l2.filesystem.files import OpenFile, Puncher, allocate, lock, open_file
from async_cache.l2.filesystem.format import (
    RECORD_BYTES,
    Record,
    header,
    header_beats,
    index_name,
    is_whole,
    records,
    unfinished_name,
)

logger = logging.getLogger(__name__)

STEP_RECORDS = 1024  # in one step of the thread: two milliseconds for which the loop may have to wait
GROWTH_BYTES = 16_384  # what an index file grows by on the disk
BEAT_SECONDS = 10.0  # after which who cannot lock its index file touches it
DEAD_SECONDS = 120.0  # for which it was not touched
_STEP_BYTES = STEP_RECORDS * RECORD_BYTES
_TRIES = 3  # to lock a file that nobody else has made


class Journal:
    """An index file. What it says before `begun_at` is read backward, at recovery; what is behind it is followed."""

    def __init__(self, file: OpenFile, name: str, writer: int, generation: int, *, owned: bool):
        self.name, self.writer, self.generation, self.owned = name, writer, generation, owned
        self.known = False  # whether all that a dead writer recorded is known: only then may it be written elsewhere
        self.beats = False  # instead of holding a lock
        self.is_readable = True  # else it is left as it is, and nobody answers for what it tells
        self.swept = owned  # whether what its writer left without a record was cleared away: only then may it go
        self.is_cut = owned  # there is nothing behind its last record
        self._file: OpenFile | None = file
        self._growing = Lock()  # several threads have room made, and one appends
        self.measure()

    @property
    def _open(self) -> OpenFile:
        """The file, which stays open as long as what is returned is held. Raises OSError when it was closed."""
        file = self._file
        if file is None:
            raise OSError(errno.EBADF, "it was closed", self.name)
        return file

    def measure(self) -> None:
        """Take what it has by now for what it said at the beginning."""
        status = os.fstat(self._open.fd)
        self.size_bytes = self.begun_at = _whole(status.st_size)
        self.allocated_bytes = self.size_bytes
        self.changed_ns = status.st_mtime_ns

    @classmethod
    def create(cls, directory: int) -> "Journal":
        """A new index file, of a new writer. Raises OSError.

        Another process may take it for that of a dead writer before it is locked: then the next one has another name.
        """
        for _ in range(_TRIES):
            writer = randbits(64)
            if (journal := cls._create(directory, index_name(writer, 0), writer, 0)) is not None:
                return journal
        raise OSError(errno.ENOLCK, "the lock of a new index file is refused")

    @classmethod
    def create_unfinished(cls, directory: int, writer: int, generation: int) -> "Journal":
        """An index file that is to take the place of an older one of ours. Raises OSError."""
        for number in range(generation, generation + _TRIES):
            if (journal := cls._create(directory, unfinished_name(writer, number), writer, number)) is not None:
                return journal
        raise OSError(errno.ENOLCK, "the lock of a new index file is refused")

    @classmethod
    def _create(cls, directory: int, name: str, writer: int, generation: int) -> "Journal | None":
        file = open_file(directory, name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        journal = None
        try:
            journal = cls._begin(directory, file, name, writer, generation)
        finally:
            if journal is None:
                with suppress(OSError):
                    os.unlink(name, dir_fd=directory)
        return journal

    @classmethod
    def _begin(cls, directory: int, file: OpenFile, name: str, writer: int, generation: int) -> "Journal | None":
        """Lock a file that was just made, and begin it; None if it was taken away meanwhile."""
        locked = lock(file.fd)
        if locked is None:
            logger.warning("the file system has no locks: a writer is taken for dead after %.0f s", DEAD_SECONDS)
        elif not locked or not _is_there(directory, name, file):
            return None
        journal = cls(file, index_name(writer, generation), writer, generation, owned=True)
        journal.beats = locked is None
        journal.append(header(writer, beats=journal.beats))
        journal.begun_at = journal.size_bytes
        journal.known = True
        journal.reserve(1)
        return journal

    @classmethod
    def open(cls, directory: int, name: str, writer: int, generation: int) -> "Journal | None":
        """One that is there, of another writer. None if it has gone."""
        try:
            return cls(open_file(directory, name), name, writer, generation, owned=False)
        except FileNotFoundError:
            return None

    def adopt(self, directory: int, now_ns: int) -> bool:
        """Have it be ours if its writer is dead. False if it has gone: whoever had it has removed it. Raises OSError.

        `now_ns` is a time of the file system.
        """
        if not is_left(self._open.fd, now_ns):
            return True
        if not _is_there(directory, self.name, self._open):
            return False
        if header_beats(self._read(0, RECORD_BYTES)):
            self.touch()  # such that nobody else takes it
            name = index_name(self.writer, self.generation + 1)
            try:
                os.rename(self.name, name, src_dir_fd=directory, dst_dir_fd=directory)
            except FileNotFoundError:
                return False
            self.name, self.generation, self.beats = name, self.generation + 1, True
        self.owned, self.known = True, False
        self.begun_at = self.size_bytes
        return True

    def touch(self) -> int:
        """Say that its writer lives; the time of the file system, in ns."""
        file = self._open
        with suppress(OSError):
            os.utime(file.fd)
        return os.fstat(file.fd).st_mtime_ns

    def close(self) -> None:
        """Let go of the file, and of the lock with it. It is not used any more."""
        file, self._file = self._file, None
        if file is not None and self.owned and self.beats:
            with suppress(OSError):
                os.utime(file.fd, (0, 0))  # nobody needs to wait

    # Our own.

    def append(self, data: bytes) -> None:
        """Write records behind the others, all or none. Raises OSError."""
        written = 0
        with self._growing:
            try:
                while written < len(data):
                    written += os.pwrite(self._open.fd, data[written:], self.size_bytes + written)
            except BaseException:
                if written:
                    os.ftruncate(self._open.fd, self.size_bytes)
                raise
            self.size_bytes += len(data)
            self.allocated_bytes = max(self.allocated_bytes, self.size_bytes)

    def behind(self, offset: int) -> bytes:
        """All records from an offset on. Raises OSError."""
        return self._read(offset, self.size_bytes - offset)

    def reserve(self, count: int) -> None:
        """Have room on the disk for so many records, and for as many drops, which make room. Raises OSError."""
        with self._growing:
            if growth := self.growth_bytes(count):
                allocate(self._open.fd, self.allocated_bytes, growth)
                self.allocated_bytes += growth

    def growth_bytes(self, count: int) -> int:
        """What it needs more of the disk for so many records, and as many drops."""
        end = self.size_bytes + 2 * count * RECORD_BYTES
        return max(0, -(-end // GROWTH_BYTES) * GROWTH_BYTES - self.allocated_bytes)

    def probe(self, puncher: Puncher) -> None:
        """Have it found out whether files can have holes here."""
        puncher.probe(self._open.fd)

    def sync(self) -> None:
        """Have what was appended survive a power failure."""
        os.fdatasync(self._open.fd)

    def cut(self) -> None:
        """Cut off the rest of a record that was not written whole, and room that is not needed any more."""
        with self._growing:
            os.ftruncate(self._open.fd, self.size_bytes)
            self.allocated_bytes = self.size_bytes
            self.is_cut = True

    # Any.

    def backward(self) -> Iterator[list[Record]]:
        """What it said when it was opened, in steps, the latest first. Raises OSError."""
        end = self.begun_at
        while end > RECORD_BYTES:
            begin = max(RECORD_BYTES, end - _STEP_BYTES)
            found = records(self._read(begin, end - begin))
            found.reverse()
            yield found
            end = begin

    def news(self) -> Iterator[list[Record]]:
        """What was appended since, in steps. A record that is not whole yet is read again. Raises OSError."""
        status = os.fstat(self._open.fd)
        size_bytes = _whole(status.st_size)
        self.allocated_bytes = max(size_bytes, status.st_blocks * 512)
        while (begin := max(self.size_bytes, RECORD_BYTES)) < size_bytes:
            block = self._read(begin, min(_STEP_BYTES, size_bytes - begin))
            end = len(block)
            while end and not is_whole(block[end - RECORD_BYTES : end]):
                end -= RECORD_BYTES
            if not end:
                return
            self.size_bytes = begin + end
            yield records(block[:end])

    def has_news(self) -> bool:
        """Whether something was appended that `news` has not told. Raises OSError."""
        return _whole(os.fstat(self._open.fd).st_size) > max(self.size_bytes, RECORD_BYTES)

    def _read(self, begin: int, size_bytes: int) -> bytes:
        block = os.pread(self._open.fd, size_bytes, begin)
        while len(block) < size_bytes:
            more = os.pread(self._open.fd, size_bytes - len(block), begin + len(block))
            if not more:
                break
            block += more
        return block


def is_left(fd: int, now_ns: int) -> bool:
    """Whether the writer of an index file is dead; it is locked then, if that can be. Raises OSError."""
    locked = lock(fd)
    if locked is False:
        return False
    if header_beats(os.pread(fd, RECORD_BYTES, 0)):
        return os.fstat(fd).st_mtime_ns < now_ns - DEAD_SECONDS * 1e9
    return locked is True


def _is_there(directory: int, name: str, file: OpenFile) -> bool:
    """Whether a name still means the file that was opened by it."""
    try:
        return os.path.samestat(os.fstat(file.fd), os.stat(name, dir_fd=directory))
    except FileNotFoundError:
        return False


def _whole(size_bytes: int) -> int:
    return size_bytes - size_bytes % RECORD_BYTES
