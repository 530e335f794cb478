"""What a policy has learned, as bytes: so that a restart need not begin anew, and what has left takes little memory."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from xxhash import xxh3_64_digest

from async_cache.retention.branches import DIGEST_BYTES, Branch, Run
from async_cache.retention.reuse import BINS, NO_GAP, UNTOLD

_CHECKSUM_BYTES = 8
_AT_ONCE = 4096  # chunks in a piece: a millisecond or two

Count = Annotated[int, Meta(ge=0)]


class Told(Struct, frozen=True, array_like=True):
    """A branch. `runs`: of each the chunks, the touches and the gap. `seconds`: since it was used."""

    digests: bytes
    begin: Count
    parent: bytes
    runs: list[tuple[Annotated[int, Meta(ge=1)], Annotated[int, Meta(ge=1)], Annotated[int, Meta(ge=0, le=NO_GAP)]]]
    seconds: Annotated[float, Meta(ge=0)]
    new: Annotated[int, Meta(ge=0, le=16)]
    output: Annotated[int, Meta(ge=UNTOLD, le=16)]
    output_bins: Annotated[int, Meta(ge=UNTOLD, le=BINS)]
    turn: Count
    cut: Annotated[int, Meta(ge=0, le=3)]
    tail: bool
    bin: Annotated[int, Meta(ge=0, lt=BINS)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Told)


def pieces_of(branches: Iterable[Branch], now: float) -> Iterator[bytes]:
    """Branches as bytes, some in each piece."""
    told: list[Told] = []
    chunks = 0
    for branch in branches:
        told.append(_told(branch, now - branch.used))
        chunks += len(branch)
        if chunks >= _AT_ONCE:
            yield msgspec.msgpack.encode(told)
            told, chunks = [], 0
    yield msgspec.msgpack.encode(told)


def branches_of(piece: bytes, now: float) -> list[Branch]:
    """The branches of a piece, without members. Raises ValueError for what is none."""
    try:
        all_told = msgspec.msgpack.decode(piece, type=list[Told])
    except msgspec.DecodeError as error:
        raise ValueError(f"these are no branches: {error}") from error
    for told in all_told:
        chunks = sum(run[0] for run in told.runs)
        if not chunks or len(told.digests) != chunks * DIGEST_BYTES or len(told.parent) not in (0, DIGEST_BYTES):
            raise ValueError("a branch has as many digests as chunks")
    return [_branch(told, now - told.seconds) for told in all_told]


def pack(branch: Branch) -> bytes:
    """A branch without members in less than half of the memory. It begins with its first digest."""
    return branch.digests[:DIGEST_BYTES] + _encoder.encode(_told(branch, max(branch.used, 0.0)))


def unpack(packed: bytes) -> Branch:
    """The branch that was packed, not judged yet."""
    told = _decoder.decode(memoryview(packed)[DIGEST_BYTES:])
    return _branch(told, told.seconds)


def _told(branch: Branch, seconds: float) -> Told:
    runs = [(run.chunks, run.touches, run.gap) for run in branch.runs]
    output = branch.output, branch.output_bins
    rest = branch.new, *output, branch.turn, branch.cut, branch.tail, branch.bin
    return Told(branch.digests, branch.begin, branch.parent, runs, seconds, *rest)


def _branch(told: Told, used: float) -> Branch:
    runs = [Run(*run) for run in told.runs]
    rest = told.new, told.output, told.output_bins, told.turn, told.cut, told.tail
    branch = Branch(told.digests, told.begin, told.parent, runs, used, *rest)
    branch.bin = told.bin
    return branch


def seal(pieces: Sequence[bytes]) -> bytes:
    """The pieces of what a policy has learned as one note."""
    content = msgspec.msgpack.encode(pieces)
    return xxh3_64_digest(content) + content


def unseal(note: bytes) -> list[bytes]:
    """The pieces in a note. Raises ValueError where it is damaged."""
    checksum, content = note[:_CHECKSUM_BYTES], note[_CHECKSUM_BYTES:]
    if xxh3_64_digest(content) != checksum:
        raise ValueError("the checksum does not fit")
    return msgspec.msgpack.decode(content, type=list[bytes])
