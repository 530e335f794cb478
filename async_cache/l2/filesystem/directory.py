"""A directory of records (see `l2.record`), one file for each. All of it blocks: it is for threads.

A writer fills a file `tmp.<random>` and renames it, so that an object appears whole or not at all, whoever else writes
the same one.
"""

import errno
import fcntl
import logging
import os
import stat
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from mmap import PAGESIZE, mmap
from secrets import token_hex
from threading import Event
from typing import TypeVar

from xxhash import xxh3_64, xxh3_64_intdigest

from async_cache.l2.backend import LoadOutcome
from async_cache.l2.record import TRAILER_BYTES, body_bytes, file_name, is_trailer, parse_name, write_trailer
from async_cache.prompt.keys import ObjectKey

T = TypeVar("T")

logger = logging.getLogger(__name__)

BLOCK_BYTES = 512 * 1024  # hashed while it is still in the processor's cache
SCAN_ENTRIES = 256  # in one step of the thread: two milliseconds for which the loop may have to wait

_TEMPORARY = "tmp."
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC
_READ = _SAFE | os.O_RDONLY | os.O_NONBLOCK  # a pipe under an object's name must not block
_CREATE = _SAFE | os.O_WRONLY | os.O_CREAT | os.O_EXCL
_LOADED = LoadOutcome.LOADED  # by name it would cost a tenth of a microsecond, with the interpreter's lock
_NO_FILE = {errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ESPIPE, errno.ENXIO}  # nothing, or a link, a directory ...
_MORE_TRIES = 2
_QUICK_SECONDS = 0.1  # a drive tries a bad sector for longer
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # of which no name can be the reason

Scratch = bytearray | mmap
Buffer = memoryview | Scratch
Found = tuple[int, bytes, int, int, int]
"""Modification time in ns, chunk hash, rank, group, bytes of the body: flat, and so of no interest to the collector."""


class RecordFault(OSError):
    """A fault that is of one record, and says nothing of the disk: its name cannot be taken or removed."""


