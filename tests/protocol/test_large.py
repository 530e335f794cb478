"""Large requests: what takes long to decode is left to a thread, and is the same request then, or none."""

import random
from typing import Any
from unittest.mock import patch

import msgspec
import pytest

from async_cache import ProtocolError
from async_cache.protocol import messages as m
from async_cache.protocol.messages import LARGE_BYTES, Decoder, Large, encode, large, read

WHOLE = msgspec.msgpack.Decoder(m.Request)
BLOCKS = [n.to_bytes(8, "big") * (1 + n % 8) for n in range(20_000)]
EQUAL = [n.to_bytes(32, "big") for n in range(20_000)]
MEDIA = [(n * 7, b"x" * (1 + n % 64)) for n in range(2**14)]
IDS = bytes(4 * 20_000)
RANKS = list(range(4096))
REQUESTS = [
    m.Lookup(1, m.Blocks(0, "red", "", 1, BLOCKS)),
    m.Lookup(2**63 - 1, m.EngineDigests(2**32 - 1, "é" * 128, "a" * 128, EQUAL)),
    m.Prefetch(1, m.TokenIds(0, "red", "", IDS, MEDIA), "r", 5, RANKS, 1.5, "0" * 55),
    m.AwaitingPrefetch(1, m.SegmentIds(0, "red", "", b"", b"1234", MEDIA), "r", 0, None, None, None, 2.5),
    m.PrefetchSegments(
        1,
        [
            m.EngineDigests(0, "red", "", EQUAL[:300]),
            m.Digests(0, bytes(32), 5, "", bytes(320)),
            m.Blocks(0, "red", "", 1, BLOCKS[:2]),
            m.TokenIds(0, "red", "", IDS, MEDIA[:257]),
            m.SegmentDigests(0, bytes(32), 5, "", bytes(320), 7),
            m.SegmentIds(0, "red", "", IDS, b"", []),
        ],
        "r",
        RANKS,
    ),
    m.LookupSegments(1, [m.Blocks(0, "red", "", 1, BLOCKS[: 200 + n]) for n in range(256)]),
    m.ReserveStore(1, m.Blocks(0, "red", "", 1, EQUAL), 3, 4),
]
QUICK = [
    m.Retain(1, m.Digests(0, bytes(32), 5, "", bytes(32 * 131_072)), 5, 5.5),
    m.Lookup(1, m.TokenIds(0, "red", "", bytes(15 * 2**20), [])),
    m.LookupSegments(1, [m.SegmentIds(0, "red", "", IDS, IDS, [])] * 64),
    m.StoreData(1, 0, 0, memoryview(bytes(2**20))),
    m.RegisterLayout(1, 0, m.Layout("x", [m.Group([1], "uint8")] * 4096, 1, 1, 1, "")),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda made: type(made).__name__)
def test_a_request_that_takes_long_is_left_to_a_thread_and_is_the_same(request_: Any) -> None:
    payload = memoryview(encode(request_))
    decoded = Decoder(m.Request).decode(payload)
    assert isinstance(decoded, Large)
    assert read(decoded) == request_ == WHOLE.decode(payload)


@pytest.mark.parametrize("request_", QUICK, ids=lambda made: type(made).__name__)
def test_a_request_that_is_only_large_is_decoded_at_once(request_: Any) -> None:
    assert Decoder(m.Request).decode(encode(request_)) == request_


BOMBS = {
    "media": ["LookupSegments", 1, [["TokenIds", 0, "red", "", b"", [[1, b"x"]] * 12_900]] * 200],
    "blocks": ["LookupSegments", 1, [["Blocks", 0, "red", "", 1, [b""] * 32_000]] * 200],
    "prompts": ["LookupSegments", 1, [["TokenIds", 0, "red", "", b"", []]] * 500_000],
    "fields": ["Lookup", 1, ["TokenIds", 0, "red", "", b"", []], *[1] * 500_000],
    "ranks": ["Prefetch", 1, ["TokenIds", 0, "red", "", b"", []], "r", 0, [1] * 500_000],
    "nested": ["Lookup", 1, ["Blocks", 0, "red", "", 1, [[1] * 500_000] * 3]],
    "text": ["Renew", 1, "é" * 2**22],
    "salt": ["Lookup", 1, ["TokenIds", 0, "é" * 2**22, "", b"", []]],
    "name": ["é" * 2**22, 1],
    "tag": ["Lookup", 1, ["é" * 2**22]],
    "map": ["Lookup", 1, {n: n for n in range(20_000)}],
    "behind": ["Ping", 1, bytes(2**20)],
    "mixed": ["Lookup", 1, ["Blocks", 0, "red", "", 1, [b"12345678"] * 20_000 + ["text"]]],
    "other": ["Lookup", 1, ["Digests", 0, bytes(32), 5, "", [b"12345678"] * 20_000]],
    "pairs": ["Lookup", 1, ["Blocks", 0, "red", "", 1, [[1, b"12345678"]] * 20_000]],
    "too many": ["Lookup", 1, ["Blocks", 0, "red", "", 1, [b"12345678"] * (2**17 + 1)]],
    "negative": ["Prefetch", 1, ["Blocks", 0, "red", "", 1, [b"12345678"] * 20_000], "r", 0, None, -1.0],
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_no_request_has_is_refused_and_never_decoded_in_one_step(bomb: str) -> None:
    """At once, few values are walked over; what a thread does walks over no more than a request may have."""
    payload = msgspec.msgpack.encode(BOMBS[bomb])
    assert len(payload) > LARGE_BYTES
    walked = []
    value = large._Walk._value

    def counted(walk: Any) -> None:
        walked.append(1)
        value(walk)

    def decode_at_once() -> Any:
        try:
            return Decoder(m.Request).decode(payload)
        finally:
            assert len(walked) <= 2100

    with patch.object(large._Walk, "_value", counted), pytest.raises(ProtocolError, match=r"^not a message: "):
        read(decode_at_once())
    assert len(walked) <= 2**17


def test_whatever_a_large_request_is_changed_to_it_is_what_a_whole_decoder_says_or_refused() -> None:
    rng = random.Random(5)
    for _ in range(300):
        payload = bytearray(encode(rng.choice(REQUESTS[:-2])))
        for _ in range(rng.choice((1, 1, 2))):
            payload[rng.randrange(60) if rng.random() < 0.7 else rng.randrange(len(payload))] = rng.randrange(256)
        if rng.random() < 0.3:
            del payload[rng.randrange(len(payload)) :]
        try:
            made = read(Large(bytes(payload)))
        except ProtocolError:
            continue
        assert made == WHOLE.decode(payload)
