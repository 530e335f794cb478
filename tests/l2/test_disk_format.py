"""The format on disk is the one that the document tells of."""

import re
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from async_cache.l2.filesystem.format import (
    MARKER_LINE,
    PAGE_BYTES,
    RECORD_BYTES,
    VERSION,
    Kind,
    header,
    header_version,
    index_name,
    is_whole,
    marker_version,
    pages,
    parse_index,
    parse_segment,
    record,
    records,
    segment_name,
)

DOCUMENT = (Path(__file__).parents[2] / "docs" / "disk.md").read_text()
WRITER = 0x0123456789ABCDEF
HASH = bytes(range(32))
CHECKSUM = xxh3_64_intdigest(b"abc")


def vector(name: str) -> bytes:
    match = re.search(rf"^    {name}\n((?:      [0-9a-f]+\n)+)", DOCUMENT, re.MULTILINE)
    assert match
    return bytes.fromhex("".join(match[1].split()))


def test_the_vectors_of_the_document() -> None:
    assert header(WRITER) == vector("header")
    for kind in Kind:
        assert record(kind, (HASH, 3, 7), (WRITER, 1, 2), 3, CHECKSUM) == vector(kind.name)
        (found,) = records(vector(kind.name))
        assert found[:-1] == (kind, 3, 7, 1, WRITER, 2, 0, 3, HASH, CHECKSUM)
    of_one = record(Kind.PUT, (HASH, 3, 7), (WRITER, 1, 2), 3, CHECKSUM, 0xC0FFEE)
    assert of_one == vector("PUT of number 0x00c0ffee") and records(of_one)[0][6] == 0xC0FFEE
    assert header_version(vector("header"), WRITER) == VERSION
    assert f"`{(MARKER_LINE % VERSION).decode().strip()}`" in DOCUMENT


def test_every_bit_of_a_record_and_of_a_header_counts() -> None:
    for whole in (vector("header"), vector("PUT")):
        assert is_whole(whole)
        for bit in range(8 * RECORD_BYTES):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            assert not is_whole(bytes(damaged))
            assert records(bytes(damaged)) == []
    assert header_version(header(1), 2) is None


def test_what_was_damaged_or_torn_is_left_out_and_the_others_are_read() -> None:
    block = b"".join(record(Kind.PUT, (HASH, n, 0), (WRITER, 0, n), 1, 0) for n in range(5))
    damaged = bytearray(block)
    damaged[2 * RECORD_BYTES + 5] ^= 1
    assert [each[1] for each in records(bytes(damaged))] == [0, 1, 3, 4]
    assert [each[1] for each in records(block[:-1])] == [0, 1, 2, 3]
    assert records(bytes(10 * RECORD_BYTES)) == []


WELL = "0" * 16 + ".00000000"


@pytest.mark.parametrize(
    "name",
    ["", "FORMAT", WELL, f"{WELL}.seg.bad", f"{WELL}.seg\n", f"0{WELL}.seg", "0" * 16 + ".0.seg", f"A{WELL[1:]}.seg"],
)
def test_other_names_are_foreign(name: str) -> None:
    assert parse_segment(name) is None
    assert parse_index(name.replace("seg", "idx")) is None


def test_names_and_pages() -> None:
    assert parse_segment(segment_name(WRITER, 17)) == (WRITER, 17)
    assert parse_index(index_name(WRITER, 2**32 - 1)) == (WRITER, 2**32 - 1)
    assert [pages(size) for size in (1, PAGE_BYTES, PAGE_BYTES + 1)] == [1, 1, 2]
    assert marker_version(b"async_cache log of segments, version 3\n") == 3
    assert marker_version(b"async_cache log of segments, version 3") is None
