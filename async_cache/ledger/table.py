"""A bounded table in two blocks of bytes: 24 bytes for each digest, the oldest ones overwritten. 40 bytes a record.

A digest picks a bucket, and each bucket is a ring: so a table of up to 16 records forgets in exactly the order in which
they were put there, and a larger one nearly so. Which record of a bucket it may be, the first byte of the digest says:
these stand side by side, where C finds one in no time.
"""

from collections.abc import Sequence

_KEY_BYTES = 15  # of a digest, behind the first: as unlikely to be met by another one as can be
_NOBODY = bytes(_KEY_BYTES)
VALUE_BYTES = 24
_STRIDE = VALUE_BYTES + _KEY_BYTES
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
        """All records, each a value and its key but for the first byte: to read, and to change a value in its place."""
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
            if self._continues(digest[1:16], at + VALUE_BYTES):
                return at
            record = self._search(digest[0], record + 1, begin + ways)
        return -1

    def find_tails(self, digests: Sequence[bytes], size_bytes: int) -> list[bytes | None]:
        """The last so many bytes of the value of each digest, None where there is none.

        It is the same object for those side by side of which they are equal: this is then seen in one comparison, as a
        value stands before its key.
        """
        data, search, continues, buckets, ways = self.data, self._search, self._continues, self._buckets, self._ways
        begin = VALUE_BYTES - size_bytes
        tails: list[bytes | None] = []
        tail = b""
        for digest, number in zip(digests, map(hash, digests), strict=True):
            bucket = number % buckets * ways
            record = search(digest[0], bucket, bucket + ways)
            if record < 0:
                tails.append(None)
            elif tail and continues(tail + digest[1:16], record * _STRIDE + begin):
                tails.append(tail)
            elif (at := self.find(digest)) >= 0:
                tail = bytes(data[at + begin : at + VALUE_BYTES])
                tails.append(tail)
            else:
                tails.append(None)
        return tails

    def put(self, digest: bytes, value: bytes, at: int) -> None:
        """Put 24 bytes there for a digest, as the newest record of its bucket.

        `at` is what `find` says of it: what it had there before is forgotten.
        """
        if not self._ways:
            return
        if at >= 0:
            self._firsts[at // _STRIDE] = 0
            self.data[at + VALUE_BYTES : at + _STRIDE] = _NOBODY
        bucket = hash(digest) % self._buckets
        way = self._next[bucket]
        self._next[bucket] = (way + 1) % self._ways
        record = bucket * self._ways + way
        self._firsts[record] = digest[0]
        self.data[record * _STRIDE : (record + 1) * _STRIDE] = value + digest[1:16]