class RecordDirectory:
    """The records of one directory, which is opened once: what becomes of its path later does not matter.

    Where a call takes `stop`, setting it ends the call between two blocks: what it returns is of no use then. Each
    method raises OSError.
    """

    def __init__(self, path: str, *, fsync: bool, direct: bool):
        self._fsync, self._direct = fsync, direct
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._fd)  # at once where the one who opened it was cancelled
        self._close.atexit = False
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            self.close()
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    def close(self) -> None:
        """Close the directory; idempotent."""
        self._close()

    # Loads.

    def load(
        self,
        todo: Iterator[tuple[int, ObjectKey, memoryview]],
        outcomes: list[LoadOutcome | OSError | None],
        stop: Event,
    ) -> None:
        """Fill bodies until nothing is left to do, and put into `outcomes`, at the place of each, how it went.

        Several threads may share the iterator: one that is fast, or was woken first, does more of the work.
        """
        tail = self._tail(spare_bytes=1)
        for place, key, body in todo:
            if stop.is_set():
                break
            try:
                at_once = len(body) <= BLOCK_BYTES and not self._direct and self._load_at_once(key, body, tail)
                outcomes[place] = _LOADED if at_once else self._load(key, body, tail, stop)
            except OSError as error:
                outcomes[place] = self._load_again(error, partial(self._load, key, body, tail, stop), stop)

    def load_sized(
        self,
        todo: Iterator[tuple[int, ObjectKey, memoryview]],
        outcomes: list[int | LoadOutcome | OSError | None],
        stop: Event,
    ) -> None:
        """Fill buffers that may be longer than the bodies, as `load` does; what was loaded has its size as outcome."""
        tail = self._tail(spare_bytes=1)
        for place, key, buffer in todo:
            if stop.is_set():
                break
            load = partial(self._load_sized, key, buffer, tail, stop)
            try:
                outcomes[place] = load()
            except OSError as error:
                outcomes[place] = self._load_again(error, load, stop)

    def _load_again(self, fault: OSError, load: Callable[[], T], stop: Event) -> T | LoadOutcome | OSError:
        """Load again what could not be read: a fault may be of the moment, as a stale handle is, but is quick then."""
        latest = time.monotonic() + _QUICK_SECONDS
        for _ in range(_MORE_TRIES):
            if fault.errno in _NO_FILE or isinstance(fault, RecordFault) or stop.is_set() or time.monotonic() > latest:
                break
            try:
                return load()
            except OSError as again:
                fault = again
        return LoadOutcome.GONE if fault.errno in _NO_FILE else fault.with_traceback(None)  # whose frames hold the body

    def _load_at_once(self, key: ObjectKey, body: memoryview, tail: Scratch) -> bool:
        """Whether a small object was loaded by three system calls and nothing between them; if not, `_load` says why.

        Each call gives the interpreter's lock away: what runs before it is got back is waited for.
        """
        fd = os.open(file_name(key), _READ, dir_fd=self._fd)
        try:
            count = os.preadv(fd, (body, tail), 0)
        finally:
            _close(fd)
        return count == len(body) + TRAILER_BYTES and is_trailer(tail, key, len(body), xxh3_64_intdigest(body))

    def _load(self, key: ObjectKey, body: memoryview, tail: Scratch, stop: Event) -> LoadOutcome:
        fd = os.open(file_name(key), _READ, dir_fd=self._fd)
        try:
            return self._read(fd, key, body, tail, stop)
        finally:
            _close(fd)

    def _load_sized(self, key: ObjectKey, buffer: memoryview, tail: Scratch, stop: Event) -> int | LoadOutcome:
        fd = os.open(file_name(key), _READ, dir_fd=self._fd)
        try:
            size_bytes = _body_bytes(os.fstat(fd)) or 0
            outcome = self._read(fd, key, buffer[:size_bytes], tail, stop)
            return size_bytes if outcome is _LOADED else outcome
        finally:
            _close(fd)

    def _read(self, fd: int, key: ObjectKey, body: memoryview, tail: Scratch, stop: Event) -> LoadOutcome:
        if self._direct:
            self._use_direct(fd, body)
        if read_record(fd, key, body, tail, stop):
            return _LOADED
        self._remove_corrupt(fd, file_name(key))
        return LoadOutcome.CORRUPT

    def _remove_corrupt(self, fd: int, name: str) -> None:
        """Remove this file, and not what another writer has put there meanwhile. Raises RecordFault if it stays."""
        try:
            if os.path.samestat(os.fstat(fd), self._stat(name)):
                os.unlink(name, dir_fd=self._fd)
        except FileNotFoundError:
            return
        except OSError as error:
            raise RecordFault(error.errno, f"cannot remove what is corrupt: {error.strerror}", name) from None

    # Stores.

    def store(
        self, keys: Sequence[ObjectKey], bodies: Sequence[memoryview], replaced: Collection[ObjectKey], stop: Event
    ) -> list[OSError | None]:
        """Write the records that are not there yet, or are to be replaced; for each key None, or why it failed.

        There are fewer answers than keys if the call was stopped.
        """
        errors: list[OSError | None] = []
        written_ns = time.time_ns()
        for key, body in zip(keys, bodies, strict=True):
            if stop.is_set():
                break
            try:
                if key in replaced or not self._has(key, len(body)):
                    self._store(key, body, written_ns - len(errors), stop)
                errors.append(None)
            except OSError as error:
                errors.append(error.with_traceback(None))
        if self._fsync:
            try:
                os.fsync(self._fd)
            except OSError as error:
                return [error] * len(errors)
        return errors

    def _store(self, key: ObjectKey, body: memoryview, written_ns: int, stop: Event) -> None:
        name = file_name(key)
        temporary, fd = self._create_temporary()
        try:
            try:
                if self._direct:
                    self._use_direct(fd, body)
                write_record(fd, key, body, self._tail(spare_bytes=0), stop)
                with suppress(OSError):  # the order of the tail and the head of a prefix, which recovery goes by
                    os.utime(fd, ns=(written_ns, written_ns))
                if self._fsync:
                    os.fsync(fd)
                self._rename(temporary, name)
            finally:
                os.close(fd)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=self._fd)
            raise

    def _has(self, key: ObjectKey, size_bytes: int) -> bool:
        try:
            return self.size(key) == size_bytes
        except OSError:  # what cannot be looked at is replaced
            return False

    def _rename(self, temporary: str, name: str) -> None:
        try:
            os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise
            raise RecordFault(error.errno, error.strerror, name) from None

    def _create_temporary(self) -> tuple[str, int]:
        """A new file, locked as long as it is open: the kernel ends the lock with its process.

        That tells the file of a dead writer from one in use, without anything to hold and clear away per process.
        """
        while True:
            name = _TEMPORARY + token_hex(8)
            fd = os.open(name, _CREATE, 0o600, dir_fd=self._fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError:
                os.close(fd)
                os.unlink(name, dir_fd=self._fd)
                raise
            if os.fstat(fd).st_nlink:
                return name, fd
            os.close(fd)  # a scan took it for a leftover, in the instant before it was locked

    # Names.

    def size(self, key: ObjectKey) -> int | None:
        """The bytes of an object's body, by the size of its file; None if there is none."""
        try:
            status = self._stat(file_name(key))
        except FileNotFoundError:
            return None
        return _body_bytes(status)

    def sizes(self, keys: Sequence[ObjectKey]) -> list[int | OSError | None]:
        """The `size` of each object, or why it cannot be told."""
        return [self._size_or_fault(key) for key in keys]

    def _size_or_fault(self, key: ObjectKey) -> int | OSError | None:
        try:
            return self.size(key)
        except OSError as error:
            return error.with_traceback(None)

    def unlink(self, keys: Sequence[ObjectKey]) -> int:
        """Remove the objects that are there, and count them. A fault is raised after all were tried."""
        removed, fault = 0, None
        for key in keys:
            try:
                os.unlink(file_name(key), dir_fd=self._fd)
                removed += 1
            except OSError as error:
                if error.errno not in _NO_FILE:
                    fault = error
        if fault is not None:
            raise fault
        return removed

    def scan(self) -> Iterator[list[Found]]:
        """Iterate over all records, in lists of up to SCAN_ENTRIES with the newest last.

        It also removes what dead writers left behind.
        """
        with os.scandir(self._fd) as entries:
            while batch := list(islice(entries, SCAN_ENTRIES)):
                if found := sorted(filter(None, map(self._recover, batch))):
                    yield found

    def _recover(self, entry: "os.DirEntry[str]") -> Found | None:
        key = parse_name(entry.name)
        try:
            if key is not None:
                status = entry.stat(follow_symlinks=False)
                size_bytes = _body_bytes(status)
                return None if size_bytes is None else (status.st_mtime_ns, *key, size_bytes)
            if entry.name.startswith(_TEMPORARY) and entry.is_file(follow_symlinks=False):
                self._remove_leftover(entry.name)
        except OSError as error:
            if error.errno not in _NO_FILE:
                logger.warning("cannot recover %s: %s", entry.name, error)
        return None

    def _remove_leftover(self, name: str) -> None:
        """Remove a temporary file unless its writer lives, see `_create_temporary`."""
        fd = os.open(name, _READ, dir_fd=self._fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name, dir_fd=self._fd)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)

    def _stat(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self._fd, follow_symlinks=False)

    # O_DIRECT.

    def _tail(self, spare_bytes: int) -> Scratch:
        """Room for a trailer: an aligned page, or no more than is asked for."""
        return mmap(-1, PAGESIZE) if self._direct else bytearray(TRAILER_BYTES + spare_bytes)

    def _use_direct(self, fd: int, body: memoryview) -> None:
        if len(body) % PAGESIZE:
            return
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            logger.warning("the file system has no O_DIRECT: going through the page cache")
            self._direct = False


