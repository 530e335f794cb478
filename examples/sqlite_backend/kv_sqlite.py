"""Objects in a SQLite database: a storage backend of its own package, found by its scheme `sqlite`."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Self, TypeVar

from xxhash import xxh3_64_intdigest

from async_cache import ConfigError, ObjectKey
from async_cache.l2 import Backend, BackendURL, BackendUsage, LoadOutcome
from async_cache.l2.record import TRAILER_BYTES, file_name, is_trailer, parse_name, write_trailer

T = TypeVar("T")


class SQLiteBackend(Backend):
    """The database at `path`, made if it is not there; this process alone writes to it. It has no bound."""

    def __init__(self, path: str):
        self.name, self._path, self._usage = f"sqlite://{path}", path, BackendUsage(0, 0, None)

    @classmethod
    def from_url(cls, url: BackendURL) -> Self:
        if url.netloc or not url.path.strip("/") or url.parameters():
            raise ConfigError("the form is sqlite:///path")
        return cls(url.path)

    async def open(self) -> None:
        self._thread = ThreadPoolExecutor(1, self.name)
        try:
            await self._run(self._open)
        except BaseException:
            self._thread.shutdown()  # its call has ended
            raise

    def _open(self) -> None:
        self._db = sqlite3.connect(self._path, isolation_level=None)  # each statement is a transaction
        self._db.execute("CREATE TABLE IF NOT EXISTS objects (name TEXT PRIMARY KEY, body BLOB, trailer BLOB)")
        count, size = self._db.execute("SELECT count(*), coalesce(sum(length(body)), 0) FROM objects").fetchone()
        self._usage = BackendUsage(count, size, None)

    async def _run(self, function: Callable[..., T], *arguments: object) -> T:
        """What a function returns, called in the thread. It has ended when this does, also where this is cancelled."""
        call = self._thread.submit(function, *arguments)
        try:
            return await asyncio.wrap_future(call)
        finally:
            while not call.done():  # cancelled, perhaps again: until the call has ended the buffers are its own
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.001)

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        sql = "SELECT 1 FROM objects WHERE name = ?"
        return await self._run(lambda: [bool(self._db.execute(sql, [file_name(key)]).fetchone()) for key in keys])

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """Nothing is ever evicted, so that nothing need be pinned."""

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        todo = list(zip(keys, buffers, strict=True))
        return await self._run(lambda: [self._load(*item) for item in todo])

    def _load(self, key: ObjectKey, buffer: memoryview) -> LoadOutcome:
        row = self._db.execute("SELECT body, trailer FROM objects WHERE name = ?", [file_name(key)]).fetchone()
        if row is None:
            return LoadOutcome.GONE
        body, trailer = row
        if len(body) != len(buffer) or not is_trailer(trailer, key, len(body), xxh3_64_intdigest(body)):
            self._delete([key])
            return LoadOutcome.CORRUPT
        buffer[:] = body
        return LoadOutcome.LOADED

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        todo = list(zip(keys, buffers, strict=True))
        return await self._run(lambda: [self._store(*item) for item in todo])

    def _store(self, key: ObjectKey, buffer: memoryview) -> bool:
        trailer = bytearray(TRAILER_BYTES)
        write_trailer(trailer, key, len(buffer), xxh3_64_intdigest(buffer))
        row = (file_name(key), buffer, trailer)
        added = self._db.execute("INSERT OR IGNORE INTO objects VALUES (?, ?, ?)", row).rowcount
        self._usage = BackendUsage(self._usage.objects + added, self._usage.used_bytes + added * len(buffer), None)
        return True

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        return len(await self._run(self._delete, keys))

    def _delete(self, keys: Sequence[ObjectKey]) -> list[int]:
        sql = "DELETE FROM objects WHERE name = ? RETURNING length(body)"
        sizes = [size for key in keys for (size,) in self._db.execute(sql, [file_name(key)])]
        self._usage = BackendUsage(self._usage.objects - len(sizes), self._usage.used_bytes - sum(sizes), None)
        return sizes

    async def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        for name, size in await self._run(lambda: list(self._db.execute("SELECT name, length(body) FROM objects"))):
            if (key := parse_name(name)) is not None:
                yield key, size

    def usage(self) -> BackendUsage:
        return self._usage

    async def close(self) -> None:
        with suppress(RuntimeError):  # of a thread that was ended before
            await self._run(lambda: self._db.close())
        self._thread.shutdown()
