"""A client's segment: memory that the client writes to, and the server only reads."""

import ctypes
import mmap
import os
from collections.abc import Sequence
from typing import cast

from async_cache.errors import ProtocolError
from async_cache.memory.mapping import cannot_shrink, is_memfd, map_read_only


class ClientSegment:
    """The segment of a connection. It is mapped with the first copy, by when the client has given it its size.

    Only a memfd of this machine's ordinary pages is taken: a file would make the server wait for its disk, and huge
    pages may run out. And one that is mapped cannot be cut short any more: reading beyond its end would be a signal,
    and not an error.
    """

    def __init__(self, fd: int, limit_bytes: int):
        """Take over a descriptor, and close it if it is refused. Raises ProtocolError."""
        self._fd = fd
        self._limit_bytes = limit_bytes
        self._view: memoryview | None = None
        if not is_memfd(fd):
            self.close()
            raise ProtocolError("the segment of a client must be a memfd")
        if os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
            self.close()
            raise ProtocolError("the segment of a client must have ordinary pages")

    def copy(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill views, one after the other, with what lies from `offset` on; without the interpreter's lock.

        Raises ValueError for what lies beyond the end, or if the segment cannot be mapped.
        """
        size_bytes = sum(map(len, views))
        segment = self._mapped()
        if offset + size_bytes > len(segment):
            raise ValueError(f"the segment does not have {size_bytes} bytes at {offset}")
        source = ctypes.addressof(cast(ctypes.Array[ctypes.c_ubyte], segment.obj)) + offset
        for view in views:
            ctypes.memmove((ctypes.c_ubyte * len(view)).from_buffer(view), source, len(view))
            source += len(view)

    def _mapped(self) -> memoryview:
        if self._view is None:
            if not cannot_shrink(self._fd):
                raise ValueError("the segment of a client must be sealed against shrinking")
            size_bytes = min(os.fstat(self._fd).st_size, self._limit_bytes)
            if not size_bytes:
                raise ValueError("the segment of a client is empty")
            try:
                self._view = map_read_only(self._fd, size_bytes)
            except OSError as error:
                raise ValueError(f"the segment of a client cannot be read: {error.strerror}") from error
        return self._view

    def close(self) -> None:
        """Close the descriptor, and unmap the memory; may be called more than once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd, self._view = -1, None
