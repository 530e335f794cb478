"""Where something was opened: an event loop, and the thread that runs it."""

import asyncio
import os
import weakref
from threading import get_ident

_homes: "weakref.WeakSet[Home]" = weakref.WeakSet()


def _leave() -> None:
    """In a forked child no thread runs the loop of its parent, though one has the ident of the thread that does."""
    for home in _homes:
        home._thread, home._is_left = None, True


os.register_at_fork(after_in_child=_leave)


class Home:
    """The loop that runs where this is made."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._thread: int | None = get_ident()
        self._is_left = False
        _homes.add(self)

    def is_elsewhere(self) -> bool:
        """Whether another loop runs where this is asked, or this is a forked child of the process of the loop.

        At home it makes no system call. To ask for the running loop makes one up to Python 3.11 (getpid), and this is
        asked several times for each request.
        """
        if get_ident() == self._thread and self.loop.is_running():
            return False
        return self._is_left or asyncio._get_running_loop() not in (self.loop, None)

    def refusal(self, what: str) -> RuntimeError:
        """What to raise where somebody elsewhere calls what was opened here."""
        if self._is_left:
            return RuntimeError(f"the {what} was opened before a fork: open another one in the child")
        return RuntimeError(f"the {what} was opened in another event loop: call it from there")
