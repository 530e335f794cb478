"""The server of these tests, and the credentials that its clients find."""

from collections.abc import Iterator

import pytest

from .support import CREDENTIALS, Server


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a user of S3, and nothing else of what the machine may have set."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def running_server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def server(running_server: Server) -> Iterator[Server]:
    """A server without faults, which the tests share: each has a prefix of its own."""
    running_server.faults()
    yield running_server
    running_server.faults()
