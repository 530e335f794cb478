"""What dead writers left in a directory, beside what they recorded, is cleared away."""

import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

from async_cache.aio.slices import InTurns
from async_cache.l2.filesystem.catalog import Catalog
from async_cache.l2.filesystem.directory import Directory
from async_cache.l2.filesystem.files import NO_FILE
from async_cache.l2.filesystem.format import PAGE_BYTES, parse_index, parse_segment
from async_cache.l2.filesystem.journal import Journal
from async_cache.l2.filesystem.room import SLICE
from async_cache.l2.filesystem.work import Threads

logger = logging.getLogger(__name__)


async def sweep(
    directory: Directory,
    catalog: Catalog,
    threads: Threads,
    look: Callable[[], Awaitable[None]],
    *,
    is_complete: bool,
) -> None:
    """Have cleared away what dead writers left to us, of whom all that they recorded is known. Raises OSError.

    What nobody has heard of, nor answers for, is set aside if all that was recorded by anyone is known.
    """
    known = [journal for journal in directory.writers.ours() if journal.known]
    listing = await threads.run(threads.scans, _list, directory)
    if is_complete:
        await look()  # it is judged by what is known after the listing: what was recorded before it is heard of
    used = catalog.segments.left_by_the_dead(directory.writer)
    names = catalog.segments.names()
    sets_aside = is_complete and not directory.writers.has_unopened
    await threads.recorded()  # what was given up, and is not in use for that: else others take it for corrupt
    allocated = await threads.run(threads.scans, _clear_away, directory, listing, known, used, names, sets_aside)
    if allocated:
        bodies: dict[str, list[tuple[int, int]]] = {name: [] for name in allocated}
        async for chunks in InTurns(catalog.index.chunks(), SLICE):
            for chunk in chunks:
                for name, page, end in catalog.bodies_in(chunk):
                    if name in bodies:
                        bodies[name].append((page, end))
        await threads.recorded()
        for name in allocated:
            await threads.run(threads.scans, _clear_gaps, directory, name, sorted(bodies[name]))
    for journal in known:
        journal.swept = journal.swept or journal.is_cut


# In a thread.


class _Listing(NamedTuple):
    begun: list[tuple[str, int]]  # small files, and the writer of each, who has an index file
    segments: dict[str, int]  # and the writer of each
    writers: set[int]  # that have an index file


def _list(directory: Directory) -> _Listing:
    names, begun = directory.writers.names, directory.begun()
    segments = {name: parsed[0] for name in names() if (parsed := parse_segment(name)) is not None}
    writers = {parsed[0] for _ in range(2) for name in names() if (parsed := parse_index(name)) is not None}
    return _Listing(begun, segments, writers)


def _clear_away(
    directory: Directory,
    listing: _Listing,
    journals: list[Journal],
    used: Mapping[str, tuple[int, int]],
    known: Mapping[str, int],
    sets_aside: bool,
) -> list[str]:
    """Clear away what dead writers left to us, given the end of each of their segments, and how many pages it uses.

    `known` are the segments that an index has heard of, with the number of their objects. Returns the names of those
    in which more is allocated than used.
    """
    dead = [journal for journal in journals if journal.writer != directory.writer]
    for journal in dead:
        try:
            journal.cut()
        except OSError as error:
            logger.warning("%s: the index %s cannot be cut: %s", directory.name, journal.name, error)
    ours = {journal.writer for journal in dead}
    for name, writer in listing.begun:
        if writer in ours or writer not in listing.writers:
            with suppress(OSError):
                os.unlink(name, dir_fd=directory.fd)
    allocated = []
    for name, writer in listing.segments.items():
        if name in used:
            if _cut(directory, name, *used[name]):
                allocated.append(name)
            continue
        has_no_index = sets_aside and writer not in listing.writers
        try:
            is_left = writer in ours or (has_no_index and _is_empty(directory, name, known))
            if is_left and not known.get(name):
                directory.clearing.remove(name)  # it was being written, or all of it was given up
            elif has_no_index and name not in known:
                directory.clearing.set_aside(name)
                logger.warning("%s: no index tells what is in %s: set aside as %s.bad", directory.name, name, name)
        except OSError as error:
            logger.warning("%s: the segment %s cannot be cleared away: %s", directory.name, name, error)
    return allocated


def _is_empty(directory: Directory, name: str, known: Mapping[str, int]) -> bool:
    """Whether all of a segment was given up, or nothing is in it."""
    try:
        return name in known or not os.stat(name, dir_fd=directory.fd, follow_symlinks=False).st_blocks
    except OSError:
        return False


def _cut(directory: Directory, name: str, end_page: int, count: int) -> bool:
    """Cut off what was written behind the last body; whether more is allocated than the bodies need."""
    try:
        file = directory.files.get(name)
        if os.fstat(file.fd).st_size > end_page * PAGE_BYTES:
            os.truncate(file.fd, end_page * PAGE_BYTES)
        return os.fstat(file.fd).st_blocks * 512 > count * PAGE_BYTES
    except OSError as error:
        if error.errno not in NO_FILE:
            logger.warning("%s: the segment %s cannot be looked at: %s", directory.name, name, error)
        return False


def _clear_gaps(directory: Directory, name: str, bodies: list[tuple[int, int]]) -> None:
    """Clear all pages of a segment but those of these bodies (first page, end), which are in order."""
    begin = 0
    for page, end in bodies:
        if begin < page:
            try:
                directory.bodies.clear(name, begin, page)
            except OSError as error:
                logger.warning("%s: the segment %s cannot be cleared: %s", directory.name, name, error)
                return
        begin = end
