"""What is left of the paths of requests: rows of chunks that one request used last, and what is known of them."""

from typing import Any, Protocol, Self

from msgspec import Struct

from async_cache.retention.reuse import UNKNOWN, Kind, kind_of

DIGEST_BYTES = 8
"""What is remembered of a chunk."""
HELD, SUSPENDED, SHOWN = 0, -1, -2
"""Why a branch has no entry in the heap."""


class Member(Protocol):
    """An item that can be in a branch."""

    chunk_hash: bytes
    older: Self | None  # the member before it
    newer: Self | None  # the member behind it
    node: Any


class Run(Struct, gc=False):
    """Chunks of a branch, side by side, of which the same is known."""

    begin: int  # in chunks from the beginning of the path
    end: int
    touches: int  # requests that asked for them
    gap: int  # between their last two uses, see `gap_of`
    tail: bool = False  # one chunk, which is shorter than others
    kind: Kind = UNKNOWN


class Branch(Struct, gc=False, eq=False):
    """What is left of the path of one request: a row of chunks, some of them members, the others remembered.

    The deepest member may leave next. The branch has an entry in the heap then; or it is HELD, since other branches
    hang on that member, SUSPENDED, or being SHOWN.
    """

    digests: bytes
    begin: int  # where they begin, in chunks from the beginning of the path
    parent: bytes  # the digest of the chunk before; of none, at the root
    runs: list[Run]
    used: float  # seconds
    new_tokens: int
    output_tokens: int | None
    turn: int  # requests that this one went on from
    cut: int = 0  # see `cut_of`
    bin: int = 0
    members: int = 0
    first: Any = None
    deepest: Any = None
    entry: int = HELD
    dropped: bool = False

    def __len__(self) -> int:
        return len(self.digests) // DIGEST_BYTES

    def place_of(self, chunk_hash: bytes) -> int:
        """Where a chunk of it is, in chunks from the beginning of the path; -1: it is none of its chunks."""
        digest = chunk_hash[:DIGEST_BYTES]
        at = (self.members - 1) * DIGEST_BYTES  # where the deepest is, unless some before it are missing
        if at < 0 or self.digests[at : at + DIGEST_BYTES] != digest:
            at = self.digests.find(digest)
            while at % DIGEST_BYTES and at >= 0:
                at = self.digests.find(digest, at + 1)
        return self.begin + at // DIGEST_BYTES if at >= 0 else -1

    def run_at(self, place: int) -> Run:
        """The run of the chunk that is so far from the beginning of the path."""
        for run in reversed(self.runs):
            if run.begin <= place:
                return run
        return self.runs[0]  # digests that are not chained may be in two places


def judge(branch: Branch) -> None:
    """Find out of which kinds the chunks of a branch are."""
    for run in branch.runs:
        run.kind = kind_of(
            run.touches, run.tail, branch.cut, branch.new_tokens, branch.output_tokens, branch.turn, run.gap
        )


def extend(runs: list[Run], begin: int, end: int, touches: int, gap: int) -> None:
    """Add chunks to the end of a path."""
    if runs and (runs[-1].touches, runs[-1].gap) == (touches, gap):
        runs[-1].end = end
    else:
        runs.append(Run(begin, end, touches, gap))


def common(digests: bytes, path: bytes, begin: int) -> int:
    """How many bytes of a path, from there on, are the same as these from their beginning, in whole digests."""
    low, high = 0, min(len(digests), len(path) - begin)
    if digests[:high] == path[begin : begin + high]:
        return high
    while high - low > DIGEST_BYTES:  # the first `low` are the same, and not the first `high`
        middle = (low + high) // (2 * DIGEST_BYTES) * DIGEST_BYTES
        if digests[low:middle] == path[begin + low : begin + middle]:
            low = middle
        else:
            high = middle
    return low
