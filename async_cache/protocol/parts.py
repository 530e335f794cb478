"""What is told of several prompts, as it travels: what is true of all together, and beside it that of each."""

from msgspec import structs

from async_cache.values import LoadResult, LookupHits, SegmentHits, SegmentResult


def split_hits(hits: LookupHits) -> tuple[LookupHits, list[LookupHits] | None]:
    """Hits as they travel."""
    if not isinstance(hits, SegmentHits):
        return hits, None
    fields = structs.asdict(hits)
    parts = fields.pop("parts")
    return LookupHits(**fields), list(parts)


def join_hits(hits: LookupHits, parts: list[LookupHits] | None) -> LookupHits:
    """The hits that have come."""
    return hits if parts is None else SegmentHits(**structs.asdict(hits), parts=tuple(parts))


def split_result(result: LoadResult) -> tuple[LoadResult, list[LoadResult] | None]:
    """A result as it travels."""
    if not isinstance(result, SegmentResult):
        return result, None
    fields = structs.asdict(result)
    parts = fields.pop("parts")
    return LoadResult(**fields), list(parts)


def join_result(result: LoadResult, parts: list[LoadResult] | None) -> LoadResult:
    """The result that has come."""
    return result if parts is None else SegmentResult(**structs.asdict(result), parts=tuple(parts))
