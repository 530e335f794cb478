"""A file that stays within its bound, with those that were full before it: `FILE`, `FILE.1.gz`, `FILE.2.gz` ..."""

import fcntl
import gzip
import os
import shutil
from contextlib import suppress
from pathlib import Path

from async_cache.aio.forks import keep_from_children
from async_cache.errors import ConfigError

_PARTS = 8  # of the bound: that much is a file that is full, as it is and, for a while, compressed as well
_BEGINNING_BYTES = 4096


class RotatedFile:
    """Lines in a file of our own, which is compressed when it is full; the oldest go, so that all keep to the bound.

    Every method blocks, and raises OSError. What was written of a line that failed is taken back before the next.
    """

    def __init__(self, path: Path, most_bytes: int, header: bytes):
        """Begin the file anew: one that is there is kept as full. Raises ConfigError for what is none of ours.

        `header`: its first line, whose beginning, up to the first comma, says what is ours.
        """
        self.path, self.most_bytes, self._header = path, most_bytes, header
        self._descriptor, self._size, self._is_torn = -1, 0, False
        keep_from_children(self)
        self._lock()
        try:
            self._partial().unlink(missing_ok=True)
            self._begin()
        except BaseException:
            self.close()
            raise

    @property
    def used_bytes(self) -> int:
        """What it takes, with those before it."""
        return self._size + sum(size for _, size in self._full())

    def write(self, lines: bytes) -> None:
        """Add lines."""
        if not self._is_in_place():
            self._lock()
            self._begin()
        if self._is_torn:
            os.ftruncate(self._descriptor, self._size)
            self._is_torn = False
        if self._size > len(self._header) and self._size + len(lines) > self.most_bytes // _PARTS:
            self._begin()
        self._append(lines)

    def descriptors(self) -> list[int]:
        """The descriptor of the file that is locked, as long as it is open."""
        return [self._descriptor]

    def close(self) -> None:
        """Let others record there."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, data: bytes) -> None:
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._descriptor, data[written:], self._size + written)
        except OSError:
            self._is_torn = True
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
                self._is_torn = False
            raise
        self._size += len(data)

    def _is_in_place(self) -> bool:
        """Whether nobody has removed it, or taken it away."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._descriptor))
        except OSError:
            return False

    def _lock(self) -> None:
        """Open the file that has the name now, for this process alone."""
        self.close()
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ConfigError(f"another process records to {self.path}") from error

    def _begin(self) -> None:
        """Keep what is there as full, and begin with the header again, in the same file: so it stays locked."""
        beginning = os.pread(self._descriptor, _BEGINNING_BYTES, 0)
        if beginning:
            if not beginning.startswith(self._header.partition(b",")[0]):
                raise ConfigError(f"{self.path} is there, and is no trace")
            self._compress()
        os.ftruncate(self._descriptor, 0)
        self._size = 0
        self._append(self._header)

    def _compress(self) -> None:
        """Make it the newest of those that are full."""
        self._make_room()
        partial = self._partial()
        opened = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(opened, "wb") as raw, self.path.open("rb") as full, gzip.GzipFile("", "wb", 6, raw) as compressed:
            shutil.copyfileobj(full, compressed, 2**20)
        for number, _ in reversed(self._full()):
            self._of(number).rename(self._of(number + 1))
        partial.rename(self._of(1))

    def _make_room(self) -> None:
        """Remove the oldest of those that are full, so that there is room for one that is, compressed, and the next."""
        full = self._full()
        size = os.fstat(self._descriptor).st_size
        while full and sum(size for _, size in full) + 2 * size + self.most_bytes // _PARTS > self.most_bytes:
            self._of(full.pop()[0]).unlink(missing_ok=True)

    def _full(self) -> list[tuple[int, int]]:
        """The number and the size of each file that is full, the newest first."""
        sizes: list[tuple[int, int]] = []
        while True:
            try:
                sizes.append((len(sizes) + 1, self._of(len(sizes) + 1).stat().st_size))
            except FileNotFoundError:
                return sizes

    def _of(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}.gz")

    def _partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")
