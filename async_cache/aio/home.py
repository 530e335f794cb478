"""Where something was opened: an event loop, and the thread that runs it."""

import asyncio
from threading import get_ident

from async_cache.aio.forks import process


class Home:
    """The loop that runs where this is made."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._thread, self._process = get_ident(), process()

    def is_elsewhere(self) -> bool:
        """Whether the loop runs in another thread, or another one here, or this is a forked child of its process.

        At home it makes no system call. To ask for the running loop makes one up to Python 3.11 (getpid), and this is
        asked several times for each request.
        """
        if self._process is not process():  # though a thread of the child has the ident of the one that ran the loop
            return True
        if get_ident() == self._thread and self.loop.is_running():
            return False
        here = asyncio._get_running_loop()
        return here is not self.loop and (here is not None or self.loop.is_running())

    def refusal(self, what: str) -> RuntimeError:
        """What to raise where somebody elsewhere calls what was opened here."""
        if self._process is not process():
            return RuntimeError(f"the {what} was opened before a fork: open another one in the child")
        if self.loop.is_closed():
            return RuntimeError(f"the {what} was opened in an event loop that was closed meanwhile: open another one")
        return RuntimeError(f"the {what} was opened in another event loop: call it from there")
