"""What is said of a request: the hits that it was promised, and the result of its load."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from async_cache.advice import Adviser
from async_cache.prompt.layout import Prompt
from async_cache.prompt.parts import Parts, Run
from async_cache.read.request import Request
from async_cache.values import LoadResult, LookupHits, Missed, SegmentHits, SegmentResult, Shortfall

T = TypeVar("T")


class Miss(NamedTuple):
    """Why less is promised of a prompt than it asks for: less than there `is`, or than is there."""

    shortfall: Shortfall | None = None
    missed: Missed | None = None


class Promised(NamedTuple):
    """What is said of a request beside what it is promised, which its record has.

    `found` is how much there is of each of its prompts, and `misses` are those that are not promised whole, by number.
    `loads`: the objects that are to be loaded, by chunk.
    """

    found: Sequence[int]
    misses: Mapping[int, Miss] = {}
    loads: Mapping[int, int] = {}
    expected_load_seconds: float | None = 0.0


_NO_MISS = Miss()


def nothing(request: Request, reason: Shortfall) -> Promised:
    """Nothing is promised, of any of its prompts, for this reason."""
    count = len(request.prompt.parts)
    return Promised([0] * count, dict.fromkeys(range(count), Miss(reason)))


def hits_of(request: Request, promised: Promised, adviser: Adviser | None) -> LookupHits:
    """What a request is promised, and what `adviser` says of a single prompt; of others it hears what they lack."""
    prompt = request.prompt
    if not isinstance(prompt, Parts):
        return _hits(request, promised, 0, prompt, request.from_l2, adviser)
    from_l2_by_part = _from_l2_by_part(request)
    if promised.misses or request.from_l2:
        parts = [
            _hits(request, promised, n, part, from_l2, None)
            for n, (part, from_l2) in enumerate(zip(prompt.parts, from_l2_by_part, strict=True))
        ]
    else:
        parts = _hits_in_l1(request, prompt)
    loads, sizes = promised.loads, prompt.layout.objects.sizes
    chunks, l2_chunks = request.length, _count(from_l2_by_part)
    if adviser is not None:
        adviser.computes(prompt.tokens - chunks * prompt.layout.chunk_tokens)
    return SegmentHits(
        request_id=request.request_id,
        start_chunk=0,
        chunks=chunks,
        tokens=chunks * prompt.layout.chunk_tokens,
        l1_chunks=chunks - l2_chunks,
        l2_chunks=l2_chunks,
        found_chunks=sum(promised.found),
        shortfall=_first([part.shortfall for part in parts]) if promised.misses else None,
        load_bytes=sum(map(sizes.__getitem__, loads.values())),
        expected_load_seconds=promised.expected_load_seconds,
        missed=_first([part.missed for part in parts]) if promised.misses else None,
        parts=tuple(parts),
    )


def _hits_in_l1(request: Request, asked: Parts) -> list[LookupHits]:
    """The hits of parts that are all there, in L1: without a call for each of many."""
    request_id, chunk_tokens = request.request_id, asked.layout.chunk_tokens
    return [
        LookupHits(
            request_id=request_id,
            start_chunk=0,
            chunks=length,
            tokens=length * chunk_tokens,
            l1_chunks=length,
            l2_chunks=0,
            found_chunks=length,
            expected_load_seconds=0.0,
            base_tokens=prompt.base_tokens,
        )
        for prompt, length in zip(asked.parts, request.lengths, strict=True)
    ]


def _hits(
    request: Request, promised: Promised, number: int, prompt: Prompt, from_l2: Sequence[int], adviser: Adviser | None
) -> LookupHits:
    length, start_chunk, chunk_tokens = request.lengths[number], request.start_chunk, prompt.layout.chunk_tokens
    shortfall, missed = promised.misses.get(number, _NO_MISS)
    loads, sizes = promised.loads, prompt.layout.objects.sizes
    masks = loads.values() if len(from_l2) == len(loads) else [loads[chunk] for chunk in from_l2]
    expected = promised.expected_load_seconds if from_l2 or len(request.lengths) == 1 else 0.0
    missing_tokens = prompt.tokens - (start_chunk + length) * chunk_tokens
    return LookupHits(
        request_id=request.request_id,
        start_chunk=start_chunk,
        chunks=length,
        tokens=length * chunk_tokens,
        l1_chunks=length - len(from_l2),
        l2_chunks=len(from_l2),
        found_chunks=promised.found[number],
        shortfall=shortfall,
        load_bytes=sum(map(sizes.__getitem__, masks)),
        expected_load_seconds=expected,
        missed=missed,
        recompute_from=adviser.recompute_from(start_chunk, from_l2, length, chunk_tokens, expected, missing_tokens)
        if adviser is not None
        else None,
        base_tokens=prompt.base_tokens,
    )


def result_of(request: Request, shortfalls: Mapping[int, Shortfall], seconds: float) -> LoadResult:
    """What a request has loaded, and why that is less than it was promised, by the number of its prompt."""
    prompt = request.prompt
    if not isinstance(prompt, Parts):
        return _result(request, prompt, request.lengths[0], len(request.from_l2), shortfalls.get(0), seconds)
    from_l2_by_part = _from_l2_by_part(request)
    if shortfalls or request.from_l2:
        told = enumerate(zip(prompt.parts, request.lengths, from_l2_by_part, strict=True))
        parts = [
            _result(request, part, length, len(from_l2), shortfalls.get(n), seconds)
            for n, (part, length, from_l2) in told
        ]
    else:
        parts = _results_in_l1(request, prompt, seconds)
    chunks, l2_chunks = request.length, _count(from_l2_by_part)
    return SegmentResult(
        request_id=request.request_id,
        start_chunk=0,
        chunks=chunks,
        tokens=chunks * prompt.layout.chunk_tokens,
        l1_chunks=chunks - l2_chunks,
        l2_chunks=l2_chunks,
        shortfall=_first([part.shortfall for part in parts]) if shortfalls else None,
        seconds=seconds,
        parts=tuple(parts),
    )


def _results_in_l1(request: Request, asked: Parts, seconds: float) -> list[LoadResult]:
    """The results of parts of which all that was promised is there, and was in L1: without a call for each of many."""
    request_id, chunk_tokens = request.request_id, asked.layout.chunk_tokens
    return [
        LoadResult(
            request_id=request_id,
            start_chunk=0,
            chunks=length,
            tokens=length * chunk_tokens,
            l1_chunks=length,
            l2_chunks=0,
            seconds=seconds,
            base_tokens=prompt.base_tokens,
        )
        for prompt, length in zip(asked.parts, request.lengths, strict=True)
    ]


def _result(
    request: Request, prompt: Prompt, length: int, from_l2: int, shortfall: Shortfall | None, seconds: float
) -> LoadResult:
    return LoadResult(
        request_id=request.request_id,
        start_chunk=request.start_chunk,
        chunks=length,
        tokens=length * prompt.layout.chunk_tokens,
        l1_chunks=length - from_l2,
        l2_chunks=from_l2,
        shortfall=shortfall,
        seconds=seconds,
        base_tokens=prompt.base_tokens,
    )


def _from_l2_by_part(request: Request) -> list[Sequence[int]]:
    """The chunks that are promised of each part, and come from L2."""
    from_l2 = request.from_l2
    if not from_l2:
        return [()] * len(request.lengths)
    return list(map(partial(_within, from_l2, frozenset(from_l2)), request.runs, request.lengths))


def _within(numbers: Sequence[int], same: frozenset[int], run: Run, length: int) -> Sequence[int]:
    if isinstance(run, range):
        return numbers[bisect_left(numbers, run.start) : bisect_left(numbers, run.start + length)]
    return [number for number in run[:length] if number in same]


def _count(by_part: Sequence[Sequence[int]]) -> int:
    return sum(map(len, by_part))


def _first(reasons: Sequence[T | None]) -> T | None:
    return next((reason for reason in reasons if reason is not None), None)
