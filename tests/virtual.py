"""Tests that run in virtual time."""

from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

from async_cache.testing.virtual import run_virtual


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in virtual time."""

    @wraps(test)
    def run(**arguments: Any) -> None:
        run_virtual(test(**arguments))

    return run
