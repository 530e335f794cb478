"""Time to live: what nobody comes back for expires, by one task that sleeps until the next deadline."""

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

log = logging.getLogger(__name__)

_EARLY_SECONDS = 0.001  # a timer may fire early: by half a millisecond on uvloop, by a rounding error elsewhere
_STALE = 256  # entries of a heap beyond those in use
_SWEPT_AT_ONCE = 256  # then the loop gets its turn


class Expiry(Generic[T]):
    """Items of one kind that expire, each a TTL after it was added or renewed.

    All have the same TTL, so that the order in which they were added is the order in which they expire: adding,
    renewing and discarding cost one step each, and a sweep looks at nothing but what is due. Whatever lives for another
    time belongs in an expiry of its own.
    """

    def __init__(self, ttl_seconds: float, expire: Callable[[T], None], wake_by: Callable[[float], None]):
        self.swept = 0
        """How many items have expired."""
        self._ttl_seconds = ttl_seconds
        self._expire = expire
        self._wake_by = wake_by
        self._clock = asyncio.get_running_loop().time
        self._deadlines: OrderedDict[T, float] = OrderedDict()

    def add(self, item: T) -> None:
        """Let an item expire a TTL from now, also one that was to expire earlier."""
        deadlines = self._deadlines
        first = not deadlines
        deadlines[item] = deadline = self._clock() + self._ttl_seconds
        if first:
            self._wake_by(deadline)
        else:
            deadlines.move_to_end(item)

    def live_for(self, ttl_seconds: float) -> None:
        """Let items live for another time from now on, also those that are there, as if it had always been so."""
        more, self._ttl_seconds = ttl_seconds - self._ttl_seconds, ttl_seconds
        for item in self._deadlines:
            self._deadlines[item] += more
        if (deadline := self._next()) is not None:
            self._wake_by(deadline)

    def discard(self, item: T) -> None:
        """Let an item not expire any more. It may be known or not."""
        self._deadlines.pop(item, None)

    def __contains__(self, item: T) -> bool:
        return item in self._deadlines

    def __iter__(self) -> Iterator[T]:
        return iter(self._deadlines)

    def __len__(self) -> int:
        return len(self._deadlines)

    def sweep(self, now: float, limit: int) -> float | None:
        """Expire up to `limit` items that are due; when the next one is, None if there is none."""
        for _ in range(limit):
            deadline = self._next()
            if deadline is None or deadline > now:
                break
            item, _ = self._deadlines.popitem(last=False)
            self.swept += 1
            self._expire(item)
        return self._next()

    def _next(self) -> float | None:
        return next(iter(self._deadlines.values()), None)

    def __repr__(self) -> str:
        return f"<Expiry, {len(self)} items that live {self._ttl_seconds} s, {self.swept} swept>"


class Deadlines(Generic[T]):
    """Items that expire each at a time of its own. Setting and discarding cost O(log n)."""

    def __init__(self, expire: Callable[[T], None], wake_by: Callable[[float], None]):
        self._expire = expire
        self._wake_by = wake_by
        self._times: dict[T, float] = {}
        self._heap: list[tuple[float, int, T]] = []
        self._numbers = count()

    def set(self, item: T, at: float) -> None:
        """Let an item expire at this time of the loop's clock, and at no other."""
        self._times[item] = at
        heappush(self._heap, (at, next(self._numbers), item))
        if len(self._heap) > 2 * len(self._times) + _STALE:
            self._heap = [(at, next(self._numbers), item) for item, at in self._times.items()]
            heapify(self._heap)
        self._wake_by(at)

    def discard(self, item: T) -> None:
        """Let an item not expire any more. It may be known or not."""
        self._times.pop(item, None)

    def sweep(self, now: float, limit: int) -> float | None:
        """Expire up to `limit` items that are due; when the next one is, None if there is none."""
        while self._heap:
            at, _, item = self._heap[0]
            if self._times.get(item) == at:
                if at > now or not limit:
                    return at
                limit -= 1
                del self._times[item]
                heappop(self._heap)
                self._expire(item)
            else:
                heappop(self._heap)
        return None


class Sweeper:
    """The task that sweeps all expiries, and sleeps in between."""

    def __init__(self) -> None:
        self._expiries: list[Expiry[object] | Deadlines[object]] = []
        self._woken = asyncio.Event()
        self._sleeps_until = math.inf  # also while it is awake: what is added then may have been looked for already

    def expiry(self, ttl_seconds: float, expire: Callable[[T], None]) -> Expiry[T]:
        """An expiry for items of a new kind; `expire` is called with each item when it has expired."""
        made = Expiry(ttl_seconds, expire, self._wake_by)
        self._expiries.append(made)  # type: ignore[arg-type]
        return made

    def deadlines(self, expire: Callable[[T], None]) -> Deadlines[T]:
        """Deadlines for items of a new kind; `expire` is called with each item when it has expired."""
        made = Deadlines(expire, self._wake_by)
        self._expiries.append(made)  # type: ignore[arg-type]
        return made

    def _wake_by(self, deadline: float) -> None:
        """Be awake then. Whoever sleeps less is not woken: most that is added is discarded long before it is due."""
        if deadline < self._sleeps_until:
            self._woken.set()

    def sweep(self, now: float) -> float | None:
        """Expire what is due, a bounded number of each kind; when the next item is, None if there is none."""
        deadlines = [expiry.sweep(now, _SWEPT_AT_ONCE) for expiry in self._expiries]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    async def run(self) -> None:
        """Sweep whenever something is due, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._woken.clear()
            self._sleeps_until = math.inf
            try:
                deadline = self.sweep(loop.time() + _EARLY_SECONDS)
            except Exception:  # what could not be reclaimed must not keep the rest from it
                log.exception("sweeping failed")
                deadline = loop.time()
            self._sleeps_until = deadline if deadline is not None else math.inf
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._woken.wait()
