"""The contract tests run in virtual time: an hour passes at once where all tasks wait, and waiting for ever fails."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import async_solipsism
import pytest

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_time: run on an ordinary event loop")


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
