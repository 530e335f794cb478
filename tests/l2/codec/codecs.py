"""Codecs for tests, and the objects that they store."""

import random
from struct import pack

from async_cache.l2.codec.aes import Aes
from async_cache.l2.codec.codec import Codec
from async_cache.l2.codec.zstd import Zstd

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))

CODECS = {
    "zstd": lambda: Codec(Zstd()),
    "zstd:3": lambda: Codec(Zstd(3)),
    "aes": lambda: Codec(encryption=Aes([KEY])),
    "zstd,aes": lambda: Codec(Zstd(), Aes([KEY])),
}


def kv(size_bytes: int, seed: int = 0) -> bytes:
    """Bytes like those of KV in bfloat16: floats of a normal distribution, cut off."""
    rng = random.Random(seed)
    some = b"".join(pack("<f", rng.gauss(0, 1))[2:] for _ in range(min(size_bytes // 2 + 1, 40_000)))
    return (some * (size_bytes // len(some) + 1))[:size_bytes]
