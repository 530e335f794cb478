"""The format of a record, which is one object and what proves that it is whole, and the one asked for. No I/O.

A record, version 1, little endian. The body comes first, where O_DIRECT finds it aligned, and the trailer can be
written when the checksum is known:

    0       n bytes   body
    n       8         magic, "akvrec" and the version as uint16
    n + 8   32        chunk hash
    n + 40  4         rank, uint32
    n + 44  4         group, uint32
    n + 48  8         n, uint64
    n + 56  8         XXH3-64 of the body, uint64

Where records have names, a record is named `<chunk hash in hex>.<rank>.<group>.kv`.
"""

import re
from mmap import mmap
from struct import Struct

from xxhash import xxh3_64_intdigest

from async_cache.prompt.keys import ObjectKey

MAGIC = b"akvrec\x01\x00"
TRAILER = Struct("<8s32sIIQQ")
TRAILER_BYTES = TRAILER.size

_NAME = re.compile(r"([0-9a-f]{64})\.(0|[1-9][0-9]{0,9})\.(0|[1-9][0-9]{0,9})\.kv")


def file_name(key: ObjectKey) -> str:
    """The name of the record of an object."""
    chunk_hash, rank, group = key
    return f"{chunk_hash.hex()}.{rank}.{group}.kv"


def parse_name(name: str) -> ObjectKey | None:
    """The key of the object whose record has this name; None if no record has it."""
    match = _NAME.fullmatch(name)
    return match and key_of(bytes.fromhex(match[1]), int(match[2]), int(match[3]))


def key_of(chunk_hash: bytes, rank: int, group: int) -> ObjectKey | None:
    """The key that a name says; None if its numbers are larger than a record can have."""
    return ObjectKey(chunk_hash, rank, group) if max(rank, group) < 2**32 else None


def write_trailer(into: bytearray | mmap | memoryview, key: ObjectKey, size_bytes: int, checksum: int) -> None:
    """Put the trailer of a body, of so many bytes and with this XXH3-64, at the beginning of a buffer."""
    TRAILER.pack_into(into, 0, MAGIC, *key, size_bytes, checksum)


def is_trailer(tail: bytes | bytearray | mmap | memoryview, key: ObjectKey, size_bytes: int, checksum: int) -> bool:
    """Whether a buffer begins with the trailer of this object, of so many bytes and with this XXH3-64."""
    return tail[:TRAILER_BYTES] == TRAILER.pack(MAGIC, *key, size_bytes, checksum)


def make_trailer(key: ObjectKey, body: bytes | memoryview) -> bytes:
    """The trailer of an object. It takes the checksum: a millisecond for some 20 MB."""
    return TRAILER.pack(MAGIC, *key, len(body), xxh3_64_intdigest(body))


def is_whole(key: ObjectKey, body: bytes | memoryview, trailer: bytes) -> bool:
    """Whether this is the object, by its trailer. It takes the checksum, too."""
    return trailer == make_trailer(key, body)


def body_bytes(record_bytes: int) -> int | None:
    """The size of the body in a record of so many bytes; None if a record cannot be that short."""
    return record_bytes - TRAILER_BYTES if record_bytes >= TRAILER_BYTES else None
