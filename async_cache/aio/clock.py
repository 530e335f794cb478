"""The loop's clock, to the microsecond."""

import asyncio
import time
from collections.abc import Callable

_SAME_SECONDS = 10.0  # the loop may have been held for a while


def precise_clock(loop: asyncio.AbstractEventLoop) -> Callable[[], float]:
    """A clock that agrees with `loop.time`, and does not stand still between the turns of the loop, as uvloop's does.

    Where the loop's clock is not the machine's, as in tests that move it, it is the loop's own.
    """
    is_the_machines = abs(loop.time() - time.monotonic()) < _SAME_SECONDS
    return time.monotonic if is_the_machines else loop.time
