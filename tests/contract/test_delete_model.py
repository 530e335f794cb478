"""Deleting a whole model, revision or adapter: all of it, wherever it is, and nothing else."""

import asyncio
from pathlib import Path

import pytest

from async_cache import DeletedModel
from async_cache.l2.memory import MemoryBackend
from async_cache.l2.urls.registry import from_url
from async_cache.retention.policies import make_policy
from async_cache.testing import GatedBackend

from .support import (
    OBJECT_BYTES,
    PAGE,
    Recorder,
    assert_nothing_held,
    count_hits,
    fill,
    fill_l2,
    make_layout,
    make_prompt,
    open_cache,
    settle,
    verify,
)

NEW = make_layout(revision="v2")
OTHER = make_layout(model="other")


async def test_a_revision_an_adapter_or_a_whole_model_is_deleted_and_nothing_else() -> None:
    backend = MemoryBackend()
    async with open_cache(backend) as cache:
        plain, adapted = make_prompt(3), make_prompt(2, adapter="lora")
        new, other = make_prompt(2, layout=NEW), make_prompt(1, layout=OTHER)
        await fill_l2(cache, plain, adapted, new, other)
        await fill(cache, plain)
        assert await cache.delete_model("model", revision="v2") == DeletedModel(2, 0, 2 * OBJECT_BYTES)
        assert [await count_hits(cache, p) for p in (plain, adapted, new, other)] == [3, 2, 0, 1]
        assert await cache.delete_model("model", adapter="lora") == DeletedModel(2, 0, 2 * OBJECT_BYTES)
        assert [await count_hits(cache, p) for p in (plain, adapted, other)] == [3, 0, 1]
        assert await cache.delete_model("model") == DeletedModel(3, 0, 3 * (PAGE + OBJECT_BYTES))
        assert [await count_hits(cache, p) for p in (plain, other)] == [0, 1]
        assert await cache.delete_model("none") == DeletedModel(0, 0, 0)
        for wrong in ("", "x" * 2000):
            with pytest.raises(ValueError, match="model"):
                await cache.delete_model(wrong)
        await assert_nothing_held(cache)
        backend.check_integrity()


async def test_what_is_in_flight_does_not_come_back_and_what_comes_later_stays() -> None:
    backend = GatedBackend(MemoryBackend())
    async with open_cache(backend) as cache:
        prompt, reading = make_prompt(3), make_prompt(2, number=2)
        await fill_l2(cache, prompt)
        await fill(cache, reading)
        await cache.flush()
        backend.hold("load")
        prefetch, leased = cache.prefetch(prompt), cache.prefetch(reading)
        assert (await prefetch.lookup_done).chunks == 3
        await leased.load_done
        deleted = await cache.delete_model("model")
        assert (deleted.chunks, deleted.leased) == (5, 2)
        result = await prefetch.load_done
        assert (result.chunks, result.shortfall) == (0, "gone")
        backend.release("load")
        await settle()
        assert (await count_hits(cache, prompt), await count_hits(cache, reading)) == (0, 0)
        await fill(cache, prompt)
        assert await count_hits(cache, prompt) == 3
        for request_id in (prefetch.request_id, leased.request_id):
            await cache.end_request(request_id)
        assert (await cache.flush()).dropped == 0
        await assert_nothing_held(cache)


async def test_a_store_that_is_under_way_is_waited_for_and_what_it_stored_is_deleted() -> None:
    backend = GatedBackend(MemoryBackend())
    async with open_cache(backend) as cache:
        prompt = make_prompt(2)
        backend.hold("store")
        await fill(cache, prompt)
        await settle()
        deletion = asyncio.ensure_future(cache.delete_model("model"))
        await settle()
        assert not deletion.done()
        backend.release("store")
        assert (await deletion).chunks == 2
        assert backend.usage().objects == 0 and await count_hits(cache, prompt) == 0


