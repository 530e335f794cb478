"""The steps of a codec: what compression and encryption are to be able to do. All of it is for threads."""

from collections.abc import Iterator
from threading import Event
from typing import Any, NamedTuple, Protocol

from async_cache.l2.codec.header import Header
from async_cache.prompt.keys import ObjectKey

PIECE_BYTES = 512 * 1024  # what is done between two looks at whether the call was stopped

Part = Any
"""A buffer of bytes."""


class Compressed(NamedTuple):
    """An object while it is compressed: the parameter for its header, and its parts, one after the other."""

    width: int
    parts: Iterator[Part]


class Compression(Protocol):
    """Makes objects shorter. Headers know it by its `number`, from 1 on, and names by its `name`."""

    number: int
    name: str

    def bound_bytes(self, size_bytes: int) -> int:
        """How long an object of this size can become."""

    def compress(self, body: memoryview) -> Compressed | None:
        """Begin to compress an object; None if that would not make it shorter."""

    def decompress(self, payload: memoryview, width: int, body: memoryview, stop: Event) -> bool:
        """Fill `body`, and say whether it was exactly this that was compressed to `payload`."""


class Seal(Protocol):
    """One object while it is encrypted."""

    def update_into(self, part: Part, into: memoryview) -> int:
        """Encrypt a part into as many bytes."""

    def tag(self) -> bytes:
        """What proves, at the end, that all of it is genuine."""


class Encryption(Protocol):
    """Keeps objects secret, and tells whether they are genuine. `number` and `name` are as those of a compression.

    The first of `key_ids` is that of the key which encrypts; all decrypt.
    """

    number: int
    name: str
    tag_bytes: int
    key_ids: tuple[bytes, ...]

    def nonce(self) -> bytes:
        """A number that is never used again under the same key."""

    def seal(self, key: ObjectKey, header: Header) -> Seal:
        """Begin to encrypt an object."""

    def open(
        self, key: ObjectKey, header: Header, payload: memoryview, tag: bytes, into: memoryview, stop: Event
    ) -> bool:
        """Decrypt a payload into as many bytes, its own perhaps, and say whether it is genuine, and this object's."""


class Plain:
    """No encryption."""

    number = 0
    name = ""
    tag_bytes = 0
    key_ids: tuple[bytes, ...] = (bytes(8),)

    def nonce(self) -> bytes:
        return bytes(12)

    def seal(self, key: ObjectKey, header: Header) -> "Plain":
        return self

    def update_into(self, part: Part, into: memoryview) -> int:
        into[:] = part
        return len(part)

    def tag(self) -> bytes:
        return b""

    def open(
        self, key: ObjectKey, header: Header, payload: memoryview, tag: bytes, into: memoryview, stop: Event
    ) -> bool:
        if into is not payload:
            for part, piece in zip(pieces(payload, stop), pieces(into, stop), strict=True):
                piece[:] = part
        return True


def pieces(memory: memoryview, stop: Event) -> Iterator[memoryview]:
    """Memory in pieces, one after the other. Raises InterruptedError once `stop` is set."""
    for begin in range(0, len(memory), PIECE_BYTES):
        if stop.is_set():
            raise InterruptedError
        yield memory[begin : begin + PIECE_BYTES]
