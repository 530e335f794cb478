"""L1's memory: one memory file, which other processes can map and only this one can write to."""

import ctypes
import mmap
import os
import threading

from async_cache.memory.mapping import make_memfd, seal_new_writers, seal_size

_MADV_POPULATE_WRITE = 23  # Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)


class Arena:
    """A block of shared memory: `fd` to map it elsewhere, `view` to use it here. `seal` it before others get it."""

    def __init__(self, size_bytes: int):
        self.size_bytes = size_bytes
        self._descriptor = threading.Lock()  # while it is closed, or taken by another thread
        self.fd = make_memfd("async_cache")
        try:
            os.ftruncate(self.fd, size_bytes)
            self._map = mmap.mmap(self.fd, size_bytes)
            seal_size(self.fd)
        except BaseException:
            os.close(self.fd)
            raise
        self.view = memoryview(self._map)

    def seal(self) -> None:
        """From now on others can map it for reading only."""
        seal_new_writers(self.fd)

    def populate(self, begin: int, end: int) -> None:
        """Fault the pages in, so that no request pays for it. Blocks, without the interpreter's lock."""
        start = ctypes.c_char.from_buffer(self._map, begin)  # which keeps it mapped, also where the arena is closed
        if _libc.madvise(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(end - begin), _MADV_POPULATE_WRITE):
            self._allocate(begin, end)

    def _allocate(self, begin: int, end: int) -> None:
        """Populate where the kernel cannot. An arena that is closed needs no pages, and its descriptor is another's."""
        with self._descriptor:
            if self.fd < 0:
                return
            fd = os.dup(self.fd)
        try:
            os.posix_fallocate(fd, begin, end - begin)
        finally:
            os.close(fd)

    def export(self, offset: int, size_bytes: int) -> "ctypes.Array[ctypes.c_ubyte]":
        """A buffer of its own over a range: it lives until the last view or array made from it is gone."""
        return (ctypes.c_ubyte * size_bytes).from_buffer(self._map, offset)

    def close(self) -> None:
        """Unmap, unless somebody still looks at it: then the last one does by letting go."""
        with self._descriptor:
            if self.fd < 0:
                return
            os.close(self.fd)
            self.fd = -1
        try:
            self.view.release()
            self._map.close()
        except BufferError:
            return
