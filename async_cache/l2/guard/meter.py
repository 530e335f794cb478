"""What is queued for a backend, and how fast it loads: what `expected_load_seconds` is made from."""

import asyncio
from collections.abc import Iterable

_DECAY = 0.8  # weight of what was measured before, in the moving averages (EWMA) of bytes and seconds
_GROWTH = 1.1  # of the fastest call, with each call: a backend may become slower


class Meter:
    """The bytes that are to be loaded from one backend, and how fast that went so far."""

    def __init__(self) -> None:
        self.queued_bytes = 0
        """Loads that were asked for and have not ended."""
        self.loaded_bytes = 0
        """Loads that have ended with their bytes, since the beginning."""
        self._bytes = self._seconds = 0.0
        self._measured_at = 0.0
        self._fastest_call_seconds: float | None = None  # of late: no load takes less
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()

    def queued(self, size_bytes: int) -> None:
        """Count bytes that are to be loaded."""
        if not self.queued_bytes:
            self._measured_at = self._loop.time()
            self._idle.clear()
        self.queued_bytes += size_bytes

    def ended(self, size_bytes: int, call_seconds: float | None = None) -> None:
        """Count bytes that are no longer to be loaded.

        `call_seconds` is what their call took, None if they were not loaded. The throughput counts the time since the
        last bytes that were, since many calls that are out together may take no longer than one.
        """
        now = self._loop.time()
        self.queued_bytes -= size_bytes
        if call_seconds is not None:
            self.loaded_bytes += size_bytes
            fastest = self._fastest_call_seconds
            self._fastest_call_seconds = min(call_seconds, fastest * _GROWTH) if fastest is not None else call_seconds
            self._bytes = self._bytes * _DECAY + size_bytes
            self._seconds = self._seconds * _DECAY + now - self._measured_at
        self._measured_at = now
        if not self.queued_bytes:
            self._idle.set()

    def expected_load_seconds(self, size_bytes: int) -> float | None:
        """How long it should take until so many more bytes are loaded; None before the first measurement."""
        if not self._bytes:
            return None
        return max((self.queued_bytes + size_bytes) * self._seconds / self._bytes, self._fastest_call_seconds or 0.0)

    async def wait_until_idle(self, timeout_seconds: float) -> None:
        """Wait until no load is queued or under way, or the time is over."""
        if self.queued_bytes:
            waiter = self._loop.create_task(self._idle.wait())
            try:
                await asyncio.wait((waiter,), timeout=timeout_seconds)
            finally:
                waiter.cancel()


def expected_load_seconds(meters_and_bytes: Iterable[tuple[Meter, int]]) -> float | None:
    """How long it should take to load from several backends at once; None if one of them was not measured yet."""
    longest = 0.0
    for meter, size_bytes in meters_and_bytes:
        seconds = meter.expected_load_seconds(size_bytes)
        if seconds is None:
            return None
        longest = max(longest, seconds)
    return longest
