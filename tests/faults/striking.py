"""Loops that count their callbacks, and strike after the nth: so whatever is under way is hit at each of its awaits."""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any

import async_solipsism
import uvloop

Blow = Callable[["asyncio.Task[Any]"], object]
"""Is called with the task that does the work, between two steps of the loop."""


class Striking(asyncio.AbstractEventLoop):
    """A loop that strikes after so many callbacks."""

    _left = 0

    def strike_after(self, steps: int, strike: Callable[[], object]) -> None:
        self._left, self._strike = steps, strike

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> Any:
        return super().call_soon(self._step, callback, *args, context=context)

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Context | None = None) -> Any:
        return super().call_soon_threadsafe(self._step, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> Any:
        return super().call_at(when, self._step, callback, *args, context=context)

    def _step(self, callback: Any, *args: Any) -> None:
        callback(*args)
        if self._left:
            self._left -= 1
            if not self._left:
                self._strike()


class VirtualLoop(Striking, async_solipsism.EventLoop):
    pass


class RealLoop(Striking, uvloop.Loop):
    pass


class PlainLoop(Striking, asyncio.SelectorEventLoop):
    pass


async def strike(work: Coroutine[Any, Any, Any], steps: int, blow: Blow) -> "tuple[asyncio.Task[Any], bool]":
    """Do the work, and strike after so many steps: the task that did it, and whether it was not done by then."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Striking)
    task, struck = loop.create_task(work), False

    def fall() -> None:
        nonlocal struck
        struck = not task.done()
        blow(task)

    loop.strike_after(steps, fall)
    await asyncio.wait((task,), timeout=60)
    loop.strike_after(0, fall)
    assert task.done()
    return task, struck


def cancel_again_and_again(task: "asyncio.Task[Any]") -> None:
    """A blow: cancel, at every step until the task has ended."""
    if task.cancel():
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Striking)
        loop.strike_after(1, lambda: cancel_again_and_again(task))
