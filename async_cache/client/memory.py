"""The memory that a client writes into, and its server reads."""

import ctypes
import fcntl
import mmap
import os
import weakref
from collections import deque

from async_cache.l1.arena import Extents

_F_ADD_SEALS, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 0x2, 0x4

Block = ctypes.Array[ctypes.c_ubyte]


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
        fcntl.fcntl(self.fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
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
