"""How long chunks stay in memory, and how long they are not used there: from a sample, as all would be too many."""

from collections.abc import Callable, Container, Sequence

from msgspec import Struct

from async_cache.metrics.histogram import SLOW_SECONDS, Histogram

_NEAR, _FAR = 15, 255  # the places in a prefix, beside its first, that the sample is from: a chunk has one place always
_ONE_IN = 8  # of those, by their hashes
_LIMIT = 2048


class Stay(Struct, gc=False):
    """A chunk of the sample: when it was asked for last, and since when it is in memory, None where it is not."""

    used: float
    entered: float | None = None


class Residence:
    """A sample of the chunks that are asked for, looked at now and then."""

    def __init__(self, index: Container[bytes], clock: Callable[[], float]):
        self.lifetime = Histogram(SLOW_SECONDS)
        """Seconds in memory, of those that have left."""
        self.idle = Histogram(SLOW_SECONDS)
        """Seconds since they were asked for, of those that have left."""
        self.reuse_gap = Histogram(SLOW_SECONDS)
        """Seconds between two requests for a chunk, whether it was in memory meanwhile or not."""
        self._index = index
        self._clock = clock
        self._stays: dict[bytes, Stay] = {}

    def asked(self, chunk_hashes: Sequence[bytes]) -> None:
        """Take note that a prompt with these chunks was asked for."""
        count = len(chunk_hashes)
        if count:
            chunk_hash = chunk_hashes[0 if count <= _NEAR else _NEAR if count <= _FAR else _FAR]
            if not chunk_hash[0] % _ONE_IN:
                self._use(chunk_hash)

    def _use(self, chunk_hash: bytes) -> None:
        now = self._clock()
        stay = self._stays.pop(chunk_hash, None)
        if stay is None:
            stay = Stay(now)
            if len(self._stays) >= _LIMIT:
                del self._stays[next(iter(self._stays))]  # that which was not asked for for the longest time
        else:
            self.reuse_gap.observe(now - stay.used)
            stay.used = now
        self._stays[chunk_hash] = stay

    def look(self) -> None:
        """See which chunks of the sample have come, and which have left, since the last look."""
        now = self._clock()
        for chunk_hash, stay in self._stays.items():
            if chunk_hash in self._index:
                if stay.entered is None:
                    stay.entered = now
            elif stay.entered is not None:
                self.lifetime.observe(now - stay.entered)
                self.idle.observe(now - stay.used)
                stay.entered = None
