"""When chunks expire in a backend that drops them by itself and tells nobody, for those who listen to what leaves."""

import asyncio
from collections.abc import Callable
from heapq import heappop, heappush

_AT_ONCE = 256  # in a millisecond or so


class Expiries:
    """Calls `expired` with the backend and the hash of each chunk whose time there is over, soon after that.

    It sleeps until the next one is due. At most `capacity` are known at a time: what comes beyond them is not told.
    """

    def __init__(self, capacity: int, expired: Callable[[str, bytes], None]):
        self._capacity = capacity
        self._expired = expired
        self._due: list[tuple[float, str, bytes]] = []
        self._moments: dict[tuple[str, bytes], float] = {}
        """By backend and chunk, when it is due: what was stored anew since then is in `_due` twice."""
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = 0.0  # uvloop's timers do not tell that where it is over

    def add(self, moment: float, backend: str, chunk_hash: bytes) -> None:
        """Know that a chunk was stored, which expires then by the loop's clock, and no sooner."""
        if len(self._due) >= self._capacity:
            return
        heappush(self._due, (moment, backend, chunk_hash))
        self._moments[backend, chunk_hash] = moment
        if self._timer is None or moment < self._wakes_at:
            self._sleep()

    def close(self) -> None:
        """Forget all of them."""
        self._due.clear()
        self._moments.clear()
        self._sleep()

    def _sleep(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._due:
            self._wakes_at = self._due[0][0]
            self._timer = asyncio.get_running_loop().call_at(self._wakes_at, self._wake)

    def _wake(self) -> None:
        now = asyncio.get_running_loop().time()
        for _ in range(_AT_ONCE):
            if not self._due or self._due[0][0] > now:
                break
            moment, backend, chunk_hash = heappop(self._due)
            if self._moments.get((backend, chunk_hash)) == moment:
                del self._moments[backend, chunk_hash]
                self._expired(backend, chunk_hash)
        self._sleep()
