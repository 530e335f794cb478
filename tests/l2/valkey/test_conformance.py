"""The suite for backends, against real servers: over TCP, a Unix socket, TLS, and a cluster; in both event loops."""

from pathlib import Path

import pytest

from async_cache.l2.backend import Backend
from async_cache.l2.urls.registry import from_url
from async_cache.l2.valkey.names import Names, slot_of
from async_cache.prompt.keys import ObjectKey
from async_cache.testing.conformance import BackendSuite

from .certificates import Certificates
from .servers import Cluster, Server


class ValkeySuite(BackendSuite):
    """The suite with servers that are emptied before each test."""

    servers: list[Server]
    url: str
    database = 0

    async def make(self, tmp_path: Path) -> Backend:
        for server in self.servers:
            await server.say("FLUSHALL")
        return from_url(self.url)

    async def damage(self, backend: Backend, key: ObjectKey, bit: int) -> None:
        await self.server_of(key).flip_bit(Names("akv").of(key), bit, self.database)

    def server_of(self, key: ObjectKey) -> Server:
        return self.servers[0]


class TestTCP(ValkeySuite):
    @pytest.fixture(autouse=True)
    def _use(self, tcp: Server) -> None:
        self.servers, self.url = [tcp], f"valkey://127.0.0.1:{tcp.port}"


class TestUnixSocket(ValkeySuite):
    database = 3

    @pytest.fixture(autouse=True)
    def _use(self, tcp: Server) -> None:
        self.servers, self.url = [tcp], f"redis+unix://{tcp.directory}/socket?db=3"


class TestTLS(ValkeySuite):
    database = 2

    @pytest.fixture(autouse=True)
    def _use(self, tls: Server, certificates: Certificates) -> None:
        self.servers, self.url = [tls], f"rediss://:secret@127.0.0.1:{tls.tls_port}/2?{certificates.parameters}"


class TestCluster(ValkeySuite):
    @pytest.fixture(autouse=True)
    def _use(self, cluster: Cluster) -> None:
        self.cluster, self.servers, self.url = cluster, cluster.masters, f"valkey+cluster://{cluster.hosts}"

    def server_of(self, key: ObjectKey) -> Server:
        return self.cluster.master_of(slot_of(key))
