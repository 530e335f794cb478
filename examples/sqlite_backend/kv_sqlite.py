"""Objects in a SQLite database: a storage backend of its own package, found by its scheme `sqlite`."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from typing import Self

from async_cache import ConfigError, ObjectKey
from async_cache.aio.ending import in_thread
from async_cache.l2 import Backend, BackendURL, BackendUsage, LoadOutcome
from async_cache.l2.record import file_name, is_whole, make_trailer, parse_name


class SQLiteBackend(Backend):
    """The database at `path`, made if it is not there; this process alone writes to it. It has no bound."""

    def __init__(self, path: str):
        self.name, self._path = f"sqlite://{path}", path
        self._sizes: dict[ObjectKey, int] = {}
        self._unreadable: set[ObjectKey] = set()
        self._turn = asyncio.Semaphore()

    @classmethod
    def from_url(cls, url: BackendURL) -> Self:
        if url.netloc or not url.path.strip("/") or url.parameters():
            raise ConfigError("the form is sqlite:///path")
        return cls(url.path)

    async def open(self) -> None:
        await in_thread(self._open)

    def _open(self) -> None:
        self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        self._db.execute("CREATE TABLE IF NOT EXISTS objects (name TEXT PRIMARY KEY, body BLOB, trailer BLOB)")
        found = [(parse_name(name), size) for name, size in self._db.execute("SELECT name, length(body) FROM objects")]
        self._sizes = {key: size for key, size in found if key is not None}

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        return [key in self._sizes for key in keys]

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """Nothing is ever evicted, so that nothing need be pinned."""

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        todo = list(zip(keys, buffers, strict=True))
        async with self._turn:  # one thread at a time
            return await in_thread(lambda: [self._load(*item) for item in todo])

    def _load(self, key: ObjectKey, buffer: memoryview) -> LoadOutcome:
        try:
            row = self._db.execute("SELECT body, trailer FROM objects WHERE name = ?", [file_name(key)]).fetchone()
        except sqlite3.DatabaseError:  # of this object alone, for all we know
            self._unreadable.add(key)
            return LoadOutcome.FAILED
        if row is None:
            return LoadOutcome.GONE
        if len(row[0]) != len(buffer) or not is_whole(key, *row):
            self._delete([key])
            return LoadOutcome.CORRUPT
        buffer[:] = row[0]
        return LoadOutcome.LOADED

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        todo = list(zip(keys, buffers, strict=True))
        async with self._turn:
            return await in_thread(lambda: [self._store(*item) for item in todo])

    def _store(self, key: ObjectKey, buffer: memoryview) -> bool:
        row = (file_name(key), buffer, make_trailer(key, buffer))
        other = "REPLACE" if key in self._unreadable else "IGNORE"
        if self._db.execute(f"INSERT OR {other} INTO objects VALUES (?, ?, ?)", row).rowcount:
            self._sizes[key] = len(buffer)
        self._unreadable.discard(key)
        return True

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        async with self._turn:
            return await in_thread(self._delete, keys)

    def _delete(self, keys: Sequence[ObjectKey]) -> int:
        self._db.executemany("DELETE FROM objects WHERE name = ?", [(file_name(key),) for key in keys])
        return sum(self._sizes.pop(key, None) is not None for key in keys)

    async def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        for item in list(self._sizes.items()):
            yield item

    def usage(self) -> BackendUsage:
        return BackendUsage(len(self._sizes), sum(self._sizes.values()), None)

    async def close(self) -> None:
        async with self._turn:
            if hasattr(self, "_db"):  # it could be opened
                self._db.close()
