"""Token ids -> chained chunk hashes -> object keys. Pure functions; `docs/keys.md` has the format and test vectors.

Everything is BLAKE3 with 32-byte digests and little-endian integers. The chain starts from a root over what fixes the
meaning and the shape of the bytes, so one digest identifies a chunk among all models, layouts, adapters and tenants.
"""

import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import string_at
from functools import lru_cache
from itertools import islice
from struct import Struct, pack
from typing import Any, NamedTuple

from blake3 import blake3

MAX_TOKEN_ID = 2**31 - 1
MAX_SALT_BYTES = 128
MAX_DIGEST_BYTES = 64
_YIELD_CHUNKS = 256  # a quarter of a millisecond

Media = Sequence[tuple[int, bytes]]

_PLAIN = frozenset({list, tuple, memoryview, array})
"""Kinds of tokens that are read as they are."""

_TORCH_FORMATS = {
    "torch.int8": "b", "torch.int16": "h", "torch.int32": "i", "torch.int64": "q",
    "torch.uint8": "B", "torch.uint16": "H", "torch.uint32": "I", "torch.uint64": "Q",
}  # fmt: skip
_BYTEORDERS = {
    order + kind: {"<": "little", ">": "big", "!": "big"}.get(order, sys.byteorder)
    for order in ("", "@", "=", "<", ">", "!")
    for kind in "bBhHiIlLqQnN"
}
"""By the format of a buffer of integers, the order of their bytes."""


class ObjectKey(NamedTuple):
    """The identity of stored bytes: one chunk (32-byte chained hash), one rank, one group."""

    chunk_hash: bytes
    rank: int
    group: int


def root(fields: Iterable[str], packed: bytes = b"") -> bytes:
    """Digest of fields, and of more that are packed already: the start of a chain."""
    return blake3(b"async_cache root 1\n" + pack_fields(fields) + packed).digest()


def segment_root(context: bytes, fields: Sequence[str], packed: bytes = b"") -> bytes:
    """As `root`, of a segment: behind its domain, which tells packed token ids of a context by count and digest."""
    return root((f"segment/{len(context) // 4}/{blake3(context).hexdigest()}", *fields), packed)


def pack_fields(fields: Iterable[str]) -> bytes:
    """Fields in UTF-8, each behind its length."""
    return b"".join(pack("<I", len(e)) + e for e in [field.encode() for field in fields])


def pack_tokens(tokens: Any) -> bytes:
    """Token ids as little-endian uint32, whatever integers they came as.

    Takes a sequence of int, an `array`, a one-dimensional NumPy array or torch tensor, or a buffer of integers.
    Raises TypeError for what is not integers and ValueError for an id outside 0..2**31-1.
    """
    if type(tokens) not in _PLAIN:
        tokens = _plain(tokens)
    try:
        data = _pack_list(tokens) if isinstance(tokens, (list, tuple)) else _pack_view(_view(tokens))
    except OverflowError:
        raise ValueError(f"token ids must be between 0 and {MAX_TOKEN_ID}") from None
    except (TypeError, ValueError) as error:  # ValueError: it cannot be seen as a buffer, NumPy's dates for one
        if isinstance(tokens, Sequence) and not isinstance(tokens, (list, tuple, memoryview, array)):
            return pack_tokens(list(tokens))
        raise TypeError(f"token ids must be a flat sequence of integers: {error}") from None
    if not data[3::4].isascii():  # the top byte of each id: its sign bit must be clear
        raise ValueError(f"token ids must be between 0 and {MAX_TOKEN_ID}")
    return data


def _plain(tokens: Any) -> Any:
    """What is left of the kinds of tokens that have to be looked at before they are read."""
    if isinstance(tokens, str):
        raise TypeError("token ids must be integers, not text: a tokenizer makes them")
    if isinstance(tokens, (bytes, bytearray)):
        raise TypeError("token ids must be integers; cast raw bytes with memoryview(...).cast('i')")
    return _view_tensor(tokens) if hasattr(tokens, "detach") else tokens  # a torch tensor, without importing torch


def _pack_list(tokens: list[int] | tuple[int, ...]) -> bytes:
    return _little_endian(array("I", tokens), sys.byteorder)


def _little_endian(words: "array[int]", order: str) -> bytes:
    if order == "big":
        words.byteswap()
    return words.tobytes()


def _view(tokens: Any) -> memoryview:
    if type(tokens) is memoryview:
        return tokens
    try:
        return memoryview(tokens)
    except TypeError:
        raise TypeError(f"a {type(tokens).__name__} is none") from None


def _view_tensor(tensor: Any) -> memoryview:
    """A copy of a torch tensor's integers, made without NumPy: torch may be installed without it."""
    kind = _TORCH_FORMATS.get(str(tensor.dtype))
    if kind is None:
        raise TypeError(f"token ids must be integers, not {tensor.dtype}")
    if tensor.dim() != 1:
        raise TypeError(f"token ids must be a flat sequence of integers: it has {tensor.dim()} dimensions")
    tensor = tensor.detach().cpu().contiguous()
    return memoryview(string_at(tensor.data_ptr(), tensor.nbytes)).cast(kind)  # type: ignore[call-overload, no-any-return]


