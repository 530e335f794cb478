"""Whatever the policy: what is leased, pinned or retained is never evicted, of L1 or of a backend."""

from random import Random

import pytest

from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.l2.backend import Coming
from async_cache.l2.index import Index
from async_cache.memory.arena import Arena
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import ModelLayout
from async_cache.prompt.objects import PAGE_BYTES, ObjectGroup
from async_cache.prompt.origin import Origin
from async_cache.retention.policies import NAMES, make_policy
from async_cache.retention.quotas import Bounds, Quota
from async_cache.values import Removal

LAYOUT = ModelLayout("model", (ObjectGroup((PAGE_BYTES,), "uint8"),), chunk_tokens=4)
PAGES, STEPS = 24, 600
QUOTAS = [Quota("bound", None, 6 * PAGE_BYTES, 6)]
PATHS = [[bytes([salt, fork if n > 2 else 0, n]) * 12 for n in range(6)] for salt in range(4) for fork in range(3)]
OWNERS = "bound", "free"


def owner_of(chunk_hash: bytes) -> str:
    return OWNERS[chunk_hash[0] % 2]


class Watched(L1Store):
    evicted = 0

    def _evict(self, entry: Entry, freed: list[tuple[int, int]], removal: Removal = Removal.CAPACITY) -> None:
        assert not (entry.leases or entry.pins or entry.retained), "it is in use"
        self.evicted += 1
        super()._evict(entry, freed, removal)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", NAMES)
def test_nothing_that_is_in_use_is_evicted_from_memory(policy: str, seed: int) -> None:
    random, seconds = Random(seed), [0.0]
    make = make_policy(policy, lambda: seconds[0])
    l1 = Watched(Arena(PAGES * PAGE_BYTES), make, lambda entry: None, bounds=Bounds(QUOTAS, lambda q: q.l1_bytes))
    leased: list[list[Entry]] = []
    pinned: list[Entry] = []
    for _ in range(STEPS):
        seconds[0] += random.random() * 20
        path = random.choice(PATHS)[: random.randrange(1, 7)]
        match random.randrange(8):
            case 0 | 1 | 2:
                make.asked(path, len(path) * 4, 4)
                missing = [h for h in path if h not in l1.index]
                for reservation in l1.reserve(LAYOUT, [(h, 0) for h in missing], owner_of(path[0])):
                    place = path.index(reservation.chunk_hash)
                    l1.commit(reservation, 1, path[place - 1] if place else None)
            case 3 if len(leased) < 5:
                found = [l1.index[h] for h in path if h in l1.index]
                l1.lease(found)
                leased.append(found)
            case 4 if leased:
                l1.release(reversed(leased.pop(random.randrange(len(leased)))))
            case 5 if len(pinned) < 8 and l1.index:
                pinned.append(random.choice(list(l1.index.values())))
                l1.pin(pinned[-1])
            case 6 if pinned:
                l1.unpin(pinned.pop(random.randrange(len(pinned))))
            case 7 if l1.index:
                entry = random.choice(list(l1.index.values()))
                if entry.retained:
                    l1.uses.unretain(entry)
                elif sum(each.retained for each in l1.index.values()) < 6:
                    l1.uses.retain(entry)
        l1.check_integrity()
    assert l1.evicted > 50
    for found in leased:
        l1.release(reversed(found))
    l1.close()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", NAMES)
def test_nothing_that_is_pinned_is_evicted_from_a_backend(policy: str, seed: int) -> None:
    random, seconds = Random(seed), [0.0]
    removed: list[tuple[bytes, Removal]] = []

    def left(chunk_hash: bytes, removal: Removal) -> None:
        assert removal is Removal.DELETED or chunk_hash not in index.pins, "it is in use"
        removed.append((chunk_hash, removal))

    index = Index(make_policy(policy, lambda: seconds[0]), left)
    index.bound(Bounds(QUOTAS, lambda quota: quota.l2_bytes))
    pinned: list[list[bytes]] = []
    for _ in range(STEPS):
        seconds[0] += random.random() * 20
        path = random.choice(PATHS)[: random.randrange(1, 7)]
        origin = Origin(owner_of(path[0]), "model")
        match random.randrange(5):
            case 0 | 1 | 2:
                index.asked(path, len(path) * 4, 4, origin)
                index.coming([Coming(h, path[n - 1] if n else None, origin) for n, h in enumerate(path)])
                index.pin_prefix(path)
                for h in path:
                    if index.get(h) is None and (reserved := index.reserve(h, 1)) is not None:
                        if index.evict(index.used_bytes + 1 - PAGES) is not None:
                            index.put(ObjectKey(h, 0, 0), 1)
                        index.unreserve(reserved)
                index.unpin_prefix(path)
            case 3 if len(pinned) < 3:
                index.pin_prefix(path)
                pinned.append(path)
            case 4 if pinned:
                index.unpin_prefix(pinned.pop(random.randrange(len(pinned))))
        index.check_integrity()
        assert index.used_bytes <= PAGES
    assert {why for _, why in removed} == {Removal.CAPACITY, Removal.QUOTA} and len(removed) > 50
