"""The contract tests run against the embedded cache, and against a served one in three ways.

They run in virtual time: an hour passes at once where all tasks wait, and waiting for ever fails.
"""

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import async_solipsism
import pytest

from . import support

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_time: run on an ordinary event loop")
    config.addinivalue_line("markers", "embedded: of the embedded cache only")
    config.addinivalue_line("markers", "memory: of a cache whose memory is seen")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            # A deadline that is a rounding error away is due now; that is nothing to warn of.
            item.add_marker(pytest.mark.filterwarnings("ignore::async_solipsism.ResolutionWarning"))


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.get_closest_marker("real_time"):
        return {"real": asyncio.new_event_loop}
    return {"virtual": async_solipsism.EventLoop}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not inspect.iscoroutinefunction(metafunc.function) or metafunc.definition.get_closest_marker("embedded"):
        return
    kinds = [
        k for k in support.KINDS if k in support.SEE_MEMORY or not metafunc.definition.get_closest_marker("memory")
    ]
    metafunc.parametrize("cache_kind", kinds, indirect=True)


@pytest.fixture(autouse=True)
def cache_kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """What `open_cache` opens."""
    support.kind = getattr(request, "param", "embedded")
    yield support.kind
    support.kind = "embedded"
