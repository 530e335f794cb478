"""Traces as they are in files."""

import gzip
import json
from pathlib import Path

import pytest

from async_cache.errors import ConfigError
from async_cache.recording.trace import Trace, lines, read_trace

MOONCAKE = [
    {"timestamp": 0, "input_length": 1300, "output_length": 50, "hash_ids": [7, 8, 9]},
    {"timestamp": 2500, "input_length": 1024, "output_length": 7, "hash_ids": [7, 8]},
    {"timestamp": 2500, "input_length": 1000, "output_length": 7, "hash_ids": [9, 8]},
]
OURS = [
    {"format": "async-cache trace", "version": 1, "chunk_tokens": 4},
    {"at": 0.5, "tokens": 9, "chunks": ["aa", "bb"]},
    {"at": 0.25, "tokens": 8, "output_tokens": 3, "chunks": ["aa", "bb"], "tenant": "other"},
]


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_mooncakes_format_has_chunks_of_512_tokens_and_a_shorter_one_at_the_end(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path / "t.jsonl", MOONCAKE))
    first, second, third = trace.requests
    assert (trace.chunk_tokens, first.at_seconds, first.tokens, first.output_tokens) == (512, 0.0, 1300, 50)
    assert first.chunk_sizes() == [512, 512, 276]
    assert second.path == first.path[:2]
    assert set(third.path).isdisjoint(first.path), "an id stands for all before it, too"


def test_our_own_format_is_sorted_by_time_and_tenants_do_not_meet(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path / "t.jsonl", OURS))
    early, late = trace.requests
    assert (trace.chunk_tokens, early.at_seconds, early.output_tokens, late.output_tokens) == (4, 0.25, 3, None)
    assert set(early.path).isdisjoint(late.path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_mark_at_the_beginning_of_a_file_says_nothing(tmp_path: Path, compressed: bool) -> None:
    text = written(tmp_path / "t.jsonl", OURS).read_text().encode("utf-8-sig")
    (tmp_path / "t.jsonl").write_bytes(gzip.compress(text) if compressed else text)
    assert len(read_trace(tmp_path / "t.jsonl").requests) == 2


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path / "t.jsonl", MOONCAKE))
    (tmp_path / "again.jsonl").write_text("\n".join(lines(trace)))
    again = read_trace(tmp_path / "again.jsonl")
    assert [(r.at_seconds, r.tokens, r.output_tokens, len(r.path)) for r in again.requests] == [
        (r.at_seconds, r.tokens, r.output_tokens, len(r.path)) for r in trace.requests
    ]
    assert common(again) == common(trace)


def common(trace: Trace) -> list[int]:
    """How many chunks each request has in common with the first."""
    first = trace.requests[0].path
    return [sum(a == b for a, b in zip(first, request.path, strict=False)) for request in trace.requests]


def test_gzip_is_recognised_by_what_is_in_the_file(tmp_path: Path) -> None:
    plain = written(tmp_path / "t.jsonl", MOONCAKE)
    (tmp_path / "compressed").write_bytes(gzip.compress(plain.read_bytes()))
    assert read_trace(tmp_path / "compressed") == read_trace(plain)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2"),
        ("[1]", "line 2"),
        ('{"timestamp": 1}', "'hash_ids'|'at'"),
        ('{"timestamp": -1, "input_length": 5, "hash_ids": [1]}', "no time"),
        ('{"timestamp": NaN, "input_length": 5, "hash_ids": [1]}', "no time"),
        ('{"timestamp": 1, "input_length": 5000, "hash_ids": [1]}', "not 1 chunks"),
        ('{"timestamp": 1, "input_length": 5, "hash_ids": [1, 2]}', "not 2 chunks"),
        ('{"timestamp": 1, "input_length": 5, "output_length": -1, "hash_ids": [1]}', "-1"),
        ('{"timestamp": 1, "input_length": 5, "hash_ids": 3}', "line 2"),
    ],
)
def test_what_is_no_request_is_refused_with_its_line(tmp_path: Path, line: str, told: str) -> None:
    path = written(tmp_path / "t.jsonl", MOONCAKE[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=told):
        read_trace(path)


@pytest.mark.parametrize(
    "header",
    [
        {"format": "another", "version": 1, "chunk_tokens": 4},
        {"format": "async-cache trace", "version": 2, "chunk_tokens": 4},
        {"format": "async-cache trace", "version": 1, "chunk_tokens": 0},
        {"format": "async-cache trace", "version": 1},
    ],
)
def test_another_format_or_version_is_refused(tmp_path: Path, header: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="line 1"):
        read_trace(written(tmp_path / "t.jsonl", [header]))


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\x1f\x8bnothing", b"\xff\xfe"])
def test_a_file_without_requests_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"t\.jsonl"):
        read_trace(path)
