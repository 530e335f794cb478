"""Quotas: what a salt may have of each tier, of one model or of all; who is over his own loses his own."""

import asyncio
from random import Random

import msgspec
import pytest

from async_cache import CacheConfig, ConfigError, LimitError, Removed
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.memory import MemoryBackend
from async_cache.retention.quotas import Bounds, Quota

from .support import OBJECT_BYTES, PAGE, count_hits, fill, make_layout, make_prompt, open_cache, read_back, settle

OTHER = make_layout(model="other")


@pytest.mark.embedded
async def test_who_is_over_its_quota_in_l1_loses_its_own_and_nobody_elses() -> None:
    async with open_cache(pages=16, quotas=[f"greedy?l1={4 * PAGE}B"]) as cache:
        modest = make_prompt(4, salt="modest")
        await fill(cache, modest)
        for number in range(20):
            await fill(cache, make_prompt(2, number, salt="greedy"))
            cache.check_integrity()
        assert await count_hits(cache, modest) == 4
        assert (await cache.stats()).l1_chunks == 8
        assert [await count_hits(cache, make_prompt(2, n, salt="greedy")) for n in (17, 18, 19)] == [0, 2, 2]


@pytest.mark.embedded
async def test_a_quota_is_of_one_model_or_of_all_together() -> None:
    quotas = [f"a?l1={6 * PAGE}B", f"a?model=other&l1={2 * PAGE}B"]
    async with open_cache(pages=32, quotas=quotas) as cache:
        for number in range(10):
            await fill(cache, make_prompt(1, number, layout=OTHER, salt="a"))
        assert (await cache.stats()).l1_chunks == 2
        for number in range(10):
            await fill(cache, make_prompt(1, number, salt="a"))
            cache.check_integrity()
        assert (await cache.stats()).l1_chunks == 6


@pytest.mark.embedded
async def test_a_quota_of_any_salt_is_that_of_each_for_itself() -> None:
    async with open_cache(pages=32, quotas=[f"*?l1={3 * PAGE}B", f"rich?l1={8 * PAGE}B"]) as cache:
        for salt in ("", "b", "rich"):
            for number in range(10):
                await fill(cache, make_prompt(1, number, salt=salt))
        assert (await cache.stats()).l1_chunks == 3 + 3 + 8


@pytest.mark.embedded
async def test_a_store_that_a_quota_has_no_room_for_is_told_so() -> None:
    async with open_cache(pages=16, quotas=[f"a?l1={3 * PAGE}B"]) as cache:
        first = make_prompt(2, salt="a")
        await fill(cache, first)
        prefetch = cache.prefetch(first)
        await prefetch.load_done
        async with cache.store(make_prompt(4, 2, salt="a")) as writer:  # two are leased
            assert (len(list(writer)), writer.shortfall) == (1, "memory")
        async with cache.store(make_prompt(1, 3, salt="a")) as held:
            with pytest.raises(LimitError, match=r"^quotas: .* of L1 are used by the salt 'a'"):
                async with cache.store(make_prompt(1, 4, salt="a")):
                    pass
            assert len(list(held)) == 1
        await cache.end_request(prefetch.request_id)
        async with cache.store(make_prompt(3, 5, salt="a")) as writer:
            assert len(list(writer)) == 3


@pytest.mark.embedded
async def test_quotas_bound_a_backend_too() -> None:
    backend = MemoryBackend()
    async with open_cache(backend, pages=8, quotas=[f"greedy?l2={5 * OBJECT_BYTES}B"]) as cache:
        events = cache.events()
        modest = make_prompt(4, salt="modest")
        await fill(cache, modest)
        for number in range(20):
            await fill(cache, make_prompt(2, number, salt="greedy"))
            assert (await cache.flush()).dropped == 0
            backend.check_integrity()
            backend._index.check_integrity()
        assert backend.usage().used_bytes <= (4 + 5) * OBJECT_BYTES
        await cache.clear(tier="l1")
        assert await read_back(cache, modest) == 4
        assert await read_back(cache, make_prompt(2, 19, salt="greedy")) == 2
        left = [event for event in events.take(10_000) if isinstance(event, Removed) and event.tier == "l2"]
        assert len(left) >= 35 and {event.removal for event in left} == {"quota"}
        kept = await cache.retain(make_prompt(2, 19, salt="greedy"))
        assert kept.chunks == 2
        for number in range(30, 40):
            await fill(cache, make_prompt(2, number, salt="greedy"))
            await cache.flush()
        assert await count_hits(cache, make_prompt(2, 19, salt="greedy")) == 2
        assert backend.usage().used_bytes <= (4 + 5) * OBJECT_BYTES


@pytest.mark.real_time
@pytest.mark.embedded
async def test_quotas_bound_a_directory(tmp_path: object) -> None:
    backend = FileSystemBackend(f"{tmp_path}/store", capacity_bytes=None)
    async with open_cache(backend, pages=64, quotas=["greedy?l2=64KiB"]) as cache:
        layout = make_layout(model="large")
        for number in range(12):
            await fill(cache, make_prompt(2, number, layout=layout, salt="greedy"))
            await cache.flush()
        assert [account.used_bytes <= 65536 for account in cache.core.guards.current[0].bounds] == [True]


@pytest.mark.embedded
async def test_after_a_restart_chunks_count_for_who_asks_for_them() -> None:
    backend = MemoryBackend()
    prompts = [make_prompt(2, number, salt="a") for number in range(4)]
    async with open_cache(backend) as cache:
        for prompt in prompts:
            await fill(cache, prompt)
        await cache.flush()
    async with open_cache(backend, quotas=[f"a?l2={4 * OBJECT_BYTES}B"]) as cache:
        for prompt in prompts:
            assert await read_back(cache, prompt) == 2
        [account] = cache.core.guards.current[0].bounds
        assert account.used_bytes == 8 * OBJECT_BYTES
        await fill(cache, make_prompt(1, 9, salt="a"))
        await cache.flush()
        assert account.used_bytes <= 4 * OBJECT_BYTES
        backend._index.check_integrity()


