"""An event loop, in virtual time, that runs what is ready in any order; the same seed makes the same schedule again.

asyncio runs ready callbacks first in, first out, and code may come to lean on that without knowing. Here nothing of it
is left: whatever is ready may be next, or may be left behind for long. Some seeds also stall: a timer comes due while
others wait for their turn, as it does where something holds the loop.
"""

import asyncio
import os
import random
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import async_solipsism
from soak import rounds

REPLAY = "INTERLEAVING_SEED"  # in the environment: run this seed alone


def seeds(quick: int, long: int) -> Iterable[int]:
    """Those to run: so many, or the one to be replayed."""
    return [int(os.environ[REPLAY])] if REPLAY in os.environ else range(rounds(quick, long))


class ShuffledLoop(async_solipsism.EventLoop):
    """`between` is called between any two callbacks; what it raises ends the run. `trace`, if it is a list, is told
    what ran, and when. `made` is the step in which a task was made."""

    def __init__(self, seed: int):
        super().__init__()
        self.random = random.Random(seed)
        self.between: Callable[[], None] = lambda: None
        self.trace: list[str] | None = None
        self.stalls = 0
        self.step = 0
        self.made: WeakKeyDictionary[asyncio.Future[Any], int] = WeakKeyDictionary()
        self.stalling = self.random.random() < 0.2
        self._ready = _AnyOrder(self)

    def create_task(self, *arguments: Any, **options: Any) -> Any:
        task = super().create_task(*arguments, **options)
        self.made[task] = self.step
        return task

    def _run_once(self) -> None:
        if self.stalling and self._ready and self._scheduled and self.random.random() < 0.02:
            self.stalls += 1
            self._selector.clock.advance(max(0, self._scheduled[0]._when - self.time()))
        super()._run_once()


class _AnyOrder(deque):  # type: ignore[type-arg]
    """The ready queue of a loop: takes from anywhere."""

    def __init__(self, loop: ShuffledLoop):
        super().__init__()
        self._loop = loop
        # 1: all are equal; 4: mostly the oldest, so that one may overtake by far; 1/4: mostly the newest.
        self._bias = loop.random.choice((1, 4, 0.25))

    def popleft(self) -> asyncio.Handle:
        self._loop.between()
        self._loop.step += 1
        self.rotate(-int(len(self) * self._loop.random.random() ** self._bias))
        handle: asyncio.Handle = super().popleft()
        if self._loop.trace is not None:
            self._loop.trace.append(f"{self._loop.time():.6f} {_what(handle)}")
        return handle


def _what(handle: asyncio.Handle) -> str:
    callback = handle._callback  # type: ignore[attr-defined]
    task = getattr(callback, "__self__", None)
    if isinstance(task, asyncio.Task):
        return str(getattr(task.get_coro(), "__qualname__", task))
    return getattr(callback, "__qualname__", type(callback).__name__)


def run(seed: int, main: Callable[[ShuffledLoop], Coroutine[Any, Any, Any]]) -> ShuffledLoop:
    """Run a coroutine to its end on a loop of this seed. What it raises says how to run it again."""
    with warnings.catch_warnings():
        # A deadline that is a rounding error away is due now; that is nothing to warn of.
        warnings.simplefilter("ignore", async_solipsism.ResolutionWarning)
        with asyncio.Runner(loop_factory=lambda: ShuffledLoop(seed)) as runner:
            loop = runner.get_loop()
            assert isinstance(loop, ShuffledLoop)
            try:
                runner.run(main(loop))
            except BaseException as error:
                error.add_note(f"{REPLAY}={seed} in the environment replays it")
                raise
            finally:
                loop.between = lambda: None
    return loop
