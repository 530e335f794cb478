"""What leaves the index first: in the order of the policy, from those who have filled most of their quotas."""

from collections import Counter
from collections.abc import Iterator

from async_cache.l2.chunks import Chunk
from async_cache.retention.lending import choose, part_of
from async_cache.retention.policy import EvictionPolicy
from async_cache.retention.quotas import Bounds

_PASSED = 1024  # chunks of other owners: what comes behind so many in the order does not leave before them


class Leaving:
    """Chooses among the chunks of an index, with their pins, by its policy. Nothing leaves by itself."""

    def __init__(self, chunks: dict[bytes, Chunk], pins: Counter[bytes], policy: EvictionPolicy[Chunk]):
        self._chunks, self._pins, self._policy = chunks, pins, policy
        self.suspended: dict[bytes, Chunk] = {}
        """Pinned when it was their turn to leave."""

    def victims(self, size_bytes: int, bounds: Bounds, used_bytes: int) -> list[Chunk] | None:
        """Chunks without a pin with so much room, those that should leave first; None if all do not suffice.

        Where there are quotas, whoever has filled most of his own gives way.
        """
        if size_bytes > 0 and bounds.lending and (lent := self._lent(size_bytes, bounds, used_bytes)) is not None:
            return lent
        victims, pinned = [], []
        for chunk in self._policy.victims() if size_bytes > 0 else ():
            if chunk.chunk_hash in self._pins:
                pinned.append(chunk)
            else:
                victims.append(chunk)
                size_bytes -= chunk.shape.room_bytes
                if size_bytes <= 0:
                    break
        if size_bytes > 0:
            return None
        for chunk in pinned:  # nobody looks at it again before its last pin has gone
            self._policy.suspend(chunk)
            self.suspended[chunk.chunk_hash] = chunk
        return victims

    def _lent(self, size_bytes: int, bounds: Bounds, used_bytes: int) -> list[Chunk] | None:
        """Chunks with so much room of those who have filled most of their quotas; None if these do not suffice.

        Those who have none count together: what the quotas of the others leave is theirs, or as much as the mean quota.
        """
        lending, there = bounds.lending, used_bytes
        claim = max(there - lending.most_bytes, lending.most_bytes // len(lending))

        def others_part(taken: int) -> int:
            left = there - lending.used_bytes - taken
            return part_of(left, claim) if left > 0 else -1

        chosen = choose(lending, size_bytes, self._sizes_of_free, self._without_quota(bounds), others_part)
        chunks = [self._chunks[chunk_hash] for chunk_hash in chosen]
        return chunks if sum(chunk.shape.room_bytes for chunk in chunks) >= size_bytes else None

    def _without_quota(self, bounds: Bounds) -> Iterator[bytes]:
        """Chunks of those who have no quota, in the order of the policy, as far as not too many others come before."""
        passed = 0
        for chunk in self._policy.victims():
            origin = chunk.shape.origin
            if origin is None or not bounds.lends(origin.salt):
                yield chunk.chunk_hash
            elif (passed := passed + 1) > _PASSED:
                return

    def _sizes_of_free(self, chunk_hash: bytes) -> tuple[int, int]:
        chunk = self._chunks.get(chunk_hash)
        if chunk is None or chunk_hash in self._pins:
            return 0, 0
        return chunk.shape.room_bytes, chunk.shape.size_bytes
