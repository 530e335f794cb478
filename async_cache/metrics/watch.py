"""`Watch`: all that is counted of one cache, and how far its event loop lags."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

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
        self._late: deque[float] = deque([0.0], maxlen=_LAG_LOOKS)
        self._task: asyncio.Task[None] | None = None

    @property
    def worst_lag_seconds(self) -> float:
        """The most by which the loop was late in the last ten seconds."""
        return max(self._late)

    def open(self) -> None:
        """Begin to count."""
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
                if not looks % _RANK_LOOKS:
                    self.traffic.rank()
            except Exception:  # what cannot be counted must not end the counting of the rest
                log.exception("counting failed")
