"""A plugin of pytest: `pytest_plugins = ["async_cache.testing.plugin"]`. Needs `async-kv-cache[testing]`."""

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from async_cache.testing.virtual import run_virtual


@pytest.fixture
def virtual_time() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs a coroutine on a loop of its own, whose clock jumps to the next deadline, and returns its result.

    So a scheduler's time-outs, queues and back-offs are tested in milliseconds, and always in the same order. As
    `run_virtual`, it has no threads and no sockets: a cache in it has `memory://`, or a backend of this package.
    """
    return run_virtual
