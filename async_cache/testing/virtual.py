"""Virtual time: a test of an hour's worth of deadlines ends in milliseconds. Needs `async-kv-cache[testing]`."""

import asyncio
import warnings
from collections.abc import Coroutine
from typing import Any, TypeVar

try:
    import async_solipsism
except ModuleNotFoundError as error:
    raise ImportError("virtual time needs async-solipsism: pip install 'async-kv-cache[testing]'") from error

T = TypeVar("T")


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on a loop of its own, whose clock jumps to the next deadline, and return its result.

    The clock starts at 0 and moves only when every task waits. Tasks that are left at the end are cancelled.
    There are no threads and no real sockets here. Raises `async_solipsism.SleepForeverError` where all tasks
    wait for what no timer will bring: a test that would hang fails at once.
    """
    with warnings.catch_warnings(), asyncio.Runner(loop_factory=async_solipsism.EventLoop) as runner:
        # A deadline that is a rounding error away is due now; that is nothing to warn of.
        warnings.simplefilter("ignore", async_solipsism.ResolutionWarning)
        return runner.run(main)
