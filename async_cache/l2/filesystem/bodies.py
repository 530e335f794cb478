"""Bodies in segments: written, read and verified, cleared. All of it blocks: it is for threads.

What lies side by side goes in one system call, and is hashed in pieces that the processor's cache still has.
"""

import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from threading import Event
from typing import NamedTuple

from msgspec import Struct
from xxhash import xxh3_64, xxh3_64_intdigest

from async_cache.l2.backend import LoadOutcome
from async_cache.l2.filesystem.files import NO_FILE, Files, NoDirect, OpenFile, Puncher, transfer
from async_cache.l2.filesystem.format import PAGE_BYTES, pages
from async_cache.prompt.keys import ObjectKey

logger = logging.getLogger(__name__)

BLOCK_BYTES = 512 * 1024  # hashed while it is still in the processor's cache
WRITE_BYTES = 4 * 2**20  # by one system call

_LOADED, _GONE, _CORRUPT = LoadOutcome.LOADED, LoadOutcome.GONE, LoadOutcome.CORRUPT
_MORE_TRIES = 2
_QUICK_SECONDS = 0.1  # a drive tries a bad sector for longer
_COLD_SECONDS = 0.001  # a group comes from the page cache in a fifth of that
_ANNOUNCED_GROUPS = 32  # told the kernel at a time: 16 MiB
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


class Wanted(NamedTuple):
    """A body that is to be read: where it lies, and what is known of it. `number` is its place among the buffers."""

    segment: str
    page: int
    number: int
    size_bytes: int
    checksum: int


