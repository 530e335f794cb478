"""The memory that a client writes into, and its server reads."""

import asyncio
import ctypes
import logging
import mmap
import os
import weakref
from collections import deque

from async_cache.memory.extents import Extents
from async_cache.memory.mapping import make_memfd, next_data, punch_hole, seal_size

IDLE_SECONDS = 10.0
"""How long no block is taken before free memory is given back: pages that are used again at once are best kept."""
_GIVEN_BACK_BYTES = 64 * 2**20  # in one step of the loop, some milliseconds

log = logging.getLogger(__name__)

Block = ctypes.Array[ctypes.c_ubyte]


class Segment:
    """Memory that the server reads from: sparse, as large as the arena, and only what was written to is really there.

    A block is free again when nobody has a view of it any more. What has been free for a while, with no new block
    taken, is given back to the machine, a part in each step of the loop: a hole reads as zeros.
    """

    def __init__(self) -> None:
        self.fd = make_memfd("async_cache segment")
        self._map: mmap.mmap | None = None
        self._extents = Extents(0)
        self._kept_bytes = 0  # from the beginning on: these pages are never given back
        self._freed: deque[tuple[int, int]] = deque()  # by the threads that had the last views
        self._used = False  # since the timer was set
        self._timer: asyncio.TimerHandle | None = None  # while blocks are taken, or free and not given back

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
        self._take_back()
        self._used = True
        self._set_timer(IDLE_SECONDS)
        made = []
        for offset in self._extents.allocate(size_bytes, count):
            block = (ctypes.c_ubyte * size_bytes).from_buffer(self._map, offset)
            weakref.finalize(block, self._freed.append, (offset, size_bytes)).atexit = False
            made.append((offset, block))
        return made

    def window(self, size_bytes: int) -> memoryview | None:
        """The first bytes, to be pinned: their pages stay the file's from now on. None where there is no memory.

        Blocks begin there. A page that is given back while a device has it pinned would be another one afterwards.
        """
        if self._map is None:
            return None
        self._kept_bytes = max(self._kept_bytes, min(size_bytes, self._extents.size_bytes))
        return memoryview(self._map)[:size_bytes]

    def _take_back(self) -> None:
        while self._freed:
            self._extents.free(*self._freed.popleft())

    # Giving back.

    def _set_timer(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        """Give a part back, unless it was used meanwhile, and look again until nothing is left to give."""
        self._timer = None
        if self._used:
            self._used = False
            self._set_timer(IDLE_SECONDS)
        elif self.give_back():
            self._set_timer(0)
        elif self._extents.free_bytes < self._extents.size_bytes:
            self._set_timer(IDLE_SECONDS)

    def give_back(self) -> bool:
        """Give up to 64 MiB of what is free back to the machine; whether there was something to give."""
        self._take_back()
        for begin, end in self._extents.ranges():
            data = next_data(self.fd, max(begin, self._kept_bytes))
            if data is None:
                break
            if data < end:
                return punch_hole(self.fd, data, min(end - data, _GIVEN_BACK_BYTES))
        return False

    def close(self) -> None:
        """Close the file, once; views keep the memory."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd, self._map = -1, None
