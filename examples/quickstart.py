"""The cache in twenty lines, without a model: `python examples/quickstart.py`."""

import uvloop

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup


async def main() -> None:
    layout = ModelLayout("toy", (ObjectGroup((2, 8, 4), "float16"),), chunk_tokens=4)
    prompt = layout.prompt([11, 12, 13, 14, 15, 16, 17, 18, 19])  # two chunks, and a tail
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=["memory://"])) as cache:
        async with cache.store(prompt) as writer:
            for chunk in writer:
                for view in filter(None, chunk.views):  # one for each group of layers
                    view[:] = bytes([chunk.index + 1]) * len(view)
                chunk.commit()
        await cache.flush()  # written to L2 ...
        await cache.clear(tier="l1")  # ... and gone from memory, as after a restart

        prefetch = cache.prefetch(prompt)
        print((await prefetch.lookup_done).tokens, "of", prompt.tokens, "tokens are cached")
        print((await prefetch.load_done).tokens, "tokens are in memory")
        async with cache.read(prefetch.request_id) as lease:
            begins = [bytes(view[:2]) for chunk in lease for view in chunk.views if view]
        print("the chunks begin with", begins)


uvloop.run(main())
