"""What dead writers left in a directory, beside what they recorded. It blocks: for threads."""

import logging
import os
from collections.abc import Mapping

from async_cache.l2.filesystem.directory import Directory
from async_cache.l2.filesystem.files import NO_FILE
from async_cache.l2.filesystem.format import PAGE_BYTES, parse_index, parse_segment

logger = logging.getLogger(__name__)


def sweep(directory: Directory, used: Mapping[str, tuple[int, int]], known: Mapping[str, int]) -> list[str]:
    """Clear away what dead writers left to us, given the end of each of their segments, and how many pages it uses.

    `known` are the segments that an index has heard of, with the number of their objects: what nobody has heard of,
    nor answers for, is set aside. Returns the names of those in which more is allocated than used.
    """
    segments = {name: parsed for name in directory.names() if (parsed := parse_segment(name)) is not None}
    indexes = {parsed[0] for _ in range(2) for name in directory.names() if (parsed := parse_index(name)) is not None}
    ours = {each.writer for each in directory.journals.values() if each.owned and each.known} - {directory.writer}
    for journal in directory.journals.values():
        if journal.owned and journal.known and journal.writer != directory.writer:
            journal.cut()
    allocated = []
    for name, (writer, _) in segments.items():
        if name in used:
            if _cut(directory, name, *used[name]):
                allocated.append(name)
            continue
        try:
            is_left = writer in ours or (writer not in indexes and _is_empty(directory, name, known))
            if is_left and not known.get(name):
                directory.remove(name)  # it was being written, or all of it was given up
            elif writer not in indexes and name not in known:
                os.rename(name, f"{name}.bad", src_dir_fd=directory.fd, dst_dir_fd=directory.fd)
                logger.warning("%s: no index tells what is in %s: set aside as %s.bad", directory.path, name, name)
        except OSError as error:
            logger.warning("%s: the segment %s cannot be cleared away: %s", directory.path, name, error)
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
            logger.warning("%s: the segment %s cannot be looked at: %s", directory.path, name, error)
        return False


def clear_gaps(directory: Directory, name: str, bodies: list[tuple[int, int]]) -> None:
    """Clear all pages of a segment but those of these bodies (first page, end), which are in order."""
    begin = 0
    for page, end in bodies:
        if begin < page:
            try:
                directory.bodies.clear(name, begin, page)
            except OSError as error:
                logger.warning("%s: the segment %s cannot be cleared: %s", directory.path, name, error)
                return
        begin = end
