"""The garbage collector of a server process: it never looks at very much in one step.

A full collection looks at all that there is, in one step: at a hundred thousand requests that nobody has read yet, for
a tenth of a second. So where it has taken more than some milliseconds, all later ones leave out what it found alive.
What becomes garbage later is freed by its last reference, and what a client makes the server keep is in no cycle when
it goes (`tests/server/test_garbage.py`). For other cycles, such as errors that know where they were raised, all is
looked at again now and then, unless it is very much just then.
"""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

_THRESHOLDS = 700, 5, 1  # of the three generations: those that are new to a full collection are some 8,000
_LONG_SECONDS = 0.002  # of computing
_OLDEST = 2
AGAIN_SECONDS = 600.0
MOST_AGAIN = 150_000
"""Objects that are looked at again, for some tens of milliseconds; what a server has imported is a third of that."""


@asynccontextmanager
async def collecting_briefly() -> AsyncIterator[None]:
    """Have the collector of this process work so within the block: what is there now is not looked at any more."""
    before, told = gc.get_threshold(), Collections(time.thread_time)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
    gc.callbacks.append(told)
    again = asyncio.create_task(_look_again())
    try:
        yield
    finally:
        again.cancel()
        gc.callbacks.remove(told)
        gc.set_threshold(*before)


async def _look_again() -> None:
    while True:
        await asyncio.sleep(AGAIN_SECONDS)
        if gc.get_freeze_count() <= MOST_AGAIN:
            gc.unfreeze()
            gc.collect()
            gc.freeze()


class Collections:
    """What the collector tells of its collections."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._began = 0.0

    def __call__(self, phase: str, info: dict[str, Any]) -> None:
        """A collection begins, or is over, in any thread."""
        if info["generation"] != _OLDEST:
            return
        # How much there is must not be asked: `gc.get_objects` breaks what another thread is just making.
        if phase == "start":
            self._began = self._clock()
        elif self._clock() - self._began > _LONG_SECONDS:
            gc.freeze()
