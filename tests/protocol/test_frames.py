"""Frames: however the bytes come, the payloads are the same; and what a length promises costs nothing."""

import tracemalloc
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_cache import ProtocolError
from async_cache.protocol.frames import HEADER_BYTES, MAX_PAYLOAD_BYTES, FrameReader, frame

payloads = st.lists(st.binary(min_size=1, max_size=300), max_size=8)


def fed(reader: FrameReader, pieces: Sequence[bytes]) -> list[bytes]:
    return [bytes(payload) for piece in pieces for payload in reader.feed(piece)]


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    ends = sorted(place for place in places if place < len(data))
    return [data[begin:end] for begin, end in pairwise([0, *ends, len(data)])]


@given(payloads, st.lists(st.integers(0, 2500)))
def test_every_split_of_a_stream_gives_the_same_payloads(sent: list[bytes], places: list[int]) -> None:
    stream = b"".join(map(frame, sent))
    assert fed(FrameReader(), cut(stream, places)) == sent


def test_a_stream_that_comes_byte_by_byte_or_cut_in_two_anywhere_gives_the_same_payloads() -> None:
    sent = [b"a", bytes(255), b"xyz", bytes(70_000), b"end"]
    stream = b"".join(map(frame, sent))
    assert fed(FrameReader(), [stream[n : n + 1] for n in range(len(stream))]) == sent
    for place in (*range(300), len(stream) - 4, len(stream) - 1):
        assert fed(FrameReader(), [stream[:place], stream[place:]]) == sent


@given(payloads, st.binary(min_size=1, max_size=300))
def test_an_incomplete_frame_gives_nothing(sent: list[bytes], last: bytes) -> None:
    stream = b"".join(map(frame, sent))
    for end in range(len(frame(last))):
        assert fed(FrameReader(), [stream + frame(last)[:end]]) == sent


def test_payloads_are_read_where_they_lie() -> None:
    stream = frame(bytes(1000)) * 2
    assert all(payload.obj is stream for payload in FrameReader().feed(stream))


@pytest.mark.parametrize("size", [1, MAX_PAYLOAD_BYTES])
def test_a_payload_of_a_size_within_bounds_is_taken(size: int) -> None:
    assert [len(payload) for payload in FrameReader().feed(frame(bytes(size)))] == [size]


@pytest.mark.parametrize("size", [0, MAX_PAYLOAD_BYTES + 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("before", [b"", frame(b"good")])
def test_a_length_out_of_bounds_is_refused_as_soon_as_it_is_known(size: int, before: bytes) -> None:
    header = size.to_bytes(HEADER_BYTES, "little")
    for pieces in ([before + header], [before + header[:2], header[2:]], [before, header + b"x"]):
        reader = FrameReader()
        with pytest.raises(ProtocolError, match=f"{size} bytes"):
            fed(reader, pieces)


def test_after_a_bad_length_nothing_can_be_read() -> None:
    reader = FrameReader(100)
    for data in (bytes(2), bytes(2), frame(b"good")):
        try:
            assert fed(reader, [data]) == []
        except ProtocolError:
            continue


def test_the_limit_of_a_reader_is_its_own() -> None:
    assert fed(FrameReader(4), [frame(b"four")]) == [b"four"]
    with pytest.raises(ProtocolError, match="1 to 4"):
        fed(FrameReader(4), [frame(b"fives")])


@pytest.mark.parametrize("payload", [b"", bytes(MAX_PAYLOAD_BYTES + 1)], ids=len)
def test_a_payload_that_the_other_end_would_refuse_is_not_sent(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        frame(payload)


@pytest.mark.parametrize("size", [MAX_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES + 1, 2**32 - 1])
def test_a_size_bomb_allocates_nothing(size: int) -> None:
    tracemalloc.start()
    try:
        for _ in range(100):
            reader = FrameReader()
            try:
                assert fed(reader, [size.to_bytes(HEADER_BYTES, "little"), b"boom"]) == []
            except ProtocolError:
                continue
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**10
    finally:
        tracemalloc.stop()


def test_a_reader_keeps_one_frame_and_what_follows_it_and_no_more() -> None:
    reader, piece = FrameReader(), frame(bytes(1000))
    tracemalloc.start()
    try:
        for _ in range(1000):
            assert fed(reader, [piece[:500], piece[500:]]) == [bytes(1000)]
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**10
    finally:
        tracemalloc.stop()
