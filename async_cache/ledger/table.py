"""A bounded table in one block of bytes: 24 bytes for each digest, the oldest ones overwritten. 40 bytes a record.

A digest picks a bucket, and each bucket is a ring: so a table of up to 16 records forgets in exactly the order in which
they were put there, and a larger one nearly so.
"""

from collections.abc import Iterable

_KEY_BYTES = 16  # of a digest: as unlikely to be met by another one as can be
_NOBODY = bytes(_KEY_BYTES)
VALUE_BYTES = 24
RECORD_BYTES = _KEY_BYTES + VALUE_BYTES
WAYS = 16  # records in a bucket: to look through so many takes a seventh of a microsecond


class Table:
    """Up to `capacity` records; where there is more than one bucket, these are whole."""

    def __init__(self, capacity: int):
        self._ways = min(capacity, WAYS)
        self._buckets = max(1, -(-capacity // WAYS))
        self._bucket_bytes = self._ways * RECORD_BYTES
        self._next = bytearray(self._buckets)  # by bucket, the record that is overwritten next
        self.data = bytearray(self._buckets * self._bucket_bytes)
        """All records: to read, and to change a value in its place."""
        self._search = self.data.find

    def __bool__(self) -> bool:
        return self._ways > 0

    @property
    def size_bytes(self) -> int:
        """What the table takes."""
        return len(self.data) + len(self._next)

    def find(self, digest: bytes) -> int:
        """Where the value of a digest begins in `data`; -1 if there is none."""
        size = self._bucket_bytes
        begin = hash(digest) % self._buckets * size
        at = self._search(digest[:_KEY_BYTES], begin, begin + size)
        if at >= 0:
            return self._aligned(digest, begin, at)
        return -1

    def find_all(self, digests: Iterable[bytes]) -> list[int]:
        """Where the value of each digest begins, as from `find`."""
        search, buckets, size = self._search, self._buckets, self._bucket_bytes
        begins = [(digest, hash(digest) % buckets * size) for digest in digests]
        return [
            self._aligned(digest, begin, at) if at >= 0 else -1
            for digest, begin in begins
            for at in (search(digest[:_KEY_BYTES], begin, begin + size),)
        ]

    def _aligned(self, digest: bytes, begin: int, at: int) -> int:
        """Where the value begins of a digest that was found: not in the middle of something else."""
        while (at - begin) % RECORD_BYTES:
            at = self._search(digest[:_KEY_BYTES], at + 1, begin + self._bucket_bytes)
            if at < 0:
                return -1
        return at + _KEY_BYTES

    def put(self, digest: bytes, value: bytes) -> None:
        """Put 24 bytes there for a digest, as the newest record of its bucket, in place of what it had."""
        if not self._ways:
            return
        data, at = self.data, self.find(digest)
        if at >= 0:
            data[at - _KEY_BYTES : at] = _NOBODY
        bucket = hash(digest) % self._buckets
        way = self._next[bucket]
        self._next[bucket] = (way + 1) % self._ways
        begin = bucket * self._bucket_bytes + way * RECORD_BYTES
        data[begin : begin + RECORD_BYTES] = digest[:_KEY_BYTES] + value