@pytest.mark.embedded
async def test_sixteen_salts_at_once_are_bound_each_for_itself_and_pairs_do_not_touch_one_another() -> None:
    """Each is beside one that stores far more than it may, and finds all of its own that it may have."""
    random = Random(1)
    most = {f"salt {number}": random.randrange(3, 8) for number in range(16)}
    backend = MemoryBackend()
    quotas = [f"{name.replace(' ', '%20')}?l1={n * PAGE}B&l2={n * OBJECT_BYTES}B" for name, n in most.items()]
    async with open_cache(backend, pages=16 * 8, quotas=quotas) as cache:

        async def use(name: str) -> None:
            greedy = int(name[5:]) % 2
            for number in range(40 if greedy else 12):
                prompt = make_prompt(random.randrange(1, most[name] + 1), number if greedy else 0, salt=name)
                await read_back(cache, prompt)
                await fill(cache, prompt)
                for bounds in (cache.core.l1.bounds, cache.core.guards.current[0].bounds):
                    assert all(bound.used_bytes <= bound.most_bytes for bound in bounds)
            if not greedy:
                whole = make_prompt(most[name], 0, salt=name)
                await fill(cache, whole)
                assert await count_hits(cache, whole) == most[name]

        await asyncio.gather(*map(use, most))
        await cache.flush()
        cache.check_integrity()
        backend._index.check_integrity()
        assert len(list(cache.core.l1.bounds)) == 16
        await cache.clear(tier="l1")
        modest = [make_prompt(most[name], 0, salt=name) for name in list(most)[::2]]
        assert [await read_back(cache, prompt) for prompt in modest] == [len(prompt) for prompt in modest]


@pytest.mark.embedded
async def test_quotas_that_change_while_the_cache_is_open_hold_for_what_is_there() -> None:
    backend = MemoryBackend()
    async with open_cache(backend, pages=16) as cache:

        def change(*quotas: str) -> None:
            cache.core.reconfigure(msgspec.structs.replace(cache.core.config, quotas=quotas))

        greedy, modest = (make_prompt(6, salt=salt) for salt in ("greedy", "modest"))
        for prompt in (greedy, modest):
            await fill(cache, prompt)
        await cache.flush()
        prefetch = cache.prefetch(make_prompt(1, salt="greedy"))
        await prefetch.load_done
        async with cache.store(make_prompt(1, 5, salt="greedy")) as reserved:  # since before they changed
            assert len(list(reserved)) == 1
            change(f"greedy?l1={4 * PAGE}B&l2={3 * OBJECT_BYTES}B")
            await settle()
            [bound], [bound_l2] = cache.core.l1.bounds, cache.core.guards.current[0].bounds
            assert (bound.used_bytes, bound_l2.used_bytes) == (7 * PAGE, 6 * OBJECT_BYTES)
        await fill(cache, make_prompt(1, 7, salt="greedy"))
        await cache.flush()
        assert (bound.used_bytes, bound_l2.used_bytes) == (4 * PAGE, 3 * OBJECT_BYTES)
        assert await count_hits(cache, modest) == 6
        cache.check_integrity()
        backend.check_integrity()
        await cache.end_request(prefetch.request_id)
        change("*?l2=1GiB")
        await fill(cache, make_prompt(8, 9, salt="greedy"))
        await cache.flush()
        assert {bound.salt: bound.used_bytes for bound in cache.core.guards.current[0].bounds} == {
            "greedy": 11 * OBJECT_BYTES,
            "modest": 6 * OBJECT_BYTES,
        }
        change()
        assert not list(cache.core.l1.bounds) and not list(cache.core.guards.current[0].bounds)
        await cache.delete(modest)
        cache.check_integrity()


@pytest.mark.embedded
@pytest.mark.parametrize(
    "quotas",
    ["a", "a?", "a?l1=0", "a?l1=x", "a?l1=1&l1=2", "a?model=m", "a?disk=1GiB", "a?model=&l1=1", "a?l1=99999999999TiB",
     "a?l1=-1", "a?l1=nan"],
)  # fmt: skip
def test_a_quota_that_cannot_be_is_refused(quotas: str) -> None:
    with pytest.raises(ConfigError, match="quotas"):
        CacheConfig(quotas=[quotas])


@pytest.mark.embedded
def test_two_quotas_for_the_same_are_refused_and_names_may_be_encoded() -> None:
    with pytest.raises(ConfigError, match="two quotas"):
        CacheConfig(quotas=["a?l1=1", "a?l2=1"])
    config = CacheConfig.load(None, {"ASYNC_CACHE_QUOTAS": "a%20b?model=x%2Fy&l1=1KiB *?l2=2KiB"})
    assert config.parsed_quotas == [Quota("a b", "x/y", 1024, None), Quota(None, None, None, 2048)]


@pytest.mark.embedded
def test_an_account_without_anything_is_forgotten() -> None:
    bounds = Bounds([Quota(None, None, 10)], lambda quota: quota.l1_bytes)
    for salt in map(str, range(100)):
        bounds.add(salt, "m", 5)
        bounds.enter(b"x", salt, "m", None)
        assert bounds.room(salt, "m") == 5
        bounds.left(b"x", salt, "m")
        bounds.add(salt, "m", -5)
    assert list(bounds) == [] and bounds.room("5", "m") == 10
    assert not Bounds([Quota("a", None, None, 5)], lambda quota: quota.l1_bytes)
