"""What a client shares with its server: the arena, mapped read-only, and a segment of its own to write into."""

import ctypes
import mmap
import os
import weakref
from collections import deque

from async_cache.l1.arena import Extents

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value

Block = ctypes.Array[ctypes.c_ubyte]


def map_arena(fd: int, size_bytes: int) -> memoryview:
    """The server's arena. It stays mapped until the last view of it is gone.

    The pages can not be written to, whatever the view says: torch warns of tensors over a view that is read-only.
    """
    address = _libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, f"the server's memory can not be mapped: {os.strerror(error)}")
    array = (ctypes.c_ubyte * size_bytes).from_address(address)
    weakref.finalize(array, _libc.munmap, address, size_bytes).atexit = False
    return memoryview(array).cast("B")


class Segment:
    """Memory that the server reads from: sparse, as large as the arena, and only what was written to is really there.

    A block is free again when nobody has a view of it any more.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("async_cache segment", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._map: mmap.mmap | None = None
        self._extents = Extents(0)
        self._freed: deque[tuple[int, int]] = deque()  # by whatever thread let go last

    def grow(self, size_bytes: int) -> None:
        """Give it its size, once."""
        os.ftruncate(self.fd, size_bytes)
        self._map = mmap.mmap(self.fd, size_bytes)
        self._extents = Extents(size_bytes)

    def blocks(self, size_bytes: int, count: int) -> list[tuple[int, Block]]:
        """Up to `count` blocks of whole pages, each with its offset."""
        if self._map is None:
            return []
        while self._freed:
            self._extents.free(*self._freed.popleft())
        made = []
        for offset in self._extents.allocate(size_bytes, count):
            block = (ctypes.c_ubyte * size_bytes).from_buffer(self._map, offset)
            weakref.finalize(block, self._freed.append, (offset, size_bytes)).atexit = False
            made.append((offset, block))
        return made

    def close(self) -> None:
        """Let go of the file. Views keep the memory."""
        os.close(self.fd)
        self._map = None
