"""A bounded table in two blocks of bytes: 24 bytes for each digest, the oldest ones overwritten. 40 bytes a record.

A digest picks a bucket, and each bucket is a ring: so a table of up to 16 records forgets in exactly the order in which
they were put there, and a larger one nearly so. Which record of a bucket it may be, the first byte of the digest says:
these stand side by side, where C finds one in no time.
"""

from collections.abc import Iterable

_KEY_BYTES = 15  # of a digest, behind the first: as unlikely to be met by another one as can be
_NOBODY = bytes(_KEY_BYTES)
VALUE_BYTES = 24
_STRIDE = _KEY_BYTES + VALUE_BYTES
RECORD_BYTES = 1 + _STRIDE
WAYS = 16  # records in a bucket


class Table:
    """Up to `capacity` records; where there is more than one bucket, these are whole."""

    def __init__(self, capacity: int):
        self._ways = min(capacity, WAYS)
        self._buckets = max(1, -(-capacity // WAYS))
        records = self._buckets * self._ways
        self._next = bytearray(self._buckets)  # by bucket, the record that is overwritten next
        self._firsts = bytearray(records)
        self.data = bytearray(records * _STRIDE)
        """All records but their first bytes: to read, and to change a value in its place."""
        self._search, self._continues = self._firsts.find, self.data.startswith

    def __bool__(self) -> bool:
        return self._ways > 0

    @property
    def size_bytes(self) -> int:
        """What the table takes."""
        return len(self.data) + len(self._firsts) + len(self._next)

    def find(self, digest: bytes) -> int:
        """Where the value of a digest begins in `data`; -1 if there is none."""
        ways = self._ways
        begin = hash(digest) % self._buckets * ways
        record = self._search(digest[0], begin, begin + ways)
        while record >= 0:
            at = record * _STRIDE
            if self._continues(digest[1:16], at):
                return at + _KEY_BYTES
            record = self._search(digest[0], record + 1, begin + ways)
        return -1

    def find_all(self, digests: Iterable[bytes]) -> list[int]:
        """Where the value of each digest begins, as from `find`."""
        search, continues, buckets, ways = self._search, self._continues, self._buckets, self._ways
        found = []
        for digest in digests:
            begin = hash(digest) % buckets * ways
            record = search(digest[0], begin, begin + ways)
            at = record * _STRIDE
            if record < 0:
                found.append(-1)
            else:  # it is most likely this one
                found.append(at + _KEY_BYTES if continues(digest[1:16], at) else self.find(digest))
        return found

    def put(self, digest: bytes, value: bytes, at: int) -> None:
        """Put 24 bytes there for a digest, as the newest record of its bucket.

        `at` is what `find` says of it: what it had there before is forgotten.
        """
        if not self._ways:
            return
        if at >= 0:
            self._firsts[at // _STRIDE] = 0
            self.data[at - _KEY_BYTES : at] = _NOBODY
        bucket = hash(digest) % self._buckets
        way = self._next[bucket]
        self._next[bucket] = (way + 1) % self._ways
        record = bucket * self._ways + way
        self._firsts[record] = digest[0]
        self.data[record * _STRIDE : (record + 1) * _STRIDE] = digest[1:16] + value
