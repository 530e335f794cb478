"""A whole cache over a directory with a codec, from its URL: what a tenant stores, and what lies on the disk."""

from pathlib import Path

import pytest
from faults.disk import places

from async_cache import AsyncCache, BackendState, CacheConfig, ModelLayout, ObjectGroup

from .codecs import KEY, OTHER_KEY, kv

LAYOUT = ModelLayout("m", (ObjectGroup((4, 1024), "bfloat16"),), chunk_tokens=4, world_size=2)
TOKENS = list(range(16))
SECRET = b"the secret of a tenant, again and again. "


def key_file(folder: Path, *keys: bytes) -> Path:
    path = folder / "keys"
    path.write_text("\n".join(key.hex() for key in keys))
    path.chmod(0o600)
    return path


def body(salt: str, rank: int, index: int) -> bytes:
    return SECRET + kv(LAYOUT.groups[0].size_bytes - len(SECRET), seed=sum(salt.encode()) + 10 * rank + index)


async def write(cache: AsyncCache, salt: str) -> None:
    for rank in (0, 1):
        async with cache.store(LAYOUT.prompt(TOKENS, salt=salt), rank=rank) as writer:
            for chunk in writer:
                chunk.views[0][:] = body(salt, rank, chunk.index)
                chunk.commit()
    assert (await cache.flush()).pending == 0


async def found(cache: AsyncCache, salt: str) -> int:
    """The chunks of a tenant's prompt that are found and loaded; their bytes are checked."""
    prefetch = cache.prefetch(LAYOUT.prompt(TOKENS, salt=salt))
    hits, result = await prefetch.lookup_done, await prefetch.load_done
    assert hits.chunks == result.chunks
    for rank in (0, 1) if result.chunks else ():
        async with cache.read(prefetch.request_id, rank=rank) as lease:
            for chunk in lease:
                assert bytes(chunk.views[0]) == body(salt, rank, chunk.index)
    await cache.end_request(prefetch.request_id)
    return result.chunks


@pytest.mark.parametrize("codec", ["zstd", "aes", "zstd,aes"])
async def test_what_was_stored_is_found_after_a_restart_and_only_under_its_key(tmp_path: Path, codec: str) -> None:
    def config(*keys: bytes) -> CacheConfig:
        query = f"codec={codec}" + (f"&key_file={key_file(tmp_path, *keys)}" if "aes" in codec else "")
        return CacheConfig(l1_bytes=2**20, l2=[f"fs://{tmp_path}/kv?{query}"])

    async with AsyncCache(config(KEY)) as cache:
        await write(cache, "one")
        await write(cache, "two")
    objects = [place.read() for place in places(tmp_path / "kv").values()]
    assert len(objects) == 2 * 2 * 4
    if "aes" in codec:
        assert not any(SECRET[:9] in path.read_bytes() for path in (tmp_path / "kv").rglob("*") if path.is_file())
    async with AsyncCache(config(KEY)) as cache:
        assert [await found(cache, salt) for salt in ("one", "two", "three")] == [4, 4, 0]
        usage = (await cache.stats()).backends[f"fs://{tmp_path}/kv"]
        assert usage.used_bytes == sum(map(len, objects))
    if "aes" in codec:
        async with AsyncCache(config(OTHER_KEY)) as cache:
            assert await found(cache, "one") == 0
        async with AsyncCache(config(OTHER_KEY, KEY)) as cache:
            assert await found(cache, "one") == 4
            assert (await cache.delete(LAYOUT.prompt(TOKENS, salt="one"))).chunks == 4
            assert await found(cache, "one") == 0
    async with AsyncCache(config(KEY)) as cache:
        assert await found(cache, "two") == 4
        await cache.clear(tier="all")
    assert places(tmp_path / "kv") == {}


async def test_a_cache_without_the_codec_shares_the_directory_and_touches_nothing(tmp_path: Path) -> None:
    plain, zstd = (CacheConfig(l1_bytes=2**20, l2=[f"fs://{tmp_path}/kv{query}"]) for query in ("", "?codec=zstd"))
    async with AsyncCache(zstd) as cache:
        await write(cache, "one")
    async with AsyncCache(plain) as cache:
        assert await found(cache, "one") == 0
        await write(cache, "one")
    for config in (zstd, plain, zstd):
        async with AsyncCache(config) as cache:
            assert await found(cache, "one") == 4


async def test_what_is_drained_of_a_backend_is_decoded_and_encoded_anew_where_it_goes(tmp_path: Path) -> None:
    near, far = f"fs://{tmp_path}/near", f"fs://{tmp_path}/far"
    first = f"{near}?codec=zstd,aes&key_file={key_file(tmp_path, KEY)}"
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[first])) as cache:
        await write(cache, "one")
        await cache.add_backend(f"{far}?codec=zstd")
        status = await cache.drain_backend(near)
        assert status.state is BackendState.DRAINED and status.copied is not None and status.copied.copied == 2 * 4
        await cache.remove_backend(near)
        await cache.clear("l1")
        assert await found(cache, "one") == 4
    assert len(places(tmp_path / "far")) == 2 * 4
