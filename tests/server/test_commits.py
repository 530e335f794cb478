"""Commits and what comes behind them on a connection: in order, all answered, whatever their number and size."""

import pytest

from async_cache import BlockingClient, ModelLayout, ObjectGroup, connect

from .programs import server

LARGE = ModelLayout("large", (ObjectGroup((9 * 2**20,), "uint8"),), chunk_tokens=1)  # copied by a thread
SMALL = ModelLayout("small", (ObjectGroup((64,), "uint8"),), chunk_tokens=1)


@pytest.mark.parametrize("small", [1, 100, 2000])
async def test_commits_behind_a_large_one_are_all_answered_and_found(tmp_path, small):
    with server(tmp_path, l1="64MiB") as served:
        async with connect(served.url) as cache:
            large, many = LARGE.prompt([1]), SMALL.prompt(range(small))
            async with cache.store(large) as first, cache.store(many) as second:
                first[0].views[0][:1] = b"x"
                first[0].commit()
                found = cache.prefetch(large)
                for chunk in second:
                    chunk.views[0][:8] = chunk.index.to_bytes(8, "little")
                    chunk.commit()
                assert (await found.lookup_done).chunks == 1
            assert (await cache.lookup(many)).chunks == small


def test_what_was_stored_by_with_is_found_by_every_other_client(tmp_path):
    with (
        server(tmp_path, l1="64MiB") as served,
        BlockingClient(served.url) as writes,
        BlockingClient(served.url) as looks,
    ):
        for number in range(20):
            prompt = LARGE.prompt([number])
            with writes.store(prompt) as writer:
                writer[0].commit()
            assert looks.lookup(prompt).chunks == 1
            looks.delete(prompt)