def _body_bytes(status: os.stat_result) -> int | None:
    """The bytes of the body in a file of this status; None if it cannot be a record."""
    return body_bytes(status.st_size) if stat.S_ISREG(status.st_mode) else None


def _close(fd: int) -> None:
    """Close a file that was read: what was read is not the worse for a fault in this."""
    with suppress(OSError):
        os.close(fd)


def read_record(fd: int, key: ObjectKey, body: memoryview, tail: Scratch, stop: Event) -> bool:
    """Fill `body`, and say whether the file is the record of `key`, of this length, and intact.

    `tail` is longer than a trailer, so that a file that is too long is noticed.
    """
    size = len(body)
    digest = xxh3_64()
    for begin in range(0, max(size, 1), BLOCK_BYTES):
        if stop.is_set():
            raise InterruptedError
        block = body[begin : begin + BLOCK_BYTES]
        last = begin + BLOCK_BYTES >= size
        wanted = len(block) + last * TRAILER_BYTES
        if _transfer(os.preadv, fd, [block, tail] if last else [block], begin, wanted) != wanted:
            return False
        digest.update(block)
    return is_trailer(tail, key, size, digest.intdigest())


def write_record(fd: int, key: ObjectKey, body: memoryview, tail: Scratch, stop: Event) -> None:
    """Write `body` and its trailer into an empty file.

    `tail` is room for the trailer. If it is longer, it is written whole, as O_DIRECT demands, and cut off again.
    """
    size = len(body)
    digest = xxh3_64()
    for begin in range(0, max(size, 1), BLOCK_BYTES):
        if stop.is_set():
            raise InterruptedError
        block = body[begin : begin + BLOCK_BYTES]
        digest.update(block)
        parts: list[Buffer] = [block]
        if begin + BLOCK_BYTES >= size:
            write_trailer(tail, key, size, digest.intdigest())
            parts.append(tail)
        wanted = sum(map(len, parts))
        if _transfer(os.pwritev, fd, parts, begin, wanted) != wanted:
            raise OSError(errno.EIO, "the file takes no more bytes")
    if len(tail) > TRAILER_BYTES:
        os.ftruncate(fd, size + TRAILER_BYTES)


def _transfer(
    call: Callable[[int, list[Buffer], int], int], fd: int, parts: list[Buffer], offset: int, wanted: int
) -> int:
    """Do a preadv or pwritev until `wanted` bytes are through, or no more come; the number of bytes."""
    done = 0
    while True:
        try:
            count = call(fd, parts, offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL or not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise
            fcntl.fcntl(fd, fcntl.F_SETFL, 0)  # memory or a rest that is not aligned: on through the page cache
            continue
        done += count
        if done >= wanted or not count:
            return done
        while count >= len(parts[0]):
            count -= len(parts.pop(0))
        parts[0] = memoryview(parts[0])[count:]
