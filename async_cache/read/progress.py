"""What a call has loaded while it goes on: noted by whichever thread, and told the loop as long as somebody watches."""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

_TOLD_AT_ONCE = 256  # objects, in a millisecond or so; then the loop has its turn


class Watchers:
    """How many there are who want to know of single chunks, and not only of whole calls."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Progress:
    """The objects of one call that are loaded, by their numbers in it; `told` gets those that it was not told before.

    To note one costs next to nothing. The loop is woken only where there are watchers: who becomes the first one has
    it `tell` what was noted until then.
    """

    __slots__ = ("_is_woken", "_loaded", "_loop", "_told", "_watchers")

    def __init__(self, watchers: Watchers, told: Callable[[list[int]], object]):
        self._watchers = watchers
        self._told = told
        self._loaded: deque[int] = deque()
        self._is_woken = False
        self._loop = asyncio.get_running_loop()

    def loaded(self, number: int) -> None:
        """Note an object, in whatever thread."""
        self._loaded.append(number)  # before it looks: who begins to watch looks after that
        if self._watchers.count and not self._is_woken:
            self._is_woken = True
            with suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self.tell)

    def tell(self) -> None:
        """Tell what is loaded by now, of very many some in each turn of the loop."""
        self._is_woken = False  # before it looks: what is noted from here on wakes it again
        loaded = self._loaded
        numbers = [loaded.popleft() for _ in range(min(len(loaded), _TOLD_AT_ONCE))]
        if loaded and not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self.tell)
        if numbers:
            self._told(numbers)
