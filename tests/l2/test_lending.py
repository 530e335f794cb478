"""Quotas that promise more than a backend has: what one leaves of his part is lent, and comes back to him."""

import asyncio
from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random

import pytest

from async_cache.l2.backend import Coming
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.index import Index
from async_cache.l2.memory import MemoryBackend
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.origin import Origin
from async_cache.retention.policies import make_policy
from async_cache.retention.quotas import Bounds, Quota
from async_cache.testing.conformance import views
from async_cache.values import Removal

TENANTS = [f"tenant{number}" for number in range(16)]
SIZE = 100
DIRECTORY_BYTES = 16 * 4096


def chunk_hash(tenant: str, number: int) -> bytes:
    return f"{tenant}/{number}".encode().ljust(32, b".")


def quotas_of(chunks: int, *tenants: str) -> Bounds:
    """So many chunks for each of these, or for any salt."""
    return Bounds([Quota(salt, None, l2_bytes=chunks * SIZE) for salt in tenants or (None,)], lambda q: q.l2_bytes)


class Tier:
    """A backend with room for so many chunks."""

    def __init__(self, backend: MemoryBackend | FileSystemBackend):
        self.backend = backend
        self.stored = Counter[str]()

    async def store(self, tenant: str, chunks: int) -> None:
        """Store new chunks of a tenant, one after the other."""
        for _ in range(chunks):
            of = chunk_hash(tenant, self.stored[tenant])
            self.stored[tenant] += 1
            self.backend.coming([Coming(of, None, Origin(tenant, "m", "", ""))])
            await self.backend.store([ObjectKey(of, 0, 0)], views([bytes(SIZE)]))
        self.backend.check_integrity()

    async def there(self) -> Counter[str]:
        return Counter([key.chunk_hash.decode().partition("/")[0] async for key, _ in self.backend.keys()])


@pytest.mark.parametrize("policy", ["lru", "prefix"])
async def test_each_of_sixteen_has_its_part_whatever_the_other_of_a_pair_stores(policy: str) -> None:
    """All pairs: one floods, the other has what is its own; all others are left alone."""
    for greedy, modest in combinations(TENANTS, 2):
        backend = MemoryBackend(capacity_bytes=32 * SIZE, policy=make_policy(policy, asyncio.get_running_loop().time))
        backend.bound(quotas_of(16))  # eight times what there is
        tier = Tier(backend)
        for tenant in [*(it for it in TENANTS if it not in (greedy, modest)), modest]:
            await tier.store(tenant, 2)
        await tier.store(greedy, 12)
        there = await tier.there()
        assert all(there[tenant] == 2 for tenant in TENANTS), there


async def test_what_is_lent_comes_back_by_the_stores_of_whose_it_is(tmp_path: Path) -> None:
    for backend in (
        MemoryBackend(capacity_bytes=32 * SIZE),
        FileSystemBackend(tmp_path / "kv", capacity_bytes=32 * 4096 + DIRECTORY_BYTES),
    ):
        backend.bound(quotas_of(64))
        await backend.open()
        tier = Tier(backend)
        await tier.store("a", 64)
        alone = (await tier.there())["a"]
        assert alone >= 24  # all that there is, though half of it would be another's
        await tier.store("b", 64)
        there = await tier.there()
        assert abs(there["a"] - there["b"]) <= 1 and there.total() >= 24
        await tier.store("c", 4)  # less than its part: it loses nothing
        await tier.store("a", 64)
        await tier.store("b", 64)
        there = await tier.there()
        assert there["c"] == 4 and abs(there["a"] - there["b"]) <= 1
        await backend.close()


async def test_who_has_a_greater_quota_has_a_greater_part() -> None:
    backend = MemoryBackend(capacity_bytes=40 * SIZE)
    of = [Quota("small", None, l2_bytes=20 * SIZE), Quota("great", None, l2_bytes=60 * SIZE)]
    backend.bound(Bounds(of, lambda quota: quota.l2_bytes))
    tier = Tier(backend)
    for _ in range(40):
        await tier.store("small", 2)
        await tier.store("great", 2)
    there = await tier.there()
    assert abs(there["small"] - 10) <= 1 and abs(there["great"] - 30) <= 1


async def test_those_without_a_quota_have_what_quotas_leave() -> None:
    backend = MemoryBackend(capacity_bytes=40 * SIZE)
    backend.bound(quotas_of(10, "a", "b"))
    tier = Tier(backend)
    await tier.store("nobody", 60)
    await tier.store("a", 30)
    await tier.store("b", 5)
    await tier.store("others", 60)
    there = await tier.there()
    assert (there["a"], there["b"]) == (10, 5) and there["nobody"] + there["others"] == 25


async def test_what_is_pinned_is_passed_over_and_leaves_later() -> None:
    index = Index()
    index.bound(quotas_of(8, "a", "b"))
    for tenant, count in (("a", 8), ("b", 4)):
        for number in range(count):
            of = chunk_hash(tenant, number)
            index.coming([Coming(of, None, Origin(tenant, "m", "", ""))])
            index.put(ObjectKey(of, 0, 0), SIZE)
    pinned = [ObjectKey(chunk_hash("a", number), 0, 0) for number in range(7)]
    index.pin(pinned)
    victims = index.victims(3 * SIZE)
    assert victims is not None
    assert [chunk.chunk_hash for chunk in victims] == [chunk_hash("a", 7), *(chunk_hash("b", n) for n in range(2))]
    index.unpin(pinned)
    victims = index.victims(3 * SIZE)
    assert victims is not None
    assert [chunk.chunk_hash for chunk in victims] == [chunk_hash("a", number) for number in range(3)]
    index.remove(victims, Removal.CAPACITY)
    index.check_integrity()


@pytest.mark.parametrize("seed", range(8))
async def test_nobody_loses_what_is_within_its_part_in_any_order_of_stores(seed: int) -> None:
    """Sixteen at once, some quotas changed meanwhile: who stores is told of no failure, and nothing is over."""
    random = Random(seed)
    backend = MemoryBackend(capacity_bytes=64 * SIZE)
    bounds = quotas_of(16)
    backend.bound(bounds)
    tier = Tier(backend)
    for turn in range(60):
        await asyncio.gather(*(tier.store(random.choice(TENANTS), random.randrange(1, 4)) for _ in range(4)))
        if turn % 20 == 19:
            bounds.change([Quota(None, None, l2_bytes=random.choice([4, 16, 40]) * SIZE)])
            backend.bound(bounds)
        there = await tier.there()
        assert there.total() <= 64
        if there.total() == 64:
            most, least = max(there.values()), 64 // max(len(there), 1)
            assert most >= least
