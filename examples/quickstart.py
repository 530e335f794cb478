"""The cache in twenty lines, without a model: `python examples/quickstart.py`."""

import uvloop

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup


async def main() -> None:
    layout = ModelLayout("toy", (ObjectGroup((2, 8, 4), "float16"),), chunk_tokens=4)
    prompt = layout.prompt([11, 12, 13, 14, 15, 16, 17, 18, 19])  # two whole chunks, and a tail that is not cached
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=["memory://"])) as cache:
        async with cache.store(prompt) as writer:
            for chunk in writer:
                chunk.views[0][:] = bytes([chunk.index + 1]) * layout.groups[0].size_bytes
                chunk.commit()
        await cache.flush()  # to L2 ...
        await cache.clear(tier="l1")  # ... and forgotten in memory, as after a restart

        prefetch = cache.prefetch(prompt)
        hits = await prefetch.lookup_done
        print(f"{hits.tokens} of {prompt.tokens} tokens are cached, {hits.load_bytes} bytes are to be loaded")
        result = await prefetch.load_done
        print(f"{result.tokens} tokens are in memory")
        async with cache.read(prefetch.request_id) as lease:
            for chunk in lease:
                print(f"chunk {chunk.index} begins with {bytes(chunk.views[0][:4])}")


uvloop.run(main())
