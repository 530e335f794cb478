"""Token ids -> chained chunk hashes -> object keys. Pure functions; `docs/keys.md` has the format and test vectors.

Everything is BLAKE3 with 32-byte digests and little-endian integers. The chain starts from a root over what fixes the
meaning and the shape of the bytes, so one digest identifies a chunk among all models, layouts, adapters and tenants.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence
from struct import pack
from typing import Any, NamedTuple

from blake3 import blake3

MAX_TOKEN_ID = 2**31 - 1
MAX_SALT_BYTES = 128
MAX_DIGEST_BYTES = 64

Media = Sequence[tuple[int, bytes]]


class ObjectKey(NamedTuple):
    """The identity of stored bytes: one chunk (32-byte chained hash), one rank, one group."""

    chunk_hash: bytes
    rank: int
    group: int


def root(fields: Iterable[str]) -> bytes:
    """Digest of length-prefixed UTF-8 fields: the start of a chain."""
    encoded = [field.encode() for field in fields]
    return blake3(b"async_cache root 1\n" + b"".join(pack("<I", len(e)) + e for e in encoded)).digest()


def pack_tokens(tokens: Any) -> bytes:
    """Token ids as little-endian uint32, whatever integers they came as.

    Takes a sequence of int, an `array`, a one-dimensional NumPy array or torch tensor, or a buffer of integers.
    Raises TypeError for what is not integers and ValueError for an id outside 0..2**31-1.
    """
    if isinstance(tokens, (str, bytes, bytearray)):
        raise TypeError("token ids must be integers; cast raw bytes with memoryview(...).cast('i')")
    if hasattr(tokens, "detach"):  # a torch tensor, recognised without importing torch
        if tokens.dtype.is_floating_point or tokens.dtype.is_complex or str(tokens.dtype) == "torch.bool":
            raise TypeError(f"token ids must be integers, not {tokens.dtype}")
        tokens = tokens.detach().cpu()
        tokens = tokens.numpy() if str(tokens.dtype) in ("torch.int32", "torch.int64") else tokens.tolist()
    try:
        packed = _pack_buffer(memoryview(tokens)) if not isinstance(tokens, (list, tuple)) else array("I", tokens)
    except OverflowError:
        raise ValueError(f"token ids must be between 0 and {MAX_TOKEN_ID}") from None
    except TypeError as error:
        if isinstance(tokens, Sequence) and not isinstance(tokens, (list, tuple, memoryview, array)):
            return pack_tokens(list(tokens))
        raise TypeError(f"token ids must be a flat sequence of integers: {error}") from None
    if sys.byteorder == "big":
        packed.byteswap()
    data = packed.tobytes()
    if not data[3::4].isascii():  # the top byte of each id: its sign bit must be clear
        raise ValueError(f"token ids must be between 0 and {MAX_TOKEN_ID}")
    return data


def _pack_buffer(view: memoryview) -> "array[int]":
    if view.ndim != 1:
        raise TypeError(f"it has {view.ndim} dimensions")
    kind = view.format.lstrip("@=" + ("<" if sys.byteorder == "little" else ">"))
    if kind not in tuple("bBhHiIlLqQnN"):
        raise TypeError(f"its elements have the format {view.format!r}")
    packed = array("I")
    if view.itemsize == packed.itemsize:  # a negative int32 shows in the sign bit, checked by the caller
        packed.frombytes(view.tobytes())
        return packed
    if view.itemsize == 8:
        words = array("I", view.tobytes())
        low, high = (words[0::2], words[1::2]) if sys.byteorder == "little" else (words[1::2], words[0::2])
        if high.tobytes().count(0) != len(view) * 4:
            raise OverflowError
        return low
    return array("I", view.tolist())


def check_label(name: str, value: str) -> str:
    """A salt or an adapter's name: text of at most 128 bytes without control characters."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    try:
        encoded = value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not valid Unicode text") from None
    if len(encoded) > MAX_SALT_BYTES:
        raise ValueError(f"{name} is {len(encoded)} bytes long, at most {MAX_SALT_BYTES} are allowed")
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in value):
        raise ValueError(f"{name} contains control characters")
    return value


def check_media(media: Media, tokens: int) -> tuple[tuple[int, bytes], ...]:
    """Media items, in strictly ascending token offsets within the prompt."""
    previous = -1
    for item in media:
        try:
            offset, digest = item
        except (TypeError, ValueError):
            raise TypeError("media must be pairs of (token offset, digest)") from None
        if not isinstance(offset, int) or not isinstance(digest, bytes):
            raise TypeError("media must be pairs of (int, bytes)")
        if not previous < offset < tokens:
            raise ValueError(f"media offset {offset} is not in ascending order within {tokens} tokens")
        if not 1 <= len(digest) <= MAX_DIGEST_BYTES:
            raise ValueError(f"a media digest must have 1 to {MAX_DIGEST_BYTES} bytes, not {len(digest)}")
        previous = offset
    return tuple((offset, digest) for offset, digest in media)


def chain_tokens(start: bytes, packed: bytes, chunk_tokens: int, media: Media = ()) -> list[bytes]:
    """Chunk hashes of packed token ids: hash(previous || ids of the chunk || the media that begin in it)."""
    size = chunk_tokens * 4
    previous, hashes = start, []
    extra = _media_by_chunk(media, chunk_tokens)
    for index, begin in enumerate(range(0, len(packed) - size + 1, size)):
        data = previous + packed[begin : begin + size]
        if index in extra:
            data += extra[index]
        previous = blake3(data).digest()
        hashes.append(previous)
    return hashes


def _media_by_chunk(media: Media, chunk_tokens: int) -> dict[int, bytes]:
    extra: dict[int, bytes] = {}
    for offset, digest in media:
        index, within = divmod(offset, chunk_tokens)
        extra[index] = extra.get(index, b"") + pack("<II", within, len(digest)) + digest
    return extra


def chain_blocks(start: bytes, blocks: Sequence[bytes], blocks_per_chunk: int) -> list[bytes]:
    """Chunk hashes of an engine's block hashes: hash(previous || length-prefixed block hashes of the chunk)."""
    previous, hashes = start, []
    for begin in range(0, len(blocks) - blocks_per_chunk + 1, blocks_per_chunk):
        run = blocks[begin : begin + blocks_per_chunk]
        previous = blake3(previous + b"".join(pack("<I", len(b)) + b for b in run)).digest()
        hashes.append(previous)
    return hashes


def check_blocks(blocks: Sequence[bytes]) -> tuple[bytes, ...]:
    """An engine's chained block hashes: bytes of 8 to 64 each."""
    if isinstance(blocks, (str, bytes, bytearray)):
        raise TypeError("block hashes must be a sequence of bytes, one for each block")
    checked = tuple(blocks)
    for block in checked:
        if not isinstance(block, bytes):
            raise TypeError(f"a block hash must be bytes, not {type(block).__name__}")
        if not 8 <= len(block) <= MAX_DIGEST_BYTES:
            raise ValueError(f"a block hash must have 8 to {MAX_DIGEST_BYTES} bytes, not {len(block)}")
    return checked
