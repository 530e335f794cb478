"""A histogram: how often a value was at most so large."""

from bisect import bisect_left
from collections.abc import Sequence

FAST_SECONDS = tuple(float(f"{m}e{e}") for e in range(-6, 2) for m in (1, 2.5, 5))[:-1]
"""From a microsecond to 25 seconds: what takes from a dictionary's time to a dead disk's."""
SLOW_SECONDS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 24 * 3600.0)
"""From a second to a day: how long something stays."""


class Histogram:
    """Counts of values by their size, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = FAST_SECONDS):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """By bound, the values up to it and beyond the one before; at last, those beyond all."""
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def quantile(self, part: float) -> float | None:
        """The bound below which this part of the values lies, the last for those beyond; None without a value."""
        rank = part * sum(self.counts)
        if not rank:
            return None
        for bound, count in zip(self.bounds, self.counts, strict=False):
            rank -= count
            if rank <= 0:
                return bound
        return self.bounds[-1]
