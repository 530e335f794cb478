"""Open files of a directory, and what the library of Python lacks: to punch holes, and locks that every system has.

All of it blocks: it is for threads.
"""

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections import OrderedDict
from contextlib import suppress
from threading import Lock

from async_cache.aio.forks import keep_from_children
from async_cache.l2.filesystem.format import PAGE_BYTES

OPEN_FILES = 128  # of segments, at a time
FULL = {errno.ENOSPC, errno.EDQUOT}
NO_FILE = {errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ESPIPE, errno.ENXIO}  # nothing, or a link, a directory ...

_OF_THE_MOMENT = {errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOMEM, errno.EINTR, *FULL}
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe under the name of a file must not block
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_LACKING = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.ENODEV, errno.EPERM}
_ZEROS = bytes(2**20)
_AT_HAND = {0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x01021994}  # ext2 to 4, xfs, btrfs, f2fs, tmpfs

_libc = ctypes.CDLL(None, use_errno=True)
_fstatfs = _libc.fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_char_p)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class NoDirect(OSError):
    """The file system has no O_DIRECT."""


class NotOpened(OSError):
    """A file is there, and cannot be opened."""


class OpenFile:
    """A descriptor, closed when the last one who uses it lets go: no thread meets a number that means another file."""

    __slots__ = ("__weakref__", "fd")

    def __init__(self, fd: int):
        self.fd = fd
        keep_from_children(self)  # the lock of an index file, above all: its writer would not be taken for dead

    def descriptors(self) -> list[int]:
        """Its descriptor, as long as it is open."""
        return [self.fd]

    def __del__(self) -> None:
        fd, self.fd = self.fd, -1
        with suppress(OSError):  # what was read is not the worse for it; what was written was told by `fsync`
            os.close(fd)


def open_file(directory: int, name: str, flags: int = os.O_RDWR) -> OpenFile:
    """Open a file of a directory. Raises OSError, also for what is no file."""
    try:
        file = OpenFile(os.open(name, flags | _SAFE, 0o600, dir_fd=directory))
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES) or flags & (os.O_CREAT | os.O_ACCMODE) != os.O_RDWR:
            raise
        flags &= ~os.O_ACCMODE  # it can be read at least
        file = OpenFile(os.open(name, flags | _SAFE, dir_fd=directory))
    if not stat.S_ISREG(os.fstat(file.fd).st_mode):
        raise FileNotFoundError(errno.ENOENT, "no regular file", name)
    return file


def names_in(directory: int, folder: str) -> list[str]:
    """The names in a directory of a directory; none where that is not there. Raises OSError."""
    try:
        fd = os.open(folder, os.O_NOFOLLOW | os.O_CLOEXEC | os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
    except FileNotFoundError:
        return []
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


class Files:
    """The files of a directory that were used last, open."""

    def __init__(self, directory: int):
        self._directory = directory
        self._files: OrderedDict[tuple[str, bool], OpenFile] = OrderedDict()
        self._lock = Lock()

    def get(self, name: str, *, direct: bool = False, create: bool = False) -> OpenFile:
        """A file, which stays open as long as what is returned is held. Raises OSError, NotOpened and NoDirect."""
        with self._lock:
            file = self._files.get((name, direct))
            if file is not None:
                self._files.move_to_end((name, direct))
                return file
        try:
            file = open_file(self._directory, name, os.O_RDWR | create * os.O_CREAT)
        except OSError as error:
            if error.errno in NO_FILE | _OF_THE_MOMENT:
                raise
            raise NotOpened(error.errno, error.strerror, name) from None
        if direct:
            try:
                fcntl.fcntl(file.fd, fcntl.F_SETFL, os.O_DIRECT)
            except OSError as error:
                raise NoDirect(error.errno, error.strerror, name) from None
        with self._lock:
            self._files[name, direct] = file
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def forget(self, name: str) -> None:
        """Open a file anew when it is needed next; whoever uses it goes on with it."""
        with self._lock:
            for opened in [opened for opened in self._files if opened[0] == name]:
                del self._files[opened]


class Puncher:
    """Gives the room of dead bodies back, or at least overwrites them where a file system has no holes."""

    def __init__(self) -> None:
        self.makes_holes = True

    def probe(self, fd: int) -> None:
        """Find out whether there are holes, far behind what a file has."""
        if _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, 2**30, PAGE_BYTES) and ctypes.get_errno() in _LACKING:
            self.makes_holes = False

    def clear(self, fd: int, begin: int, end: int) -> None:
        """Have these bytes be zeros from now on, and the whole pages among them take no room. Raises OSError."""
        end = -(-end // PAGE_BYTES) * PAGE_BYTES
        if self.makes_holes:
            while _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, begin, end - begin):
                code = ctypes.get_errno()
                if code == errno.EINTR:
                    continue
                if code not in _LACKING:
                    raise OSError(code, os.strerror(code))
                self.makes_holes = False
                break
            else:
                return
        end = min(end, os.fstat(fd).st_size)
        while begin < end:
            begin += os.pwrite(fd, _ZEROS[: end - begin], begin)


def allocate(fd: int, begin: int, size_bytes: int) -> bool:
    """Have room for what will be written there; False where a file system cannot promise that. Raises OSError."""
    if not _fallocate(fd, _KEEP_SIZE, begin, size_bytes):
        return True
    code = ctypes.get_errno()
    if code not in FULL:
        return False  # what is written will tell
    raise OSError(code, os.strerror(code))


def has_status_at_hand(fd: int) -> bool:
    """Whether the kernel knows the size of what is open here without asking a disk, a server or another process."""
    status = ctypes.create_string_buffer(256)
    return not _fstatfs(fd, status) and struct.unpack_from("l", status)[0] in _AT_HAND


def lock(fd: int) -> bool | None:
    """Whether this file is locked by us now, until it is closed; None if the file system has no locks. Raises OSError.

    Where `flock` is not known, a lock of the open file description does the same.
    """
    for take in (_flock, _lock_description):
        try:
            take(fd)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if error.errno not in _LACKING:
                raise
        else:
            return True
    return None


def _flock(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_description(fd: int) -> None:
    whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, whole)
