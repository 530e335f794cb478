"""Bodies are read and verified, in runs: what lies side by side comes by one system call.

It is hashed in pieces that the processor's cache still has. It blocks: for threads.
"""

import errno
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from threading import Event
from typing import NamedTuple

from xxhash import xxh3_64, xxh3_64_intdigest

from async_cache.l2.backend import Loaded, LoadOutcome
from async_cache.l2.filesystem.files import NO_FILE, Files
from async_cache.l2.filesystem.format import BLOCK_BYTES, PAGE_BYTES, pages
from async_cache.l2.filesystem.transfers import Transfers

_LOADED, _GONE, _CORRUPT = LoadOutcome.LOADED, LoadOutcome.GONE, LoadOutcome.CORRUPT
_MORE_TRIES = 2
_QUICK_SECONDS = 0.1  # a drive tries a bad sector for longer
_COLD_SECONDS = 0.001  # for BLOCK_BYTES, which come from the page cache in a fifth of that
_ANNOUNCED_RUNS = 32  # told the kernel at a time: 16 MiB


class Wanted(NamedTuple):
    """A body that is to be read: where it lies, and what is known of it. `number` is its place among the buffers."""

    segment: str
    page: int
    number: int
    size_bytes: int
    checksum: int


class Todo:
    """Runs of bodies, each of which is read by one of several threads."""

    def __init__(self, runs: list[list[Wanted]]):
        self._runs = runs
        self._numbers = count()
        self._announced = 0

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[list[Wanted]]:
        """Iterate over those that no thread has taken."""
        while (number := next(self._numbers)) < len(self._runs):
            self._taken = number
            yield self._runs[number]

    def left(self) -> list[list[Wanted]]:
        """Runs that were not taken yet, and not told before, some at a time."""
        begin = max(self._announced, self._taken + 1)
        self._announced = begin + _ANNOUNCED_RUNS
        return self._runs[begin : self._announced]


def runs(wanted: list[Wanted]) -> Iterator[list[Wanted]]:
    """Bodies in the order of their places, together where they lie side by side, up to BLOCK_BYTES at a time."""
    run: list[Wanted] = []
    left = end = size = count = 0
    before = ""
    for each in wanted:
        segment, page, _, size_bytes, _ = each
        if not run or segment != before or page != end or size_bytes > left:
            if run:
                yield run
            run, before, left = [], segment, BLOCK_BYTES
        run.append(each)
        left -= size_bytes
        if size_bytes != size:
            size, count = size_bytes, pages(size_bytes)
        end = page + count
    if run:
        yield run


class Runs:
    """The segments of a directory, as they are read."""

    def __init__(self, files: Files, transfers: Transfers):
        self._files, self._transfers = files, transfers

    def read(
        self,
        todo: Todo,
        buffers: Sequence[memoryview],
        outcomes: list[LoadOutcome | OSError | None],
        loaded: Loaded,
        stop: Event,
    ) -> None:
        """Fill buffers until nothing is left to do, and put into `outcomes`, at the number of each, how it went.

        Of what is loaded, that is said at once.

        Several threads may share the runs: one that is fast, or was woken first, does more of the work.
        """
        scratch = memoryview(bytearray(PAGE_BYTES))
        for run in todo:
            if stop.is_set():
                return
            began = time.monotonic()
            if len(run) > 1 or run[0].size_bytes <= BLOCK_BYTES:
                left = self._read_together(run, buffers, outcomes, loaded, scratch)
            else:
                left = run
            for wanted in left:  # what is too long for one call, or needs to be looked at alone
                if stop.is_set():
                    return
                buffer = buffers[wanted.number][: wanted.size_bytes]
                outcome = outcomes[wanted.number] = self._read_alone(wanted, buffer, stop)
                if outcome is _LOADED:
                    loaded(wanted.number)
            if stop.is_set():
                return
            blocks = sum([wanted.size_bytes for wanted in run]) // BLOCK_BYTES or 1
            if self.goes_through_the_cache and time.monotonic() - began > _COLD_SECONDS * blocks:
                self.announce(todo.left())

    @property
    def goes_through_the_cache(self) -> bool:
        """Whether it makes sense to announce what will be read."""
        return self._transfers.goes_through_the_cache

    def is_cold(self, some: Iterable[Wanted]) -> bool:
        """Whether one of these bodies has to come from a disk, as far as a file system tells."""
        for wanted in some:
            with suppress(OSError):
                if not _is_cached(self._files.get(wanted.segment).fd, wanted.page * PAGE_BYTES):
                    return True
        return False

    def announce(self, left: Iterable[list[Wanted]]) -> None:
        """Have the kernel read ahead what a disk, and not the page cache, has."""
        for run in left:
            first, last = run[0], run[-1]
            begin, end = first.page * PAGE_BYTES, last.page * PAGE_BYTES + last.size_bytes
            with suppress(OSError):
                file = self._files.get(first.segment)
                if not _is_cached(file.fd, begin):
                    os.posix_fadvise(file.fd, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _read_together(
        self,
        run: list[Wanted],
        buffers: Sequence[memoryview],
        outcomes: list[LoadOutcome | OSError | None],
        loaded: Loaded,
        scratch: memoryview,
    ) -> list[Wanted]:
        """Fill the buffers of bodies that lie side by side by one system call; those for which that did not do."""
        parts, total = [], 0
        for wanted in run:
            _, _, number, size, _ = wanted
            buffer = buffers[number]
            parts.append(buffer if len(buffer) == size else buffer[:size])
            if (padding := -size % PAGE_BYTES) and wanted is not run[-1]:
                parts.append(scratch[:padding])
                total += padding
            total += size
        try:
            if self._transfers.read(run[0].segment, parts, run[0].page * PAGE_BYTES, total) != total:
                return run
        except OSError:
            return run
        failed = []
        for wanted in run:
            _, _, number, size, checksum = wanted
            buffer = buffers[number]
            if xxh3_64_intdigest(buffer if len(buffer) == size else buffer[:size]) == checksum:
                outcomes[number] = _LOADED
                loaded(number)
            else:
                failed.append(wanted)
        return failed

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
            if self._transfers.read(wanted.segment, [block], offset + begin, len(block)) != len(block):
                return False
            digest.update(block)
        return digest.intdigest() == wanted.checksum


def _is_cached(fd: int, offset: int) -> bool:
    """Whether the page cache has what begins there, as far as a file system tells."""
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:
        return False