class Bodies:
    """The segments of a directory. Each method raises OSError where it does not say otherwise."""

    def __init__(self, files: Files, *, direct: bool):
        self._files = files
        self._direct = direct
        self.puncher = Puncher()

    # Writing.

    def write(self, bodies: Sequence[Body], stop: Event) -> None:
        """Write bodies, and put into each how it went. Those that were not reached when it was stopped have a fault."""
        for group in _groups(bodies, WRITE_BYTES):
            try:
                self._write_group(group, stop)
            except OSError:
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
            if self._write_piece(group[0].segment, piece, offset + begin, wanted) != wanted:
                raise OSError(errno.EIO, "the file takes no more bytes")

    def _write_piece(self, segment: str, parts: list[memoryview], offset: int, wanted: int) -> int:
        if self._direct and _whole_pages(parts):
            try:
                file = self._files.get(segment, direct=True, create=True)
                return transfer(os.pwritev, file.fd, list(parts), offset, wanted)
            except OSError as error:
                self._on_through_the_cache(error)
        file = self._files.get(segment, create=True)
        return transfer(os.pwritev, file.fd, parts, offset, wanted)

    def _on_through_the_cache(self, error: OSError) -> None:
        """Go on where O_DIRECT is refused: by the memory, or for good by the file system. Raises other faults."""
        if error.errno != errno.EINVAL:
            raise error
        if isinstance(error, NoDirect):
            logger.warning("the file system has no O_DIRECT: going through the page cache")
            self._direct = False

    def sync(self, segment: str) -> None:
        """Have all that was written to a segment survive a power failure."""
        file = self._files.get(segment, create=True)
        os.fdatasync(file.fd)

    def clear(self, segment: str, begin_page: int, end_page: int) -> None:
        """Have these pages be zeros, and give their room back if that can be. A segment that is gone is no error."""
        try:
            file = self._files.get(segment)
        except OSError as error:
            if error.errno in NO_FILE:
                return
            raise
        self.puncher.clear(file.fd, begin_page * PAGE_BYTES, end_page * PAGE_BYTES)

    def _clear_quietly(self, body: Body) -> None:
        try:
            self.clear(body.segment, body.page, body.page + pages(body.size_bytes))
        except OSError as error:
            logger.warning("cannot clear what was not written whole: %s", error)

    # Reading.

    def read(
        self,
        groups: "Groups",
        buffers: Sequence[memoryview],
        outcomes: list[LoadOutcome | OSError | None],
        stop: Event,
    ) -> None:
        """Fill buffers until nothing is left to do, and put into `outcomes`, at the number of each, how it went.

        Several threads may share the groups: one that is fast, or was woken first, does more of the work.
        """
        scratch = memoryview(bytearray(PAGE_BYTES))
        for group in groups:
            if stop.is_set():
                return
            began = time.monotonic()
            if len(group) > 1 or group[0].size_bytes <= BLOCK_BYTES:
                group = self._read_together(group, buffers, outcomes, scratch)
            if time.monotonic() - began > _COLD_SECONDS:
                self._announce(groups.left(), stop)
            for wanted in group:  # what is too long for one call, or needs to be looked at alone
                if stop.is_set():
                    return
                buffer = buffers[wanted.number][: wanted.size_bytes]
                outcomes[wanted.number] = self._read_alone(wanted, buffer, stop)

    def _announce(self, bodies: list[Wanted], stop: Event) -> None:
        """Have the kernel read ahead what a disk, and not the page cache, has."""
        for wanted in bodies:
            if stop.is_set() or self._direct:
                return
            with suppress(OSError):
                file = self._files.get(wanted.segment)
                os.posix_fadvise(file.fd, wanted.page * PAGE_BYTES, wanted.size_bytes, os.POSIX_FADV_WILLNEED)

    def _read_together(
        self,
        group: list[Wanted],
        buffers: Sequence[memoryview],
        outcomes: list[LoadOutcome | OSError | None],
        scratch: memoryview,
    ) -> list[Wanted]:
        """Fill the buffers of bodies that lie side by side by one system call; those for which that did not do."""
        parts, total = [], 0
        for wanted in group:
            size = wanted.size_bytes
            buffer = buffers[wanted.number]
            parts.append(buffer if len(buffer) == size else buffer[:size])
            if (padding := -size % PAGE_BYTES) and wanted is not group[-1]:
                parts.append(scratch[:padding])
                total += padding
            total += size
        try:
            file = self._readable(group[0].segment, parts)
            if os.preadv(file.fd, parts, group[0].page * PAGE_BYTES) != total:
                return group
        except OSError:
            return group
        failed = []
        for wanted in group:
            buffer = buffers[wanted.number]
            if len(buffer) != wanted.size_bytes:
                buffer = buffer[: wanted.size_bytes]
            if xxh3_64_intdigest(buffer) == wanted.checksum:
                outcomes[wanted.number] = _LOADED
            else:
                failed.append(wanted)
        return failed

    def _readable(self, segment: str, parts: list[memoryview]) -> OpenFile:
        if self._direct and _whole_pages(parts):
            try:
                return self._files.get(segment, direct=True)
            except OSError as error:
                self._on_through_the_cache(error)
        return self._files.get(segment)

    def _read_alone(self, wanted: Wanted, buffer: memoryview, stop: Event) -> LoadOutcome | OSError:
        """Fill one buffer, however long it takes. A fault of the moment, as a stale handle is one, is quick."""
        latest = time.monotonic() + _QUICK_SECONDS
        for tries in range(_MORE_TRIES + 1):
            try:
                if self._read_blocks(wanted, buffer, stop):
                    return _LOADED
                return _GONE if self._is_hole(wanted) else _CORRUPT
            except OSError as error:
                fault = error.with_traceback(None)  # whose frames hold the buffer
            if fault.errno in NO_FILE or tries == _MORE_TRIES or stop.is_set() or time.monotonic() > latest:
                break
            self._files.forget(wanted.segment)
        return _GONE if fault.errno in NO_FILE else fault

    def _is_hole(self, wanted: Wanted) -> bool:
        """Whether nothing is allocated there: it was given up, by one whose record of that we have never seen."""
        file = self._files.get(wanted.segment)
        begin = wanted.page * PAGE_BYTES
        try:
            return os.lseek(file.fd, begin, os.SEEK_DATA) >= begin + wanted.size_bytes
        except OSError as error:
            return error.errno == errno.ENXIO  # there is nothing behind it either

    def _read_blocks(self, wanted: Wanted, buffer: memoryview, stop: Event) -> bool:
        digest = xxh3_64()
        offset = wanted.page * PAGE_BYTES
        for begin in range(0, len(buffer), BLOCK_BYTES):
            if stop.is_set():
                raise InterruptedError(errno.EINTR, "stopped")
            block = buffer[begin : begin + BLOCK_BYTES]
            if self._read_block(wanted.segment, block, offset + begin) != len(block):
                return False
            digest.update(block)
        return digest.intdigest() == wanted.checksum

    def _read_block(self, segment: str, block: memoryview, offset: int) -> int:
        if self._direct and _whole_pages([block]):
            try:
                file = self._files.get(segment, direct=True)
                return transfer(os.preadv, file.fd, [block], offset, len(block))
            except OSError as error:
                self._on_through_the_cache(error)
        file = self._files.get(segment)
        return transfer(os.preadv, file.fd, [block], offset, len(block))


class Groups:
    """Bodies that threads read, each group by one of them."""

    def __init__(self, groups: list[list[Wanted]]):
        self._groups = groups
        self._numbers = count()
        self._announced = 0

    def __iter__(self) -> Iterator[list[Wanted]]:
        """Iterate over those that no thread has taken."""
        while (number := next(self._numbers)) < len(self._groups):
            self._taken = number
            yield self._groups[number]

    def left(self) -> list[Wanted]:
        """The bodies of groups that were not taken yet, and not told before, some at a time."""
        begin = max(self._announced, self._taken + 1)
        self._announced = begin + _ANNOUNCED_GROUPS
        return [wanted for group in self._groups[begin : self._announced] for wanted in group]


def grouped(wanted: list[Wanted]) -> Iterator[list[Wanted]]:
    """Bodies in the order of their places, together where they lie side by side, up to BLOCK_BYTES at a time."""
    group: list[Wanted] = []
    left = end = 0
    segment = ""
    for each in wanted:
        if not group or each.segment != segment or each.page != end or each.size_bytes > left:
            if group:
                yield group
            group, segment, left = [], each.segment, BLOCK_BYTES
        group.append(each)
        left -= each.size_bytes
        end = each.page + pages(each.size_bytes)
    if group:
        yield group


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


def _whole_pages(parts: Sequence[memoryview]) -> bool:
    return not any(len(part) % PAGE_BYTES for part in parts)
