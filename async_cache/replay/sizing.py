"""How much memory a trace is worth: what it asks for at all, and the least that finds so much of that."""

from collections.abc import Sequence
from math import log2

from msgspec import Struct

from async_cache.recording.trace import Trace
from async_cache.replay.run import Found
from async_cache.replay.sweep import Point

_MOST_CAPACITIES = 12


class Demand(Struct, frozen=True):
    """What a trace asks for, whatever is cached. `found`: with room for all, in the part of it that counts."""

    requests: int
    seconds: float
    tokens: int
    longest_tokens: int
    distinct_tokens: int
    found: Found

    @property
    def computed_tokens_per_second(self) -> float:
        """What would be computed and stored, with room for all."""
        return self.distinct_tokens / self.seconds if self.seconds else 0.0


def demand(trace: Trace, *, measured_share: float = 0.5) -> Demand:
    """Look at what a trace asks for; the last requests, of this share, count as found."""
    measured_from = round(len(trace.requests) * (1 - measured_share))
    seen: set[bytes] = set()
    tokens = distinct = asked = hits = 0
    for number, request in enumerate(trace.requests):
        known = 0
        for chunk_hash, size in zip(request.path, request.chunk_sizes(), strict=True):
            if chunk_hash in seen:
                known += size
            else:
                seen.add(chunk_hash)
                distinct += size
        tokens += request.tokens
        if number >= measured_from:
            asked += request.tokens
            hits += known
    first, last = trace.requests[0].at_seconds, trace.requests[-1].at_seconds
    longest = max(request.tokens for request in trace.requests)
    return Demand(len(trace.requests), last - first, tokens, longest, distinct, Found(asked, hits, False))


def capacities(of: Demand, bytes_per_token: int) -> list[int]:
    """Powers of two between the longest prompt and all that was asked for, at most a dozen."""
    most = max(of.distinct_tokens, of.longest_tokens) * bytes_per_token
    powers = range((of.longest_tokens * bytes_per_token).bit_length(), most.bit_length() + 1)
    return [2**power for power in powers[-_MOST_CAPACITIES:]]


def capacity_for(points: Sequence[Point], hit_rate: float) -> int | None:
    """The capacity that finds so much, between those that were replayed; None: the largest of them does not."""
    before: Point | None = None
    for point in sorted(points, key=lambda point: point.capacity_bytes):
        if point.found.hit_rate >= hit_rate:
            if before is None:
                return point.capacity_bytes
            part = (hit_rate - before.found.hit_rate) / (point.found.hit_rate - before.found.hit_rate)
            least, most = log2(before.capacity_bytes), log2(point.capacity_bytes)
            return round(2 ** (least + part * (most - least)))
        before = point
    return None
