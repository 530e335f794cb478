"""The suite that admits a backend, and what a user of it does."""

import asyncio
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from kv_sqlite import SQLiteBackend

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, ObjectKey
from async_cache.l2 import Backend, record
from async_cache.testing.conformance import BackendSuite


class TestSQLite(BackendSuite):
    async def make(self, tmp_path: Path) -> SQLiteBackend:
        return SQLiteBackend(str(tmp_path / "kv.db"))

    async def damage(self, backend: Backend, key: ObjectKey, bit: int) -> None:
        assert isinstance(backend, SQLiteBackend)

        def flip() -> None:
            select, update = "SELECT body FROM objects WHERE name = ?", "UPDATE objects SET body = ? WHERE name = ?"
            body = bytearray(backend._db.execute(select, (record.file_name(key),)).fetchone()[0])
            body[bit // 8] ^= 1 << bit % 8
            backend._db.execute(update, (body, record.file_name(key)))

        await asyncio.to_thread(flip)

    async def make_unreadable(self, backend: Backend, key: ObjectKey) -> None:
        assert isinstance(backend, SQLiteBackend)
        backend._db = BadRow(backend._db, record.file_name(key))  # type: ignore[assignment]


class BadRow:
    """A database of which one row cannot be read until another one takes its place."""

    def __init__(self, db: sqlite3.Connection, name: str):
        self._db, self._name = db, name

    def execute(self, statement: str, row: Sequence[Any]) -> sqlite3.Cursor:
        if row[0] == self._name and statement.startswith("SELECT"):
            raise sqlite3.DatabaseError("database disk image is malformed")
        if row[0] == self._name and "OR REPLACE" in statement:
            self._name = ""
        return self._db.execute(statement, row)

    def close(self) -> None:
        self._db.close()


async def test_it_is_found_by_its_scheme(tmp_path: Path) -> None:
    layout = ModelLayout("toy", (ObjectGroup((4,), "uint8"),), chunk_tokens=4)
    config = CacheConfig(l1_bytes=2**20, l2=[f"sqlite://{tmp_path}/kv.db"])
    async with AsyncCache(config) as cache:
        async with cache.store(layout.prompt(range(8))) as writer:
            for chunk in writer:
                (view,) = filter(None, chunk.views)
                view[:] = b"abcd"
                chunk.commit()
        await cache.flush()
    async with AsyncCache(config) as cache:
        assert (await cache.lookup(layout.prompt(range(8)))).l2_chunks == 2


async def test_a_database_that_cannot_be_opened_leaves_nothing_behind(tmp_path: Path) -> None:
    backend = SQLiteBackend(str(tmp_path))  # a directory
    with pytest.raises(sqlite3.OperationalError):
        await backend.open()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(backend.name)]
    await backend.close()
