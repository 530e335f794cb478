"""Least recently used first, and the ring that its order is kept in."""

import gc
import random
import weakref
from collections.abc import Iterable
from itertools import pairwise

import pytest
from msgspec import Struct

from async_cache.retention.lru import LeastRecentlyUsed
from async_cache.retention.policy import EvictionPolicy
from async_cache.retention.ring import Ring
from async_cache.values import Removal


class Item(Struct, eq=False, weakref=True):
    """A thing with a name, as a chunk is."""

    name: str
    older: "Item | None" = None
    newer: "Item | None" = None


def used(names: Iterable[str]) -> tuple[LeastRecentlyUsed[Item], dict[str, Item]]:
    """A policy in which items were used in this order, and the items."""
    policy: LeastRecentlyUsed[Item] = LeastRecentlyUsed()
    items = {name: Item(name) for name in names}
    for item in items.values():
        policy.use(item)
    return policy, items


def order(policy: EvictionPolicy[Item]) -> str:
    return "".join(item.name for item in policy.victims())


def test_what_was_not_used_for_the_longest_time_leaves_first() -> None:
    policy, items = used("abcd")
    assert order(policy) == "abcd"
    policy.use(items["b"])
    policy.use(items["d"])
    policy.use(items["d"])
    assert order(policy) == "acbd"


def test_an_item_may_be_placed_right_before_another() -> None:
    policy, items = used("abc")
    policy.use(Item("x"), items["b"])
    policy.use(items["c"], items["a"])
    assert order(policy) == "caxb"


def test_before_one_that_is_not_known_is_the_end() -> None:
    policy, items = used("abc")
    policy.left(items["b"], Removal.CAPACITY)
    policy.use(Item("x"), items["b"])
    policy.use(Item("y"), Item("unknown"))
    assert order(policy) == "acxy"


@pytest.mark.parametrize("removal", Removal)
def test_what_has_left_is_no_victim_whatever_it_left_for(removal: Removal) -> None:
    policy, items = used("abc")
    policy.left(items["b"], removal)
    policy.left(items["b"], removal)
    policy.left(Item("unknown"), removal)
    assert order(policy) == "ac"
    assert (items["b"].older, items["b"].newer) == (None, None)


def test_what_is_suspended_comes_back_with_its_next_use() -> None:
    policy, items = used("abc")
    policy.suspend(items["a"])
    policy.suspend(items["a"])
    assert order(policy) == "bc"
    policy.use(items["a"])
    assert order(policy) == "bca"


def test_the_last_victim_may_leave_or_be_used_while_one_looks() -> None:
    policy, _ = used("abcdef")
    seen = ""
    for item in policy.victims():
        seen += item.name
        if item.name in "bde":
            policy.left(item, Removal.CAPACITY)
    assert seen == "abcdef"
    assert order(policy) == "acf"


def test_the_oldest_of_a_ring_is_the_one_used_first() -> None:
    ring: Ring[Item] = Ring()
    assert ring.oldest() is None
    items = [Item(name) for name in "ab"]
    for item in items:
        ring.use(item)
    assert ring.oldest() is items[0]
    assert list(ring) == items


def test_what_has_left_is_freed_without_the_garbage_collector() -> None:
    policy, items = used("abc")
    gone = [weakref.ref(item) for item in items.values()]
    gc.disable()
    try:
        for item in list(policy.victims()):
            policy.left(item, Removal.LOST)
        del item
        items.clear()
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_that_of_a_list(seed: int) -> None:
    chance = random.Random(seed)
    policy: LeastRecentlyUsed[Item] = LeastRecentlyUsed()
    items = [Item(str(n)) for n in range(8)]
    model: list[Item] = []
    for _ in range(500):
        item, before = chance.choice(items), chance.choice([None, *items])
        if item is before:
            continue
        if item in model:
            model.remove(item)
        if chance.random() < 0.7:
            model.insert(model.index(before) if before in model else len(model), item)
            policy.use(item, before)
        else:
            policy.left(item, Removal.CAPACITY)
        assert list(policy.victims()) == model


def test_what_is_used_together_ends_as_if_each_was_used_alone() -> None:
    chance = random.Random(3)
    for _ in range(300):
        (together, items), (alone, others) = used("abcdefgh"), used("abcdefgh")
        for _ in range(6):
            begin, end = sorted(chance.sample(range(9), 2))
            names = list(order(alone)[begin:end]) + chance.choices("abcdefghxy", k=chance.randrange(3))
            for name in names:
                known = others.setdefault(name, Item(name))
                items.setdefault(name, Item(name))
                alone.use(known)
            together.use_all(items[name] for name in names)
            assert order(together) == order(alone)
            for older, newer in pairwise(together.victims()):
                assert newer.older is older
