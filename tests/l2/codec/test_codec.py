"""One object through each codec: what goes in comes out, and nothing else ever does."""

import hmac
import random
import tracemalloc
from collections.abc import Callable
from struct import pack
from threading import Event

import pytest
from backports.zstd import CompressionParameter, ZstdCompressor
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from async_cache.l2.codec.aes import Aes
from async_cache.l2.codec.codec import Codec
from async_cache.l2.codec.header import HEADER_BYTES, Header
from async_cache.l2.codec.zstd import BLOCK_BYTES, Zstd
from async_cache.prompt.keys import ObjectKey
from async_cache.testing.conformance import content, key

from .codecs import CODECS, KEY, OTHER_KEY, kv

SIZES = [1, 2, 3, 63, 64, 65, 4095, 16_385, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 7]
CONTENTS: dict[str, Callable[[int], bytes]] = {
    "zeros": bytes,
    "random": lambda size: content(1, size),
    "kv": kv,
    "text": lambda size: (b"the same text again, " * size)[:size],
    "float32": lambda size: b"".join(pack("<f", random.Random(n).gauss(0, 1)) for n in range(size // 4 + 1))[:size],
}
CANARY = 0xA5
FIRST = key(1)

every_codec = pytest.mark.parametrize("name", CODECS)
encrypting = pytest.mark.parametrize("name", [name for name in CODECS if "aes" in name])


def encode(codec: Codec, body: bytes, of: ObjectKey = FIRST) -> bytearray:
    """The encoded object, which stays within its bound."""
    bound = codec.bound_bytes(len(body))
    memory = bytearray([CANARY]) * (bound + 100)
    size = codec.encode(of, memoryview(body), memoryview(memory)[:bound], Event())
    assert size <= bound
    assert memory.count(CANARY, bound) == 100
    return memory[:size]


def decode(codec: Codec, encoded: bytes, size_bytes: int, of: ObjectKey = FIRST) -> bytes | None:
    """The object; None if it is not taken for one."""
    body = bytearray(size_bytes)
    return bytes(body) if codec.decode(of, memoryview(bytearray(encoded)), memoryview(body), Event()) else None


@every_codec
@pytest.mark.parametrize("size_bytes", SIZES)
@pytest.mark.parametrize("kind", CONTENTS)
def test_what_goes_in_comes_out(name: str, kind: str, size_bytes: int) -> None:
    codec, body = CODECS[name](), CONTENTS[kind](size_bytes)
    assert decode(codec, encode(codec, body), size_bytes) == body


@every_codec
def test_what_cannot_be_compressed_is_hardly_longer(name: str) -> None:
    for size_bytes in (1, 5000, 3 * BLOCK_BYTES):
        assert len(encode(CODECS[name](), content(1, size_bytes))) <= size_bytes + HEADER_BYTES + 16


@pytest.mark.parametrize("name", ["zstd", "zstd,aes"])
def test_kv_becomes_shorter(name: str) -> None:
    body = kv(80_000)  # in which nothing repeats
    assert len(body) / len(encode(CODECS[name](), body)) > 1.4


@every_codec
def test_a_truncated_object_is_none(name: str) -> None:
    codec, body = CODECS[name](), kv(2000)
    encoded = encode(codec, body)
    assert [n for n in range(len(encoded)) if decode(codec, encoded[:n], 2000) is not None] == []
    assert decode(codec, encoded + b"\0", 2000) is None


@every_codec
def test_an_object_of_another_size_is_none(name: str) -> None:
    codec = CODECS[name]()
    encoded = encode(codec, kv(2000))
    assert [n for n in (1, 1999, 2001, 4000) if decode(codec, encoded, n) is not None] == []


def test_what_a_header_says_has_to_fit() -> None:
    assert decode(Codec(), Header(0, 0, 0, 5000).pack() + bytes(5000), 5000) == bytes(5000)
    for header in (Header(0, 0, 0, 4999), Header(0, 0, 1, 5000), Header(1, 1, 0, 5000), Header(2, 0, 0, 5000)):
        assert decode(Codec(), header.pack() + bytes(5000), 5000) is None
    assert decode(Codec(Zstd()), Header(1, 3, 0, 5000).pack() + bytes(5000), 5000) is None


@encrypting
def test_one_bit_anywhere_makes_an_encrypted_object_none(name: str) -> None:
    codec, body = CODECS[name](), kv(300)
    encoded = encode(codec, body)
    for bit in range(8 * len(encoded)):
        encoded[bit // 8] ^= 1 << bit % 8
        assert decode(codec, encoded, len(body)) is None, f"bit {bit}"
        encoded[bit // 8] ^= 1 << bit % 8
    assert decode(codec, encoded, len(body)) == body


@encrypting
def test_an_encrypted_object_is_that_of_its_key_only(name: str) -> None:
    codec, body = CODECS[name](), kv(5000)
    encoded = encode(codec, body, of=key(1, 2, 3))
    assert decode(codec, encoded, 5000, of=key(1, 2, 3)) == body
    for other in (key(2, 2, 3), key(1, 1, 3), key(1, 2, 2), key(1, 3, 2)):
        assert decode(codec, encoded, 5000, of=other) is None


@encrypting
def test_what_is_not_encrypted_is_none_where_it_has_to_be(name: str) -> None:
    codec, body = CODECS[name](), kv(5000)
    for plain in (Codec(), Codec(Zstd())):
        assert decode(codec, encode(plain, body), 5000) is None
        assert decode(codec, encode(plain, body) + bytes(16), 5000) is None
    assert decode(CODECS["zstd"](), encode(codec, body), 5000) is None


def test_another_key_or_version_is_none() -> None:
    codec, body = Codec(encryption=Aes([KEY])), kv(5000)
    encoded = encode(codec, body)
    assert decode(Codec(encryption=Aes([OTHER_KEY])), encoded, 5000) is None
    assert decode(Codec(encryption=Aes([OTHER_KEY, KEY])), encoded, 5000) == body
    encoded[6] += 1  # of the magic, the version
    assert decode(codec, encoded, 5000) is None


def test_a_level_only_matters_to_who_compresses() -> None:
    body = kv(100_000)
    assert decode(Codec(Zstd()), encode(Codec(Zstd(9)), body), len(body)) == body


def test_nothing_of_an_object_shows_and_no_two_are_encrypted_alike() -> None:
    codec, body = Codec(encryption=Aes([KEY])), bytes(5000)
    payloads = {bytes(encode(codec, body, of=of)[HEADER_BYTES:]) for of in [key(1)] * 3 + [key(2), key(1, 1)]}
    assert len(payloads) == 5
    nonces = {Header.parse(bytes(encode(codec, body))).nonce for _ in range(100)}  # type: ignore[union-attr]
    assert len(nonces) == 100
    assert not any(bytes(8) in payload for payload in payloads)


def test_the_key_of_a_chunk_is_hkdf_of_the_master_key() -> None:
    aes, body = Aes([KEY]), kv(1000)
    encoded = bytes(encode(Codec(encryption=aes), body))
    header = Header.parse(encoded)
    assert header is not None
    extracted = hmac.digest(bytes(32), KEY, "sha256")  # RFC 5869, by hand
    assert header.key_id == hmac.digest(extracted, b"async_cache key id 1\n\x01", "sha256")[:8]
    chunk_key = hmac.digest(extracted, b"async_cache aes 1\n" + FIRST.chunk_hash + b"\x01", "sha256")
    associated = pack("<32sII", *FIRST) + encoded[:HEADER_BYTES]
    assert AESGCM(chunk_key).decrypt(header.nonce, encoded[HEADER_BYTES:], associated) == body


def test_a_frame_of_a_plane_that_asks_for_more_memory_than_that_is_none() -> None:
    body = bytes(1000)
    for window_log, expected in ((18, body), (27, None)):
        compressor = ZstdCompressor(options={CompressionParameter.window_log: window_log})
        frame = compressor.compress(body[:400]) + compressor.compress(body[400:], ZstdCompressor.FLUSH_FRAME)
        forged = Header(1, 1, 0, 1000).pack() + pack("<I", len(frame)) + frame
        assert decode(Codec(Zstd()), forged, 1000) == expected


def test_a_frame_that_grows_is_none_and_takes_no_memory() -> None:
    compressor = ZstdCompressor(options={CompressionParameter.window_log: 18})
    frame = compressor.compress(bytes(2**25)) + compressor.compress(bytes(2**25), ZstdCompressor.FLUSH_FRAME)
    payload = pack("<I", len(frame)) + frame
    for width in (1, 2, 4):
        forged = Header(1, width, 0, BLOCK_BYTES).pack() + payload * width
        tracemalloc.start()
        try:
            assert decode(Codec(Zstd()), forged, BLOCK_BYTES) is None
            assert tracemalloc.get_traced_memory()[1] < 16 * BLOCK_BYTES
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("seed", range(300))
def test_no_nonsense_raises(seed: int) -> None:
    rng, codec = random.Random(seed), Codec(Zstd())
    body = kv(3000)
    encoded = encode(codec, body)
    for _ in range(rng.randint(1, 8)):
        encoded[rng.randrange(len(encoded))] = rng.randrange(256)
    decode(codec, encoded[: rng.randint(0, len(encoded))] + rng.randbytes(rng.randint(0, 8)), 3000)


@every_codec
def test_a_call_that_is_stopped_ends(name: str) -> None:
    codec, body, stop = CODECS[name](), kv(BLOCK_BYTES * 2), Event()
    encoded = encode(codec, body)
    stop.set()
    with pytest.raises(InterruptedError):
        codec.encode(key(1), memoryview(body), memoryview(bytearray(codec.bound_bytes(len(body)))), stop)
    with pytest.raises(InterruptedError):
        codec.decode(key(1), memoryview(encoded), memoryview(bytearray(len(body))), stop)
