"""Servers that the tests of a module share, and both event loops."""

import asyncio
from collections.abc import Callable, Iterator

import pytest
import uvloop

from .certificates import Certificates
from .servers import Cluster, Server, free_port, redis_binary, running, running_cluster


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """uvloop, which a server runs on; the suite runs in asyncio's own loop as well."""
    both = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}
    return both if item.path.name == "test_conformance.py" else {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="module")
def tcp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server, also at a Unix socket."""
    directory = tmp_path_factory.mktemp("valkey")
    with running(directory, "--unixsocket", str(directory / "socket"), "--unixsocketperm", "700") as server:
        yield server


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[Server]:
    """An older server, of the other project, with TLS and a password."""
    options = ("--tls-port", str(free_port()), "--requirepass", "secret", *certificates.options)
    with running(tmp_path_factory.mktemp("redis"), *options, binary=redis_binary()) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three masters."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster
