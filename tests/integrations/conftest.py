from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.integrations.support import Served, served

PAGED = "async_cache.integrations.paged"


@pytest.fixture
def server() -> Iterator[Served]:
    with TemporaryDirectory() as name, served(Path(name)) as server:  # a socket's path must be short
        yield server


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is a test's waits longer than one that serves: a busy machine is no reason to compute anew."""
    monkeypatch.setattr(f"{PAGED}.copies._RESERVE_SECONDS", 60.0)
    monkeypatch.setattr(f"{PAGED}.copies._LOAD_SECONDS", 60.0)
    monkeypatch.setattr(f"{PAGED}.scheduler._LOOKUP_SECONDS", 60.0)