@pytest.mark.embedded
@pytest.mark.parametrize("policy", ["lru", "prefix"])
@pytest.mark.parametrize("turns", range(16))
async def test_at_every_step_of_a_prefetch_or_a_write_back_nothing_is_left_to_find(turns: int, policy: str) -> None:
    loaded, stored = make_prompt(3), make_prompt(3, number=2)
    backend = MemoryBackend(policy=make_policy(policy, asyncio.get_running_loop().time))
    async with open_cache(backend, policy=policy) as cache:
        await fill_l2(cache, loaded)
        prefetch = cache.prefetch(loaded, request_id="a")
        await fill(cache, stored)
        for _ in range(turns):
            await asyncio.sleep(0)
        await cache.delete_model("model")
        assert (await count_hits(cache, loaded), await count_hits(cache, stored)) == (0, 0)
        result = await prefetch.load_done
        async with cache.read("a") as lease:
            assert len(verify(lease, loaded)) == result.chunks
        await asyncio.sleep(100)
        assert (await count_hits(cache, loaded), await count_hits(cache, stored)) == (0, 0)
        assert (backend.usage().objects, backend.pins) == (0, 0)
        await assert_nothing_held(cache)


@pytest.mark.embedded
async def test_a_backend_that_does_not_know_its_objects_loses_what_others_know_and_is_named() -> None:
    blind = Recorder(MemoryBackend("blind"))
    blind.chunks_without_origin = lambda: None  # type: ignore[method-assign]
    async with open_cache(MemoryBackend(), blind) as cache:
        prompt, gone = make_prompt(2), make_prompt(1, number=2)
        await fill_l2(cache, prompt, gone)
        await cache.core.guards.current[0].delete([key for key, _ in await listed(cache)][2:])
        deleted = await cache.delete_model("model")
        assert deleted == DeletedModel(2, 0, 2 * OBJECT_BYTES, (blind.name,))
        assert await count_hits(cache, prompt) == 0 and await count_hits(cache, gone) == 1


async def listed(cache: object) -> list[tuple[object, int]]:
    return await cache.core.guards.current[0].next_keys([], 100)  # type: ignore[attr-defined]


async def test_a_retention_ends_with_its_model() -> None:
    async with open_cache(MemoryBackend()) as cache:
        kept, other = make_prompt(2), make_prompt(2, layout=OTHER)
        for prompt in (kept, other):
            await fill(cache, prompt)
            assert (await cache.retain(prompt)).chunks == 2
        await cache.flush()
        await cache.delete_model("model")
        assert [one.model for one in await cache.retained()] == ["other"]
        await cache.retain(other, ttl_seconds=0)
        await assert_nothing_held(cache)


@pytest.mark.real_time
@pytest.mark.embedded
@pytest.mark.parametrize("clean", [True, False])
async def test_after_a_restart_a_directory_knows_what_its_chunks_are_of(tmp_path: Path, clean: bool) -> None:
    url = f"fs://{tmp_path}/store"
    old, new = make_prompt(3, adapter="a"), make_prompt(2, layout=NEW, adapter="b")
    async with open_cache(from_url(url)) as cache:
        await fill(cache, old)
        await fill(cache, new)
        await cache.flush()
        if not clean:  # as if it were killed: another process reads what is there
            async with open_cache(from_url(url)) as second:
                assert (await second.delete_model("model", revision="v2")).chunks == 2
                assert await count_hits(second, old) == 3
            return
    async with open_cache(from_url(url), quotas=["?l2=1GiB"]) as cache:
        assert await count_hits(cache, old) == 3
        [account] = cache.core.guards.current[0].bounds
        assert account.used_bytes == 5 * OBJECT_BYTES
        deleted = await cache.delete_model("model", adapter="a")
        assert (deleted.chunks, deleted.size_bytes, deleted.unsure) == (3, 3 * OBJECT_BYTES, ())
        assert (await count_hits(cache, old), await count_hits(cache, new)) == (0, 2)
    async with open_cache(from_url(url)) as cache:
        assert (await count_hits(cache, old), await count_hits(cache, new)) == (0, 2)
        assert (await cache.delete_model("model")).chunks == 2
    assert not (tmp_path / "store" / ".origins").exists()
