"""Bodies in segments are written, side by side by one system call, and cleared. It blocks: for threads."""

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from threading import Event

from msgspec import Struct
from xxhash import xxh3_64

from async_cache.l2.filesystem.files import NO_FILE, Files, OpenFile, Puncher
from async_cache.l2.filesystem.format import BLOCK_BYTES, PAGE_BYTES, pages
from async_cache.l2.filesystem.transfers import Transfers
from async_cache.prompt.keys import ObjectKey

logger = logging.getLogger(__name__)

WRITE_BYTES = 4 * 2**20  # by one system call

_MOST_PARTS = 512  # of one system call; the kernel takes 1,024
_PADDING = memoryview(bytes(PAGE_BYTES))


class Body(Struct, eq=False):
    """A body that is to be written at a page of a segment, and what came of it: its checksum, or why it was not."""

    key: ObjectKey
    buffer: memoryview
    size_bytes: int
    segment: str
    page: int
    checksum: int = 0
    fault: OSError | None = None


class Bodies:
    """The segments of a directory. Each method raises OSError where it does not say otherwise."""

    def __init__(self, files: Files, transfers: Transfers):
        self._files, self._transfers = files, transfers
        self.puncher = Puncher()

    def write(self, bodies: Sequence[Body], stop: Event) -> None:
        """Write bodies, and put into each how it went. Those that were not reached when it was stopped have a fault."""
        for group in _groups(bodies, WRITE_BYTES):
            try:
                self._write_group(group, stop)
            except OSError:
                self._files.forget(group[0].segment)  # a handle may be stale
                for body in group:  # one may fit where all do not
                    try:
                        self._write_group([body], stop)
                    except OSError as error:
                        body.fault = error.with_traceback(None)
        for body in bodies:
            if body.fault is not None:
                self._clear_quietly(body)

    def _write_group(self, group: list[Body], stop: Event) -> None:
        parts: list[memoryview] = []
        for body in group:
            digest = xxh3_64()
            for begin in range(0, len(body.buffer), BLOCK_BYTES):
                if stop.is_set():
                    raise InterruptedError(errno.EINTR, "stopped")
                digest.update(body.buffer[begin : begin + BLOCK_BYTES])
            body.checksum = digest.intdigest()
            parts.append(body.buffer)
            if padding := -len(body.buffer) % PAGE_BYTES:
                parts.append(_PADDING[:padding])
        if len(group[-1].buffer) % PAGE_BYTES:
            parts.pop()
        offset = group[0].page * PAGE_BYTES
        for begin, piece in _pieces(parts):
            if stop.is_set():
                raise InterruptedError(errno.EINTR, "stopped")
            wanted = sum(map(len, piece))
            if self._transfers.write(group[0].segment, piece, offset + begin, wanted) != wanted:
                raise OSError(errno.EIO, "the file takes no more bytes")

    def sync(self, segment: str) -> None:
        """Have all that was written to a segment survive a power failure."""
        file = self._files.get(segment, create=True)
        os.fdatasync(file.fd)

    def clear(self, segment: str, begin_page: int, end_page: int) -> None:
        """Have these pages be zeros, and give their room back if that can be. A segment that is gone is no error."""
        if (file := self._there(segment)) is not None:
            self.puncher.clear(file.fd, begin_page * PAGE_BYTES, end_page * PAGE_BYTES)

    def cut(self, segment: str) -> None:
        """Give the room of a whole segment back. One that is gone is no error."""
        if (file := self._there(segment)) is not None:
            os.ftruncate(file.fd, 0)

    def _there(self, segment: str) -> OpenFile | None:
        try:
            return self._files.get(segment)
        except OSError as error:
            if error.errno in NO_FILE:
                return None
            raise

    def _clear_quietly(self, body: Body) -> None:
        try:
            self.clear(body.segment, body.page, body.page + pages(body.size_bytes))
        except OSError as error:
            logger.warning("cannot clear what was not written whole: %s", error)


def _groups(bodies: Sequence[Body], most_bytes: int) -> Iterator[list[Body]]:
    """Bodies that lie side by side, in their order, up to so many bytes at a time, or one."""
    group: list[Body] = []
    size = end = 0
    for body in bodies:
        if group and (body.segment != group[0].segment or body.page != end or size + len(body.buffer) > most_bytes):
            yield group
            group, size = [], 0
        group.append(body)
        size += len(body.buffer)
        end = body.page + pages(len(body.buffer))
    if group:
        yield group


def _pieces(parts: list[memoryview]) -> Iterator[tuple[int, list[memoryview]]]:
    """What one system call takes, and where it begins: not too many parts, and of long ones WRITE_BYTES at a time."""
    begin = 0
    for first in range(0, len(parts), _MOST_PARTS):
        piece = parts[first : first + _MOST_PARTS]
        if len(piece) == 1:
            for at in range(0, len(piece[0]), WRITE_BYTES):
                yield begin + at, [piece[0][at : at + WRITE_BYTES]]
        else:
            yield begin, piece
        begin += sum(map(len, piece))
