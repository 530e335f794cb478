"""The memory of a cache goes when it is closed, and does not wait for a collection of garbage."""

import gc

import pytest
from contract.support import fill, make_prompt, open_cache


@pytest.mark.xfail(strict=True, reason="a writer and its chunks, which keep views of the arena, refer to each other")
async def test_a_cache_that_was_written_to_is_unmapped_when_it_is_closed():
    gc.collect()
    gc.disable()
    try:
        async with open_cache() as cache:
            await fill(cache, make_prompt(1))
        with open("/proc/self/maps") as maps:  # noqa: ASYNC230 (no disk)
            assert "memfd:async_cache" not in maps.read()
    finally:
        gc.enable()
        gc.collect()
