"""`Watch`: all that is counted of one cache, and how far its event loop lags."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from msgspec import Struct

from async_cache.aio.clock import precise_clock
from async_cache.core import Core
from async_cache.metrics.histogram import Histogram
from async_cache.metrics.residence import Residence
from async_cache.metrics.traffic import Traffic

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_LAG_LOOKS = 20  # of which the worst is told: ten seconds
_RESIDENCE_LOOKS = 2
_RANK_LOOKS = 120
_HISTORY_LOOKS = 4
_HISTORY = 150  # of which each is two seconds behind the last: five minutes


class Sample(Struct, frozen=True, array_like=True):
    """What was asked for in the `seconds` since the beginning: requests, and tokens with those found by tier."""

    seconds: float
    requests: int
    asked: int
    l1_hits: int
    l2_hits: int


class Watch:
    """Counts what a cache does from `open` until `close`. `tenant_of` gives the tenant of a request id."""

    def __init__(self, core: Core, tenant_of: Callable[[str], str]):
        self.core = core
        self.tenant_of = tenant_of
        self.clock = precise_clock(asyncio.get_running_loop())
        self.began = self.clock()
        self.residence = Residence(core.l1.index, self.clock)
        self.traffic = Traffic(self.residence, tenant_of)
        self.lag = Histogram()
        """Seconds by which the loop was late to look."""
        self._history: deque[Sample] = deque(maxlen=_HISTORY)
        self._late: deque[float] = deque([0.0], maxlen=_LAG_LOOKS)
        self._task: asyncio.Task[None] | None = None

    @property
    def worst_lag_seconds(self) -> float:
        """The most by which the loop was late in the last ten seconds."""
        return max(self._late)

    @property
    def history(self) -> list[Sample]:
        """The last five minutes, up to now."""
        return [*self._history, self._sample()]

    def _sample(self) -> Sample:
        of_all = self.traffic.all
        counts = of_all.requests, of_all.asked, of_all.l1_hits, of_all.l2_hits
        return Sample(self.clock() - self.began, *counts)

    def open(self) -> None:
        """Begin to count."""
        self._history.append(self._sample())
        self.core.observers.counting += (self.traffic.count,)
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Count no more; idempotent."""
        task, self._task = self._task, None
        if task is not None:
            observers = self.core.observers
            observers.counting = tuple(count for count in observers.counting if count != self.traffic.count)
            task.cancel()
            await asyncio.wait((task,))

    async def _run(self) -> None:
        looks = 0
        while True:
            due = self.clock() + _LOOK_SECONDS
            await asyncio.sleep(_LOOK_SECONDS)
            late = max(0.0, self.clock() - due)
            self._late.append(late)
            self.lag.observe(late)
            looks += 1
            try:
                if not looks % _RESIDENCE_LOOKS:
                    self.residence.look()
                if not looks % _HISTORY_LOOKS:
                    self._history.append(self._sample())
                if not looks % _RANK_LOOKS:
                    self.traffic.rank()
            except Exception:  # what cannot be counted must not end the counting of the rest
                log.exception("counting failed")
