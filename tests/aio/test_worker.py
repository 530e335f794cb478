"""The thread of one's own."""

import asyncio
import threading

import pytest

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup
from async_cache.aio.worker import Worker


async def test_it_does_one_thing_after_the_other_in_one_thread_that_ends_with_it() -> None:
    worker = Worker("mine")
    threads = await asyncio.gather(*(worker.run(threading.current_thread) for _ in range(10)))
    assert len(set(threads)) == 1
    await asyncio.to_thread(worker.close, wait=True)
    assert not threads[0].is_alive()
    with pytest.raises(RuntimeError):
        await worker.run(threading.current_thread)


async def test_a_long_prompt_is_hashed_where_the_threads_of_the_loop_are_all_taken() -> None:
    layout = ModelLayout("model", (ObjectGroup((16,), "uint8"),), chunk_tokens=4096)
    prompts = [layout.prompt(range(n, n + 4096 * 9)) for n in range(4)]
    free = threading.Event()
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache:
        taken = [asyncio.create_task(asyncio.to_thread(free.wait)) for _ in range(64)]
        try:
            assert (await cache.prefetch(prompts[0]).load_done).chunks == 0
            assert (await cache.lookup(prompts[1])).chunks == 0
            async with cache.store(prompts[2]) as writer:
                assert len(writer) == 9
            assert (await cache.delete(prompts[3])).chunks == 0
            assert all(prompt.hashed for prompt in prompts)
        finally:
            free.set()
            await asyncio.gather(*taken)
    assert not [thread for thread in threading.enumerate() if "hashing" in thread.name]
