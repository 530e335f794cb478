"""The format of a store: what its files are called, and the records of its index files. No I/O.

`docs/disk.md` tells it in full, with test vectors. In short: bodies lie in segments, on page boundaries, and are never
written twice; an index file is a header and records of 88 bytes, each with a checksum of its own, and only ever grows.
An object is there if there is a record of its PUT and none of a DROP of the same place, in whatever index file and in
whatever order: a place is given once.
"""

import re
from enum import IntEnum
from struct import Struct

from xxhash import xxh3_64_intdigest

from async_cache.prompt.keys import ObjectKey

PAGE_BYTES = 4096
HASH_BYTES = 32
BLOCK_BYTES = 512 * 1024  # hashed at a time, while it is still in the processor's cache
MOST_PAGES = 2**24  # in front of the last body of a segment
MARKER = "FORMAT"
VERSION = 2
MARKER_LINE = b"async_cache log of segments, version %d\n"

RECORD = Struct("<IIIIQIIQ32sQQ")
RECORD_BYTES = RECORD.size
_CHECKED_BYTES = RECORD_BYTES - 8
_CHECKED = Struct(f"<{_CHECKED_BYTES}sQ")
_UNCHECKED = Struct("<IIIIQIIQ32sQ")
_HEADER = Struct("<8sIIQ56x")
_MAGIC = b"akvindex"
_CHECKSUM = Struct("<Q")

_UNFINISHED = re.compile(r"([0-9a-f]{16})\.([0-9a-f]{8})\.idx\.tmp")
_INDEX = re.compile(r"([0-9a-f]{16})\.([0-9a-f]{8})\.idx")
_SEGMENT = re.compile(r"([0-9a-f]{16})\.([0-9a-f]{8})\.seg")
_BEGUN = re.compile(r"tmp\.([0-9a-f]{16})")
_MARKER = re.compile(rb"async_cache log of segments, version ([0-9]{1,9})\n")


class Kind(IntEnum):
    """What a record says of the place of an object: that it is there, or that it is there no more."""

    PUT = 1
    DROP = 2


Record = tuple[int, int, int, int, int, int, int, int, bytes, int, int]
"""One record: kind, rank, group, segment, writer, page, origin, size, chunk hash, checksum and check.

It says what became of an object at a place that is given once: a page of a segment, which is named by the writer who
made it and a number. The origin is a number for what the chunk is of (see `origins`), 0 where that is not said. The
size, in bytes, and the checksum (XXH3-64) are of the body; the check is of all before it.
"""


def index_name(writer: int, generation: int) -> str:
    """The name of the index file of a writer; each time that it is written anew it is a generation younger."""
    return f"{writer:016x}.{generation:08x}.idx"


def unfinished_name(writer: int, generation: int) -> str:
    """The name of an index file that is being written anew."""
    return index_name(writer, generation) + ".tmp"


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is an index file that was being written anew."""
    return _UNFINISHED.fullmatch(name) is not None


def segment_name(writer: int, number: int) -> str:
    """The name of a segment."""
    return f"{writer:016x}.{number:08x}.seg"


def parse_index(name: str) -> tuple[int, int] | None:
    """The writer and the generation of an index file; None if no index file has this name."""
    return (int(match[1], 16), int(match[2], 16)) if (match := _INDEX.fullmatch(name)) else None


def parse_segment(name: str) -> tuple[int, int] | None:
    """The writer and the number of a segment; None if no segment has this name."""
    return (int(match[1], 16), int(match[2], 16)) if (match := _SEGMENT.fullmatch(name)) else None


def begun_name(writer: int) -> str:
    """What this writer has begun of a small file, in a directory of those."""
    return f"tmp.{writer:016x}"


def parse_begun(name: str) -> int | None:
    """The writer of what was begun of a small file; None for what is whole."""
    return int(match[1], 16) if (match := _BEGUN.fullmatch(name)) else None


def is_of_version_1(name: str) -> bool:
    """Whether a file of this name may be an object of the former format, of which each had a file of its own."""
    return name.endswith(".kv")


def marker_version(line: bytes) -> int | None:
    """The version that a marker says; None if it is none."""
    return int(match[1]) if (match := _MARKER.fullmatch(line)) else None


def header(writer: int, *, beats: bool = False) -> bytes:
    """What an index file begins with: as long as a record. A writer who cannot lock it beats: touches it often."""
    return _with_checksum(_HEADER.pack(_MAGIC, VERSION, beats, writer))


def header_beats(block: bytes) -> bool:
    """Whether a header says that its writer beats."""
    return is_whole(block) and bool(_HEADER.unpack_from(block)[2])


def header_version(block: bytes, writer: int) -> int | None:
    """The version that a header of this writer says; None if it is none, or was damaged."""
    if not is_whole(block):
        return None
    magic, version, _, of_writer = _HEADER.unpack_from(block)
    return version if (magic, of_writer) == (_MAGIC, writer) else None


def record(
    kind: Kind,
    which: tuple[bytes, int, int],
    place: tuple[int, int, int],
    size_bytes: int,
    checksum: int,
    origin: int = 0,
) -> bytes:
    """A record of the object `which` (chunk hash, rank, group) at a place (writer, segment, page)."""
    (chunk_hash, rank, group), (writer, segment, page) = which, place
    fields = kind, rank, group, segment, writer, page, origin, size_bytes, chunk_hash, checksum
    return _with_checksum(_UNCHECKED.pack(*fields))


def check_key(key: ObjectKey) -> None:
    """Raises ValueError if a record cannot have this key."""
    if len(key.chunk_hash) != HASH_BYTES or not (0 <= key.rank < 2**32 and 0 <= key.group < 2**32):
        raise ValueError(f"a record has a hash of {HASH_BYTES} bytes, and numbers below 2**32, not those of {key}")


def records(block: bytes) -> list[Record]:
    """The records of a piece of an index file that are whole, in their order.

    What was damaged, or tells of a page where nobody writes, is left out.
    """
    view = memoryview(block)
    view = view[: len(view) - len(view) % RECORD_BYTES]
    return [
        fields
        for (checked, check), fields in zip(_CHECKED.iter_unpack(view), RECORD.iter_unpack(view), strict=True)
        if xxh3_64_intdigest(checked) == check and fields[5] < MOST_PAGES
    ]


def is_whole(block: bytes) -> bool:
    """Whether this is a record, or a header, and intact."""
    return len(block) == RECORD_BYTES and _with_checksum(block[:_CHECKED_BYTES]) == block


def pages(size_bytes: int) -> int:
    """How many pages a body takes: at least one, so that no two have the same place."""
    return -(-size_bytes // PAGE_BYTES) or 1


def _with_checksum(checked: bytes) -> bytes:
    return checked + _CHECKSUM.pack(xxh3_64_intdigest(checked))
