"""What a directory is: a store of this version, an empty one that becomes one, or foreign. It blocks: for threads."""

import os
from collections.abc import Sequence
from contextlib import suppress
from secrets import randbits

from async_cache.l2.filesystem.files import OpenFile, open_file
from async_cache.l2.filesystem.format import MARKER, MARKER_LINE, VERSION, marker_version, parse_index, parse_segment

_FOREIGN_AND_HARMLESS = ("lost+found",)


class Foreign(Exception):
    """The directory is not one of ours, or not of this version: it is left alone."""


def check_marker(directory: int, names: Sequence[str], *, fsync: bool) -> None:
    """See that an open directory with these names is a store; an empty one becomes one. Raises Foreign or OSError."""
    try:
        file = open_file(directory, MARKER, os.O_RDONLY)
        line = os.pread(file.fd, 100, 0)
    except FileNotFoundError:
        _found(directory, names, fsync=fsync)
        return
    version = marker_version(line)
    if version is None:
        raise Foreign(f"its file {MARKER} is not that of a store")
    if version != VERSION:
        raise Foreign(f"it is a store of version {version}, and this is version {VERSION}: it needs another directory")


def _found(directory: int, names: Sequence[str], *, fsync: bool) -> None:
    """Make a store of an empty directory, or of one that lost its marker and has nothing but our files."""
    names = [name for name in names if not name.startswith(".") and name not in _FOREIGN_AND_HARMLESS]
    names = [name for name in names if parse_index(name) is None and parse_segment(name) is None]
    if any(name.endswith(".kv") for name in names):
        raise Foreign("it holds files of version 1, *.kv, which are not read any more: remove them, or name another")
    if names:
        raise Foreign(f"it is not empty, and no store: it holds {min(names)!r}")
    if fsync:
        _sync_parent(directory)
    temporary = f".{MARKER}.{randbits(64):016x}"
    file = open_file(directory, temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        os.write(file.fd, MARKER_LINE % VERSION)
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
