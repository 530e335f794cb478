"""Bytes <-> payloads: every payload is preceded by its length, 4 bytes, little-endian. Knows no socket."""

from collections.abc import Iterator
from struct import Struct

from async_cache.errors import ProtocolError

_unpack = Struct("<I").unpack_from
HEADER_BYTES = 4
MAX_GREETING_BYTES = 4096
"""The largest payload of the first frame in each direction: so much may be sent by a peer that is not known yet."""
MAX_PAYLOAD_BYTES = 16 * 2**20
"""The largest payload of every other frame."""
DATA_BYTES = 256 * 2**10
"""KV bytes in one frame: so much of one transfer goes before the messages behind it get their turn."""


def frame(payload: bytes) -> bytes:
    """A payload with its header. Raises ProtocolError for one that the other end would refuse."""
    size_bytes = len(payload)
    if not 0 < size_bytes <= MAX_PAYLOAD_BYTES:
        raise _refused(size_bytes, MAX_PAYLOAD_BYTES)
    return size_bytes.to_bytes(HEADER_BYTES, "little") + payload


def check_size(size_bytes: int, limit_bytes: int) -> None:
    """Check that a frame may have a payload of this size. Raises ProtocolError."""
    if not 0 < size_bytes <= limit_bytes:
        raise _refused(size_bytes, limit_bytes)


def _refused(size_bytes: int, limit_bytes: int) -> ProtocolError:
    return ProtocolError(f"a frame of {size_bytes} bytes: 1 to {limit_bytes} are allowed")


class FrameReader:
    """Takes bytes as they come, gives payloads as they are complete. Keeps at most one frame, and what follows it."""

    def __init__(self, limit_bytes: int = MAX_PAYLOAD_BYTES):
        self._limit_bytes = limit_bytes
        self._kept = bytearray()

    @property
    def kept_bytes(self) -> int:
        """What is there of a frame that is not complete."""
        return len(self._kept)

    def feed(self, data: bytes | bytearray) -> Iterator[memoryview]:
        """The payloads that are complete now, in memory that stays as it is. Raises ProtocolError for a bad length.

        After an error, nothing can be read any more.
        """
        if self._kept:
            self._kept += data
            if len(self._kept) < HEADER_BYTES or len(self._kept) < HEADER_BYTES + self._length(self._kept, 0):
                return
            data, self._kept = self._kept, bytearray()
        view = memoryview(data)
        begin, end = 0, len(data)
        while end - begin >= HEADER_BYTES:
            first = begin + HEADER_BYTES
            last = first + self._length(data, begin)
            if last > end:
                break
            yield view[first:last]
            begin = last
        if begin < end:
            self._kept += view[begin:]

    def _length(self, data: bytes | bytearray, begin: int) -> int:
        length: int = _unpack(data, begin)[0]
        if not 0 < length <= self._limit_bytes:
            raise _refused(length, self._limit_bytes)
        return length
