"""What is left of the paths of requests: rows of chunks that one request used last, and what is known of them."""

from typing import Any, Protocol, Self

from msgspec import Struct

from async_cache.retention.reuse import Kind, ReuseModel

DIGEST_BYTES = 4
"""What is remembered of a chunk. Where two have the same, one of them is judged as the other."""
HELD, SUSPENDED, SHOWN, WAITING = -1, -2, -3, -4
"""Why a branch is not among the leaves."""


class Member(Protocol):
    """An item that can be in a branch."""

    chunk_hash: bytes
    older: Self | None  # the member before it
    newer: Self | None  # the member behind it
    node: Any


class Run(Struct, gc=False, eq=False):
    """Chunks of a branch, side by side, of which the same is known. Most of these numbers are small, and shared."""

    chunks: int
    touches: int  # requests that asked for them
    gap: int  # between their last two uses, see `gap_of`
    kind: Kind | None = None


class Place(Struct, gc=False, eq=False):
    """The place of a branch in the order of use."""

    branch: "Branch"
    older: "Place | None" = None
    newer: "Place | None" = None


class Branch(Struct, gc=False, eq=False):
    """What is left of the path of one request: a row of chunks, some of them members, the others remembered.

    The deepest member may leave next. The branch is among the leaves then, by its `rank`; or it is HELD, since other
    branches hang on that member, SUSPENDED, being SHOWN, or WAITING to be ranked.
    """

    digests: bytes
    begin: int  # where they begin, in chunks from the beginning of the path
    parent: bytes  # the digest of the chunk before; of none, at the root
    runs: list[Run]
    used: float  # seconds
    new: int  # tokens of the request, see `octave_of`
    output: int  # that of the request, see `output_of`
    output_bins: int
    turn: int  # requests that this one went on from
    cut: int = 0  # see `cut_of`
    tail: bool = False  # whether its last chunk is shorter than others
    told: tuple[bool, float | None] | None = None  # whether it will be asked for again, and how soon: an engine's
    lesson: bool = False  # whether what comes of it is learned from
    bin: int = 0
    ages: bool = False  # whether that changes as time goes by
    members: int = 0
    first: Any = None
    deepest: Any = None
    rank: int = HELD
    older: "Branch | None" = None  # among the leaves of this rank
    newer: "Branch | None" = None
    place: Place | None = None  # in the order of use, while it has members and is not suspended

    def __len__(self) -> int:
        return len(self.digests) // DIGEST_BYTES

    @property
    def is_over(self) -> bool:
        """Whether nothing is left of it."""
        return not self.digests and not self.members  # digests that are not chained may not tell where a member is

    def place_of(self, chunk_hash: bytes) -> int:
        """Where a chunk of it is, in chunks from the beginning of the path; -1: it is none of its chunks."""
        digest = chunk_hash[:DIGEST_BYTES]
        at = (self.members - 1) * DIGEST_BYTES  # where the deepest is, unless some before it are missing
        if at < 0 or self.digests[at : at + DIGEST_BYTES] != digest:
            at = self.digests.find(digest)
            while at % DIGEST_BYTES and at >= 0:
                at = self.digests.find(digest, at + 1)
        return self.begin + at // DIGEST_BYTES if at >= 0 else -1

    def run_at(self, place: int) -> tuple[Run, bool]:
        """The run of the chunk that is so far from the beginning of the path, and whether the run begins with it."""
        begin = self.begin + len(self.digests) // DIGEST_BYTES
        for run in reversed(self.runs):
            begin -= run.chunks
            if begin <= place:
                return run, begin == place
        return self.runs[0], True  # digests that are not chained may be in two places

    def extend(self, chunks: int, touches: int, gap: int) -> None:
        """So many chunks more have a run, at its end."""
        last = self.runs[-1] if self.runs else None
        if last is not None and last.touches == touches and last.gap == gap:
            last.chunks += chunks
        else:
            self.runs.append(Run(chunks, touches, gap))

    def part_tail(self) -> None:
        """Its last chunk is shorter than others: let it have a run of its own."""
        self.tail, last = True, self.runs[-1]
        if last.chunks > 1:
            last.chunks -= 1
            self.runs.append(Run(1, last.touches, last.gap))

    def cut_runs(self, chunks: int, *, head: bool) -> None:
        """Let only so many chunks have a run, those at its head or at its end."""
        runs, left = [], chunks
        for run in self.runs if head else reversed(self.runs):
            if left <= 0:
                break
            run.chunks = min(run.chunks, left)
            left -= run.chunks
            runs.append(run)
        self.runs = runs if head else runs[::-1]

    def judge(self, model: ReuseModel) -> None:
        """Find out of which kinds its chunks are."""
        last = self.runs[-1] if self.tail else None
        for run in self.runs:
            run.kind = model.kind(
                run.touches, run is last, self.cut, self.new, self.output, self.output_bins, self.turn, run.gap
            )


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
