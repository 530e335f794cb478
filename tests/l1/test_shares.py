"""What each owner has of L1: room is lent and taken back, and nobody loses what it keeps to another."""

import random
from functools import partial

import pytest

from async_cache import ModelLayout, ObjectGroup
from async_cache.l1.store import L1Store
from async_cache.memory.arena import Arena
from async_cache.prompt.objects import PAGE_BYTES
from async_cache.retention.lru import LeastRecentlyUsed
from async_cache.retention.policies import NAMES, make_policy

PAGES = 16
ONE, TWO = (ModelLayout(f"{n}", (ObjectGroup((n * PAGE_BYTES,), "uint8"),), chunk_tokens=1) for n in (1, 2))


def make_store(policy="lru", pages=PAGES, **kept):
    make = partial(make_policy, policy, lambda: 0.0)
    l1 = L1Store(Arena(pages * PAGE_BYTES), make(), lambda entry: None)
    parts = {owner: ({owner}, share * PAGE_BYTES) for owner, share in kept.items()}
    l1.divide(parts, (pages - sum(kept.values())) * PAGE_BYTES, make)
    return l1


def digest(owner, number):
    return f"{owner} {number}".encode().ljust(32)


def put(l1, owner, count, layout=ONE, first=0):
    """How many of so many chunks there was room for."""
    made = l1.reserve(layout, [(digest(owner, n), 0) for n in range(first, first + count)], owner)
    for reservation in made:
        l1.commit(reservation, 1)
    l1.check_integrity()
    return len(made)


def pages_of(l1, owner):
    return sum(entry.room_bytes for entry in l1.index.values() if entry.owner == owner) // PAGE_BYTES


def test_what_others_do_not_use_is_lent_and_taken_back():
    l1 = make_store(red=8, blue=4)
    assert put(l1, "red", 16) == 16
    assert put(l1, "blue", 4) == 4
    assert (pages_of(l1, "red"), pages_of(l1, "blue")) == (12, 4)
    assert put(l1, "", 4) == 4
    assert (pages_of(l1, "red"), pages_of(l1, "blue"), pages_of(l1, "")) == (8, 4, 4)


def test_who_has_more_than_its_own_loses_its_own_first():
    l1 = make_store(red=4, blue=4)
    put(l1, "blue", 4)
    put(l1, "red", 12)
    assert put(l1, "red", 20, first=100) == 12
    assert (pages_of(l1, "red"), pages_of(l1, "blue")) == (12, 4)
    assert digest("blue", 0) in l1.index and digest("red", 0) not in l1.index


def test_nobody_takes_what_another_keeps_even_if_all_of_its_own_is_in_use():
    l1 = make_store(red=4, blue=12)
    put(l1, "blue", 12)
    put(l1, "red", 4)
    l1.lease([l1.index[digest("red", n)] for n in range(4)])
    assert put(l1, "red", 2, first=50) == 0
    assert pages_of(l1, "blue") == 12


def test_who_has_most_too_much_gives_back_first():
    l1 = make_store(pages=20, red=2, blue=2, green=12)
    put(l1, "red", 12)
    put(l1, "blue", 8)
    assert put(l1, "green", 4) == 4
    assert (pages_of(l1, "red"), pages_of(l1, "blue")) == (8, 8)


def test_room_for_what_is_large_comes_from_no_neighbour_that_keeps_its_own():
    l1 = make_store(red=8, blue=8)
    for n in range(8):
        put(l1, "red", 1, first=n)
        put(l1, "blue", 1, first=n)
    assert put(l1, "red", 1, TWO, first=100) == 0  # its own are scattered among those that blue keeps
    assert pages_of(l1, "blue") == 8


def test_what_is_deleted_and_still_read_counts():
    l1 = make_store(red=4, blue=4)
    put(l1, "red", 6)
    entries = list(l1.index.values())
    l1.lease(entries)
    l1.remove(entries)
    assert l1.shares.of("red").used_bytes == 6 * PAGE_BYTES
    l1.release(entries)
    assert l1.shares.of("red").used_bytes == 0
    l1.check_integrity()


def test_shares_may_be_changed_while_chunks_are_there():
    l1 = make_store()
    put(l1, "red", 8)
    put(l1, "blue", 8)
    make = LeastRecentlyUsed
    l1.divide({"red": ({"red"}, 4 * PAGE_BYTES)}, 12 * PAGE_BYTES, make)
    l1.check_integrity()
    assert l1.shares.of("red").chunks == 8 and l1.shares.those_of({"red"})[0].used_bytes == 8 * PAGE_BYTES
    put(l1, "blue", 4, first=50)
    assert pages_of(l1, "red") == 4
    l1.divide({}, 16 * PAGE_BYTES, make)
    put(l1, "blue", 16, first=100)
    assert pages_of(l1, "red") == 0


def test_what_was_removed_while_it_was_leased_moves_as_well():
    l1 = make_store()
    put(l1, "red", 4)
    leased = list(l1.index.values())
    l1.lease(leased)
    l1.remove(leased)
    l1.divide({"red": ({"red"}, 4 * PAGE_BYTES)}, 12 * PAGE_BYTES, LeastRecentlyUsed)
    l1.check_integrity()
    l1.release(leased)
    l1.check_integrity()
    assert [share.used_bytes for share in l1.shares] == [0, 0]


@pytest.mark.parametrize("policy", NAMES)
def test_whatever_three_do_none_loses_what_it_keeps_to_another(policy):
    kept = {"red": 6, "blue": 5, "": 5}
    l1 = make_store(policy, red=6, blue=5)
    chance = random.Random(policy)
    leased = {owner: [] for owner in kept}
    for step in range(1500):
        owner = chance.choice(list(kept))
        before = {other: pages_of(l1, other) for other in kept}
        match chance.randrange(4):
            case 0 | 1:
                put(l1, owner, chance.randrange(1, 6), chance.choice((ONE, ONE, TWO)), first=chance.randrange(200))
            case 2:
                own = [entry for entry in l1.index.values() if entry.owner == owner]
                some = chance.sample(own, min(len(own), 3))
                l1.lease(some)
                leased[owner].append(some)
            case 3 if leased[owner]:
                l1.release(leased[owner].pop(0))
        l1.check_integrity()
        for other in kept.keys() - {owner}:
            assert pages_of(l1, other) >= min(before[other], kept[other]), (step, owner, other)
