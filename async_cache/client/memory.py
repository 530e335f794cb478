"""The memory that a client writes into, and its server reads."""

import ctypes
import logging
import mmap
import os
import weakref
from collections import deque

from async_cache.memory.extents import Extents
from async_cache.memory.mapping import make_memfd, seal_size

log = logging.getLogger(__name__)

Block = ctypes.Array[ctypes.c_ubyte]


class Segment:
    """Memory that the server reads from: sparse, as large as the arena, and only what was written to is really there.

    A block is free again when nobody has a view of it any more.
    """

    def __init__(self) -> None:
        self.fd = make_memfd("async_cache segment")
        self._map: mmap.mmap | None = None
        self._extents = Extents(0)
        self._freed: deque[tuple[int, int]] = deque()  # by the threads that had the last views

    def grow(self, size_bytes: int) -> None:
        """Give the segment its size, once. Where the system refuses that there is no room in it: bytes go in frames."""
        try:
            os.ftruncate(self.fd, size_bytes)
            seal_size(self.fd)
            self._map = mmap.mmap(self.fd, size_bytes)
        except OSError as error:
            log.info("what is stored travels in frames: %s", error.strerror)
            return
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
        """Close the file, once; views keep the memory."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd, self._map = -1, None