def _pack_view(view: memoryview) -> bytes:
    if view.ndim != 1:
        raise TypeError(f"it has {view.ndim} dimensions")
    byteorder = _BYTEORDERS.get(view.format)
    if byteorder is None:
        raise TypeError(f"its elements have the format {view.format!r}")
    data = _bytes_of(view)
    if view.itemsize == 4:  # a negative id shows in its sign bit, checked by the caller
        return data if byteorder == "little" else _little_endian(array("I", data), byteorder)
    if view.itemsize == 8:
        halves = memoryview(data).cast("I")
        low, high = (halves[0::2], halves[1::2]) if byteorder == "little" else (halves[1::2], halves[0::2])
        if high.tobytes() != bytes(4 * len(high)):
            raise OverflowError
        return low.tobytes() if byteorder == "little" else _little_endian(array("I", low.tobytes()), byteorder)
    code = {1: "b", 2: "h"}[view.itemsize]
    words = array(code.upper() if view.format.isupper() else code, data)
    if byteorder != sys.byteorder:
        words.byteswap()
    return _little_endian(array("I", words), sys.byteorder)


def _bytes_of(view: memoryview) -> bytes:
    """What is in a view. Where that is all of some `bytes`, it is these, whose hash is computed only once."""
    known: Any = view.obj
    if type(known) is bytes and len(known) == view.nbytes and view.contiguous:
        return known
    return view.tobytes()


def check_text(name: str, value: str) -> bytes:
    """Text that has a UTF-8 form, in that form."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not valid Unicode text") from None


def check_label(name: str, value: str) -> str:
    """A salt or an adapter's name: text of at most 128 bytes without control characters."""
    size = len(check_text(name, value))
    if size > MAX_SALT_BYTES:
        raise ValueError(f"{name} is {size} bytes long, at most {MAX_SALT_BYTES} are allowed")
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in value):
        raise ValueError(f"{name} contains control characters")
    return value


def check_media(media: Media, tokens: int) -> tuple[tuple[int, bytes], ...]:
    """Media items, in strictly ascending token offsets within the prompt."""
    previous, checked = -1, []
    if not isinstance(media, Iterable):
        raise TypeError(f"media must be pairs of (token offset, digest), not {media!r}")
    for item in media:
        try:
            offset, digest = item
        except (TypeError, ValueError):
            raise TypeError("media must be pairs of (token offset, digest)") from None
        if type(offset) is not int or not isinstance(digest, bytes):
            raise TypeError("media must be pairs of (int, bytes)")
        if not previous < offset < tokens:
            raise ValueError(f"media offset {offset} is not in ascending order within {tokens} tokens")
        if not 1 <= len(digest) <= MAX_DIGEST_BYTES:
            raise ValueError(f"a media digest must have 1 to {MAX_DIGEST_BYTES} bytes, not {len(digest)}")
        checked.append((offset, digest))
        previous = offset
    return tuple(checked)


def chain_tokens(start: bytes, packed: bytes, chunk_tokens: int, media: Media = ()) -> list[bytes]:
    """Chunk hashes of packed token ids: hash(previous || ids of the chunk || the media that begin in it)."""
    chunks = len(packed) // (chunk_tokens * 4)
    pieces = _cut_into(chunk_tokens)(packed[: chunks * chunk_tokens * 4])
    previous = start
    hashes: list[bytes] = []
    extra = _media_by_chunk(media, chunk_tokens) if media else {}
    hasher = blake3()  # one for all: to make it takes as long as to hash a chunk
    reset, update, digest, append = hasher.reset, hasher.update, hasher.digest, hashes.append
    while len(hashes) < chunks:
        if hashes:
            time.sleep(0)  # in a thread: who waits for the interpreter's lock gets it now, and not after 5 ms
        for (ids,) in islice(pieces, _YIELD_CHUNKS):
            reset()
            update(previous + ids)
            if extra:
                update(extra.get(len(hashes), b""))
            previous = digest()
            append(previous)
    return hashes


@lru_cache(maxsize=64)
def _cut_into(chunk_tokens: int) -> Callable[[bytes], Iterator[tuple[bytes]]]:
    """Cuts packed ids into chunks, faster than a slice for each."""
    return Struct(f"{4 * chunk_tokens}s").iter_unpack


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


def hash_each(start: bytes, digests: Sequence[bytes]) -> list[bytes]:
    """Chunk hashes of an engine's digests of chunks, each on its own: hash(start || length-prefixed digest)."""
    before = {size: start + pack("<I", size) for size in set(map(len, digests))}  # of one length, most often
    hashes = []
    hasher = blake3()  # one for all, as for a chain
    reset, update, hashed = hasher.reset, hasher.update, hasher.digest
    for digest in digests:
        reset()
        update(before[len(digest)] + digest)
        hashes.append(hashed())
    return hashes


def check_blocks(blocks: Sequence[bytes]) -> tuple[bytes, ...]:
    """An engine's chained block hashes: bytes of 8 to 64 each."""
    if isinstance(blocks, (str, bytes, bytearray)):
        raise TypeError("block hashes must be a sequence of bytes, one for each block")
    checked = tuple(blocks)
    for kind in set(map(type, checked)):  # there may be very many: without a step of Python for each
        if not issubclass(kind, bytes):
            raise TypeError(f"a block hash must be bytes, not {kind.__name__}")
    for size in set(map(len, checked)):
        if not 8 <= size <= MAX_DIGEST_BYTES:
            raise ValueError(f"a block hash must have 8 to {MAX_DIGEST_BYTES} bytes, not {size}")
    return checked
