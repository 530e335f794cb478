"""The suite for backends, against a server of S3, a directory and memory."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import LocalStore, MemoryStore

from async_cache.l2.backend import Backend
from async_cache.l2.object_store.backend import ObjectStoreBackend
from async_cache.l2.urls.registry import from_url
from async_cache.prompt.keys import ObjectKey
from async_cache.testing.conformance import BackendSuite

from .support import BUCKET, Server

numbers = itertools.count()


class Suite(BackendSuite):
    """What is the same for all stores: an object is damaged by another client."""

    client: Any
    path: Callable[[ObjectKey], str]

    async def damage(self, backend: Backend, key: ObjectKey, bit: int) -> None:
        path = self.path(key)
        record = bytearray(bytes(obstore.get(self.client, path).bytes()))
        record[bit // 8] ^= 1 << bit % 8
        obstore.put(self.client, path, bytes(record))


def name(key: ObjectKey) -> str:
    hexadecimal = key.chunk_hash.hex()
    return f"{hexadecimal[:4]}/{hexadecimal}.{key.rank}.{key.group}.kv"


class TestMemory(Suite):
    async def make(self, tmp_path: Path) -> Backend:
        self.client = MemoryStore()
        self.path = name
        return ObjectStoreBackend("memory store", lambda _: self.client)


class TestDirectory(Suite):
    async def make(self, tmp_path: Path) -> Backend:
        self.client = LocalStore(tmp_path)
        self.path = lambda key: f"a/b/{name(key)}"
        return ObjectStoreBackend("directory", lambda _: self.client, prefix="a/b", concurrency=4)


class TestServer(Suite):
    @pytest.fixture(autouse=True)
    def its_server(self, server: Server) -> None:
        self.server = server

    async def make(self, tmp_path: Path) -> Backend:
        prefix = f"suite-{next(numbers)}"
        backend = self.server.backend(prefix, part="5MiB", lookup_timeout=20)
        self.client = backend._connect(20)
        self.path = lambda key: f"{prefix}/{name(key)}"
        return backend

    async def make_unreadable(self, backend: Backend, key: ObjectKey) -> None:
        path = f"/{BUCKET}/{self.path(key)}"
        self.server.faults({"request": f"GET {path}", "times": 1, "status": 403, "code": "InvalidObjectState"})


class TestGoogle(Suite):
    """The client of Google's service, whose XML interface is that of S3 for all that is asked here."""

    @pytest.fixture(autouse=True)
    def its_server(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = server
        monkeypatch.setenv(
            "GOOGLE_SERVICE_ACCOUNT_KEY",
            '{"disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""}',
        )

    async def make(self, tmp_path: Path) -> Backend:
        prefix = f"google-{next(numbers)}"
        parameters = f"endpoint={self.server.endpoint}&allow_http=true&lookup_timeout=20&part=5MiB"
        backend = from_url(f"gs://{BUCKET}/{prefix}?{parameters}")
        assert isinstance(backend, ObjectStoreBackend)
        self.client = backend._connect(20)
        self.path = lambda key: f"{prefix}/{name(key)}"
        return backend
