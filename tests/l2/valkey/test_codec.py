"""A whole cache over a server with a codec: what a tenant stores comes back, and nothing of it can be read there."""

from pathlib import Path
from typing import cast

from async_cache import AsyncCache, CacheConfig

from ..codec.codecs import KEY, OTHER_KEY
from ..codec.test_cache import LAYOUT, SECRET, TOKENS, found, key_file, write
from .servers import Server


async def test_what_is_compressed_and_encrypted_comes_back_under_its_key_alone(tcp: Server, tmp_path: Path) -> None:
    await tcp.say("FLUSHALL")

    def config(key: bytes) -> CacheConfig:
        url = f"valkey://127.0.0.1:{tcp.port}?codec=zstd,aes&key_file={key_file(tmp_path, key)}"
        return CacheConfig(l1_bytes=2**20, l2=[url])

    async with AsyncCache(config(KEY)) as cache:
        await write(cache, "one")
    names = cast(list[bytes], await tcp.say("KEYS", "akv:*"))
    assert len(names) == 2 * 4
    for name in names:
        assert SECRET[:9] not in cast(bytes, await tcp.say("GET", name))
    async with AsyncCache(config(OTHER_KEY)) as cache:
        assert await found(cache, "one") == 0
    damaged = names[0]
    async with AsyncCache(config(KEY)) as cache:
        assert await found(cache, "one") == 4
        await cache.clear("l1")
        await tcp.flip_bit(damaged, 8 * 100)
        prefetch = cache.prefetch(LAYOUT.prompt(TOKENS, salt="one"))
        assert (await prefetch.load_done).chunks < 4
        await cache.end_request(prefetch.request_id)
        assert await tcp.say("EXISTS", damaged) == 0
        await write(cache, "one")
    async with AsyncCache(config(KEY)) as cache:
        assert await found(cache, "one") == 4
        await cache.clear("all")
    assert await tcp.say("DBSIZE") == 0
