"""What a directory is: a store of this version, an empty one that becomes one, or foreign. It blocks: for threads."""

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from secrets import randbits

from async_cache.l2.filesystem.files import OpenFile, open_file
from async_cache.l2.filesystem.format import (
    MARKER,
    MARKER_LINE,
    RECORD_BYTES,
    VERSION,
    header_version,
    is_of_version_1,
    marker_version,
    parse_index,
    parse_segment,
)

_FOREIGN_AND_HARMLESS = ("lost+found",)


class Foreign(Exception):
    """The directory is not one of ours, or not of this version: it is left alone."""


def check_marker(directory: int, path: str, names: Sequence[str], *, fsync: bool) -> None:
    """See that the open directory of a path, with these names, is a store; an empty one becomes one.

    Raises Foreign or OSError.
    """
    try:
        file = open_file(directory, MARKER, os.O_RDONLY)
        line = os.pread(file.fd, 100, 0)
    except FileNotFoundError:
        _found(directory, path, names, fsync=fsync)
        return
    version = marker_version(line)
    if version is None:
        raise Foreign(f"its file {MARKER} is not that of a store")
    if version != VERSION:
        raise Foreign(f"it is a store of version {version}, and this is version {VERSION}: it needs another directory")


def _found(directory: int, path: str, names: Sequence[str], *, fsync: bool) -> None:
    """Make a store of an empty directory, or of one that lost its marker and has nothing but our files."""
    names = [name for name in names if not name.startswith(".") and name not in _FOREIGN_AND_HARMLESS]
    names = [name for name in names if parse_index(name) is None and parse_segment(name) is None]
    if any(map(is_of_version_1, names)):
        empty = f"find {shlex.quote(path)} -maxdepth 1 -name '*.kv' -delete"
        raise Foreign(f"it holds files of version 1, which are not read any more: name another directory, or `{empty}`")
    if names:
        raise Foreign(f"it is not empty, and no store: it holds {min(names)!r}")
    for name in filter(parse_index, os.listdir(directory)):
        version = _version_of(directory, name)
        if version not in (None, VERSION):
            raise Foreign(f"its index {name} is of version {version}, and this is version {VERSION}")
    if fsync:
        _sync_parent(directory)
    temporary = f".{MARKER}.{randbits(64):016x}"
    file = open_file(directory, temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        line = MARKER_LINE % VERSION
        while line:
            line = line[os.write(file.fd, line) :]
        os.fsync(file.fd)
        os.rename(temporary, MARKER, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)  # whatever else survives a power failure, it does not without the marker
    except OSError:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise


def _sync_parent(directory: int) -> None:
    """Have the directory itself survive a power failure."""
    parent = OpenFile(os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory))
    os.fsync(parent.fd)


def _version_of(directory: int, name: str) -> int | None:
    """The version that an index file says; None if it says none."""
    parsed = parse_index(name)
    file = open_file(directory, name, os.O_RDONLY)
    return header_version(os.pread(file.fd, RECORD_BYTES, 0), parsed[0]) if parsed is not None else None
