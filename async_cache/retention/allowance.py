"""How much of a tier may be kept on demand, and by whom: what others have taken is never all of it."""

from collections import Counter
from collections.abc import Callable, Sequence
from sys import maxsize

from async_cache.values import Clipped

OF_TIER = 0.75
"""The part of a tier that may be kept on demand: the rest is for what comes and goes."""


class Allowance:
    """What is kept of one tier, by whose it is. A chunk counts once, however often it is asked to be kept.

    An owner has up to `owner_share` of the tier, and of what others have left of `OF_TIER` no more than a half: so
    whoever comes next always finds some. `capacity_bytes` tells the size of the tier; None: it has no bound.
    """

    def __init__(self, capacity_bytes: Callable[[], int | None], owner_share: float):
        self.owner_share = owner_share
        self._capacity_bytes = capacity_bytes
        self._kept: dict[bytes, int] = {}  # how often each chunk is to be kept
        self._bytes: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def kept_bytes(self) -> dict[str, int]:
        """What is kept, by owner."""
        return dict(self._bytes)

    def room(self, owner: str) -> tuple[int, Clipped]:
        """How many bytes more an owner may keep, and what bounds it."""
        capacity = self._capacity_bytes()
        if capacity is None:
            return maxsize, Clipped.QUOTA
        own = self._bytes[owner]
        quota = int(capacity * self.owner_share) - own
        left = (int(capacity * OF_TIER) - (self._bytes.total() - own)) // 2 - own
        return (quota, Clipped.QUOTA) if quota <= left else (max(left, 0), Clipped.MEMORY)

    def take(self, owner: str, chunk_hashes: Sequence[bytes], chunk_bytes: int, *, must: bool = False) -> int:
        """Keep the first so many of these chunks for which an owner has room: their number. `must`: all of them."""
        room = maxsize if must else self.room(owner)[0]
        kept, taken = self._kept, 0
        for chunk_hash in chunk_hashes:
            times = kept.get(chunk_hash, 0)
            if not times:
                if room < chunk_bytes:
                    break
                room -= chunk_bytes
                self._bytes[owner] += chunk_bytes
            kept[chunk_hash] = times + 1
            taken += 1
        return taken

    def give(self, owner: str, chunk_hashes: Sequence[bytes], chunk_bytes: int) -> list[bytes]:
        """Keep these chunks once less; those that nobody keeps any more."""
        kept, free = self._kept, []
        for chunk_hash in chunk_hashes:
            times = kept.pop(chunk_hash) - 1
            if times:
                kept[chunk_hash] = times
            else:
                free.append(chunk_hash)
        self._bytes[owner] -= chunk_bytes * len(free)
        if not self._bytes[owner]:
            del self._bytes[owner]
        return free
