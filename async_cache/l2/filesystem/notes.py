"""Notes beside the objects: one small file each, in a directory of their own. All of it blocks: it is for threads."""

import os
from contextlib import suppress
from threading import Lock

from async_cache.l2.filesystem.files import names_in
from async_cache.l2.filesystem.format import PAGE_BYTES, begun_name, pages

DIRECTORY = ".notes"
"""Where they are, in the directory of the store."""
MOST_BYTES = 16 * 2**20
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC


class Notes:
    """The notes of the store that is open at `directory`; what is begun has the name of its `writer`."""

    def __init__(self, directory: int, writer: int):
        self._directory, self._begun = directory, _path(begun_name(writer))
        self._pages: dict[str, int] = {}  # of each, as far as is known
        self._counting = Lock()  # several threads do
        self._counted_at = -1  # the time that the directory had
        self.room_bytes = 0
        """What they take on the disk. What others wrote counts since `count` was called."""

    def count(self) -> None:
        """Find out what all of them take, if that may have changed, and can be found out."""
        with self._counting, suppress(OSError):
            changed_at = os.stat(DIRECTORY, dir_fd=self._directory).st_mtime_ns
            if changed_at != self._counted_at:
                counted: dict[str, int] = {}
                for name in names_in(self._directory, DIRECTORY):
                    with suppress(FileNotFoundError):
                        counted[name] = pages(os.lstat(_path(name), dir_fd=self._directory).st_size)
                self._pages, self._counted_at = counted, changed_at
                self._add_up()

    def _add_up(self) -> None:
        self.room_bytes = sum(self._pages.values()) * PAGE_BYTES

    def room_with(self, name: str, size_bytes: int) -> int:
        """What all of them would take, in bytes, with one of this name and size."""
        return self.room_bytes + (pages(size_bytes) - self._pages.get(name, 0)) * PAGE_BYTES

    def read_all(self) -> dict[str, bytes]:
        """All notes, by their names. What cannot be read is left out. Raises OSError."""
        notes: dict[str, bytes] = {}
        for name in names_in(self._directory, DIRECTORY):
            if name.isalnum():
                with suppress(OSError):
                    notes[name] = self._content(name)
        return notes

    def read(self, name: str) -> bytes | None:
        """The note of that name; None if there is none. Raises OSError."""
        try:
            return self._content(name)
        except FileNotFoundError:
            return None

    def _content(self, name: str) -> bytes:
        fd = os.open(_path(name), _SAFE | os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._directory)
        with os.fdopen(fd, "rb") as file:
            return file.read(MOST_BYTES)

    def write(self, name: str, note: bytes | None) -> None:
        """Have a note of this name, whole or as it was before; None: have none. Raises OSError."""
        if note is None:
            with suppress(FileNotFoundError):
                os.unlink(_path(name), dir_fd=self._directory)
        else:
            self._write(name, note)
        with self._counting:
            self._pages[name] = pages(len(note)) if note is not None else 0
            self._add_up()

    def _write(self, name: str, note: bytes) -> None:
        with suppress(FileExistsError):
            os.mkdir(DIRECTORY, 0o700, dir_fd=self._directory)
        flags = _SAFE | os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            with os.fdopen(os.open(self._begun, flags, 0o600, dir_fd=self._directory), "wb") as file:
                file.write(note)
                file.flush()
                os.fsync(file.fileno())
            os.rename(self._begun, _path(name), src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except BaseException:
            with suppress(OSError):
                os.unlink(self._begun, dir_fd=self._directory)
            raise


def _path(name: str) -> str:
    return f"{DIRECTORY}/{name}"
