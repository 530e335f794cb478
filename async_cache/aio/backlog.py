"""Work on very many items that need not be done at once: so much of it in each turn of the loop."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

FEW = 256  # items are worked on at once, whatever waits in this turn


class Backlog:
    """What is still to be done, in the order in which it was given: the first `at_once` items of a turn without delay.

    Whoever cannot wait for it does some of it, or all, himself.
    """

    def __init__(self, at_once: int):
        self._at_once = self._left = at_once  # items in this turn
        self.waiting: deque[tuple[Callable[[Sequence[Any]], object], Sequence[Any], int]] = deque()
        """Work, its items, and how many of these are done: to look whether there is some."""
        self._comes_again = False  # in the loop's next turn
        self.given = 0
        """How many items had to wait so far."""
        self._done = 0  # those of them that are done

    def __bool__(self) -> bool:
        return bool(self.waiting)

    def do(self, work: Callable[[Sequence[Any]], object], items: Sequence[Any]) -> None:
        """Do work on items, in slices if they are many. It must not raise."""
        if len(items) <= FEW and not self.waiting:
            work(items)
            return
        self.waiting.append((work, items, 0))
        self.given += len(items)
        while self.waiting and self._left > 0:
            self._left -= self.do_some(self._left)
        self._come_again()

    def do_ahead(self, work: Callable[[Sequence[Any]], object], items: Sequence[Any]) -> None:
        """Do work on items as `do`, but if they are few, at once and ahead of all that waits."""
        if len(items) <= FEW:
            work(items)
        else:
            self.do(work, items)

    def do_some(self, count: int | None = None) -> int:
        """Do work on up to so many of the items that wait, as in a turn if None, and say how many these were."""
        work, items, begin = self.waiting.popleft()
        end = min(begin + (count if count is not None else self._at_once), len(items))
        if end < len(items):
            self.waiting.appendleft((work, items, end))
        self._done += end - begin
        work(items[begin:end])
        return end - begin

    def do_all(self) -> None:
        """Do all that waits."""
        while self.waiting:
            self.do_some()

    def has_done(self, given: int) -> bool:
        """Whether all is done that was given when `given` was so many."""
        return self._done >= given

    async def done(self) -> None:
        """Return when nothing waits any more of what was given before."""
        given = self.given
        while not self.has_done(given):  # noqa: ASYNC110 (each turn does some of it)
            await asyncio.sleep(0)

    def _come_again(self) -> None:
        if not self._comes_again:
            self._comes_again = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._comes_again = False
        self._left = self._at_once
        while self.waiting and self._left > 0:
            self._left -= self.do_some(self._left)
        if self.waiting:
            self._come_again()
