"""The header of an encoded object. No I/O.

An encoded object, version 1, little endian. It is what a backend stores, so `l2.record` puts its trailer behind it:

    0       8         magic, "akvcod" and the version as uint16
    8       1         compression: 0 none, 1 zstd
    9       1         width, a parameter of the compression; 0 without one
    10      1         encryption: 0 none, 1 AES-256-GCM
    11      5         zeros
    16      8         size of the object, uint64
    24      8         id of the key; zeros without encryption
    32      12        nonce; zeros without encryption
    44      4         zeros
    48      n bytes   payload
    48 + n  16        tag of AES-GCM, with encryption

The tag covers the payload, the header, and the identity of the object (`associated`).
"""

from struct import Struct
from typing import NamedTuple, Self

from async_cache.prompt.keys import ObjectKey

MAGIC = b"akvcod\x01\x00"
HEADER_BYTES = 48

_HEADER = Struct("<8sBBB5xQ8s12s4x")
_IDENTITY = Struct("<32sII")


class Header(NamedTuple):
    """What an encoded object says of itself."""

    compression: int
    width: int
    encryption: int
    size_bytes: int
    key_id: bytes = bytes(8)
    nonce: bytes = bytes(12)

    @classmethod
    def parse(cls, data: bytes) -> Self | None:
        """The header that data begins with; None if it is none, or one of another version."""
        if len(data) < HEADER_BYTES:
            return None
        magic, *fields = _HEADER.unpack_from(data)
        header = cls(*fields)
        return header if magic == MAGIC and header.pack() == data[:HEADER_BYTES] else None

    def pack(self) -> bytes:
        """The header as it is stored."""
        return _HEADER.pack(MAGIC, *self)

    def associated(self, key: ObjectKey) -> bytes:
        """What is authenticated beside the payload: which object it is, and this header."""
        return _IDENTITY.pack(*key) + self.pack()
