"""What was asked for more often of late stays, against what is new.

After Einziger, Friedman and Manes: "TinyLFU: a highly efficient cache admission policy", ACM Transactions on Storage
13, 2017: W-TinyLFU, with a window of one hundredth and a main part of two segments.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TypeVar

from async_cache.retention.leaves import Leafy, LeavesFirst
from async_cache.retention.ring import Ring
from async_cache.retention.sketch import Sketch
from async_cache.values import Removal

WINDOW_SHARE = 0.01
PROTECTED_SHARE = 0.8  # of what is not in the window

T = TypeVar("T", bound=Leafy)


class TinyLFU(LeavesFirst[T]):
    """A window for what is new; behind it, what is on probation and what was used there again."""

    def __init__(self) -> None:
        super().__init__()
        self._window: Ring[T] = Ring()
        self._probation: Ring[T] = Ring()
        self._protected: Ring[T] = Ring()
        self._in_window = self._in_protected = 0
        self._sketch = Sketch()

    def entered(self, item: T) -> Ring[T]:
        self._sketch.add(item.chunk_hash)
        self._in_window += 1
        return self._window

    def used(self, item: T) -> None:
        self._sketch.add(item.chunk_hash)
        if item.node.queue is not self._probation:
            self.move(item, item.node.queue)
            return
        self._in_protected += 1
        self.move(item, self._protected)
        while self._in_protected > PROTECTED_SHARE * (self.known - self._in_window):
            oldest = self._protected.oldest()
            if oldest is None:
                break
            self._in_protected -= 1
            self.move(oldest, self._probation)

    def candidates(self) -> Iterator[T]:
        """What is beyond the window's share comes out of it, against the first on probation: the rarer one goes."""
        while self._in_window > WINDOW_SHARE * self.known + 1:
            new, old = self._window.oldest(), self._probation.oldest()
            if new is None:
                break
            self._in_window -= 1
            self.move(new, self._probation)
            if old is not None and self._sketch.count(new.chunk_hash) <= self._sketch.count(old.chunk_hash):
                self._probation.use(new, old)
                break
            if old is None:
                continue
            break
        return chain(self._probation, self._window, self._protected)

    def learned(self) -> Iterator[bytes]:
        """The counts, however old, of all that was asked for."""
        yield self._sketch.content

    def recall(self, pieces: Iterable[bytes]) -> Iterator[None]:
        """Go on from these counts."""
        for piece in pieces:
            self._sketch.content = piece
            yield

    def gone(self, item: T, removal: Removal) -> None:
        self._in_window -= item.node.queue is self._window
        self._in_protected -= item.node.queue is self._protected
