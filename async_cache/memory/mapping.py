"""Memory files that processes share: memfds, their seals, and mappings of them that cannot be written to."""

import ctypes
import fcntl
import mmap
import os
import weakref

_FIRST_DESCRIPTOR = 3  # behind standard input, output and error
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; Python has the others
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2  # of <linux/falloc.h>
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
_MAP_FAILED = ctypes.c_void_p(-1).value


def make_memfd(name: str) -> int:
    """A new memory file of size 0, which can be sealed. Its descriptor is the caller's to close.

    It never has the number of a standard stream, to which any library may write.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if fd >= _FIRST_DESCRIPTOR:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_DESCRIPTOR)
    finally:
        os.close(fd)


def seal_size(fd: int) -> None:
    """From now on the file keeps its size: whoever maps it never meets a page that is gone."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


def seal_new_writers(fd: int) -> None:
    """From now on the file can be mapped for reading only. Before Linux 5.1 other processes are trusted to do so."""
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
    except OSError:
        return


def next_data(fd: int, begin: int) -> int | None:
    """Where the first page at or behind an offset is that is really there; None if none is."""
    try:
        return os.lseek(fd, begin, os.SEEK_DATA)
    except OSError:
        return None


def punch_hole(fd: int, begin: int, size_bytes: int) -> bool:
    """Give pages back to the system, whether it could be done; who reads them finds zeros. The size stays."""
    return not _libc.fallocate(fd, _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE, begin, size_bytes)


def is_memfd(fd: int) -> bool:
    """Whether a descriptor is that of a memory file which could be sealed."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def cannot_shrink(fd: int) -> bool:
    """Whether a memory file is sealed against shrinking: reading beyond its end would be a signal, and no error."""
    return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)


def map_read_only(fd: int, size_bytes: int) -> memoryview:
    """Another process's memory. It stays mapped until the last view of it is gone.

    The pages cannot be written to, whatever the view says: torch warns of tensors over a view that is read-only.
    """
    address = _libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, f"memory cannot be mapped: {os.strerror(error)}")
    array = (ctypes.c_ubyte * size_bytes).from_address(address)
    weakref.finalize(array, _libc.munmap, address, size_bytes).atexit = False
    return memoryview(array).cast("B")
