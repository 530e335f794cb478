"""Bytes between memory and the files of a directory, past the page cache where that is wanted and can be.

It blocks: for threads.
"""

import errno
import logging
import os
from collections.abc import Callable, Sequence

from async_cache.l2.filesystem.files import Files, NoDirect, OpenFile
from async_cache.l2.filesystem.format import PAGE_BYTES

logger = logging.getLogger(__name__)


class Transfers:
    """Reads and writes the files of a directory; with `direct` by O_DIRECT, as long as the file system has that."""

    def __init__(self, files: Files, *, direct: bool):
        self._files = files
        self._direct = direct

    @property
    def goes_through_the_cache(self) -> bool:
        """Whether the page cache may have what is read."""
        return not self._direct

    def read(self, name: str, parts: list[memoryview], offset: int, wanted: int) -> int:
        """Fill buffers, as far as the file goes; the number of bytes. Raises OSError."""
        return self._transfer(os.preadv, name, parts, offset, wanted, create=False)

    def write(self, name: str, parts: list[memoryview], offset: int, wanted: int) -> int:
        """Write buffers to a file, made if it is not there; the number of bytes. Raises OSError."""
        return self._transfer(os.pwritev, name, parts, offset, wanted, create=True)

    def _transfer(
        self,
        call: Callable[[int, list[memoryview], int], int],
        name: str,
        parts: list[memoryview],
        offset: int,
        wanted: int,
        *,
        create: bool,
    ) -> int:
        if self._direct and _whole_pages(parts):
            try:
                file = self._files.get(name, direct=True, create=create)
                return _until(call, file, list(parts), offset, wanted)
            except OSError as error:
                self._on_through_the_cache(error)
        return _until(call, self._files.get(name, create=create), parts, offset, wanted)

    def _on_through_the_cache(self, error: OSError) -> None:
        """Go on where O_DIRECT is refused: by the memory, or for good by the file system. Raises other faults."""
        if error.errno != errno.EINVAL:
            raise error
        if isinstance(error, NoDirect):
            logger.warning("the file system has no O_DIRECT: going through the page cache")
            self._direct = False


def _until(
    call: Callable[[int, list[memoryview], int], int], file: OpenFile, parts: list[memoryview], offset: int, wanted: int
) -> int:
    """Do a preadv or pwritev until `wanted` bytes are through, or no more come; the number of bytes."""
    done = 0
    while True:
        count = call(file.fd, parts, offset + done)
        done += count
        if done >= wanted or not count:
            return done
        while count >= len(parts[0]):
            count -= len(parts.pop(0))
        parts[0] = parts[0][count:]


def _whole_pages(parts: Sequence[memoryview]) -> bool:
    return not any(len(part) % PAGE_BYTES for part in parts)
