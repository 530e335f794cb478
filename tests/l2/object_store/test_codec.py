"""A whole cache over a bucket with a codec: what a tenant stores comes back, and nothing of it can be read there."""

from pathlib import Path

import obstore

from async_cache import AsyncCache, CacheConfig

from ..codec.codecs import KEY, OTHER_KEY
from ..codec.test_cache import LAYOUT, SECRET, TOKENS, found, key_file, write
from .support import Server


async def test_what_is_compressed_and_encrypted_comes_back_under_its_key_alone(server: Server, tmp_path: Path) -> None:
    def config(key: bytes) -> CacheConfig:
        url = server.url("codec", codec="zstd,aes", key_file=key_file(tmp_path, key), lookup_timeout=20)
        return CacheConfig(l1_bytes=2**20, l2=[url])

    async with AsyncCache(config(KEY)) as cache:
        await write(cache, "one")
    bucket = server.backend("codec")._connect(20)
    paths = [item["path"] for item in obstore.list(bucket, "codec").collect()]
    assert len(paths) == 2 * 4
    for path in paths:
        assert SECRET[:9] not in bytes(obstore.get(bucket, path).bytes())
    async with AsyncCache(config(OTHER_KEY)) as cache:
        assert await found(cache, "one") == 0
    async with AsyncCache(config(KEY)) as cache:
        assert await found(cache, "one") == 4
        await cache.clear("l1")
        obstore.put(bucket, paths[0], b"nothing of ours, as short as this" * 3)
        prefetch = cache.prefetch(LAYOUT.prompt(TOKENS, salt="one"))
        assert (await prefetch.load_done).chunks < 4
        await cache.end_request(prefetch.request_id)
        await write(cache, "one")
    async with AsyncCache(config(KEY)) as cache:
        assert await found(cache, "one") == 4
        await cache.clear("all")
    assert obstore.list(bucket, "codec").collect() == []
