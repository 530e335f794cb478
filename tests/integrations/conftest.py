from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.integrations.support import Served, served


@pytest.fixture
def server() -> Iterator[Served]:
    with TemporaryDirectory() as name, served(Path(name)) as server:  # a socket's path must be short
        yield server
