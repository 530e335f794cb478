"""Reclaims what nobody comes back for: one loop for every TTL, which sleeps until the next deadline."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

log = logging.getLogger(__name__)

_EARLY_SECONDS = 0.001  # a timer may fire early: by half a millisecond on uvloop, by a rounding error elsewhere
_SWEPT_AT_ONCE = 256  # then the loop gets its turn


class Expiry(Generic[T]):
    """Items that share a TTL, in the order in which they expire: adding, renewing and removing cost one step each."""

    def __init__(self, ttl_seconds: float, expire: Callable[[T], None], poke: Callable[[], None]):
        self.swept = 0
        self._ttl_seconds = ttl_seconds
        self._expire = expire
        self._poke = poke
        self._clock = asyncio.get_running_loop().time
        self._deadlines: OrderedDict[T, float] = OrderedDict()

    def add(self, item: T) -> None:
        """It expires a TTL from now, whenever it was to expire before."""
        first = not self._deadlines
        self._deadlines[item] = self._clock() + self._ttl_seconds
        self._deadlines.move_to_end(item)
        if first:
            self._poke()

    def discard(self, item: T) -> None:
        """It does not expire any more."""
        self._deadlines.pop(item, None)

    def __contains__(self, item: T) -> bool:
        return item in self._deadlines

    def __iter__(self) -> Iterator[T]:
        return iter(self._deadlines)

    def __len__(self) -> int:
        return len(self._deadlines)

    def sweep(self, now: float, limit: int) -> float | None:
        """Expire up to `limit` items; the next deadline, if there is one."""
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


class Sweeper:
    """The loop over all expiries."""

    def __init__(self) -> None:
        self._expiries: list[Expiry[object]] = []
        self._poked = asyncio.Event()

    def expiry(self, ttl_seconds: float, expire: Callable[[T], None]) -> Expiry[T]:
        """A new kind of thing that expires; `expire` is told of each that does."""
        made = Expiry(ttl_seconds, expire, self._poked.set)
        self._expiries.append(made)  # type: ignore[arg-type]
        return made

    def sweep(self, now: float) -> float | None:
        """Expire what is due, or a bounded part of it; the next deadline."""
        deadlines = [expiry.sweep(now, _SWEPT_AT_ONCE) for expiry in self._expiries]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    async def run(self) -> None:
        """Sweep for ever."""
        loop = asyncio.get_running_loop()
        while True:
            self._poked.clear()
            try:
                deadline = self.sweep(loop.time() + _EARLY_SECONDS)
            except Exception:  # what could not be reclaimed must not keep the rest from it
                log.exception("sweeping failed")
                deadline = loop.time()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._poked.wait()
