"""Queues that owners share: equal shares of what it costs, and nothing is left of who gives up."""

import asyncio

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup
from async_cache.l2.guard.breaker import Breaker, BreakerState
from async_cache.l2.guard.fair import FairQueue, Gate
from async_cache.l2.guard.guard import Guard, Timeouts
from async_cache.l2.memory import MemoryBackend
from async_cache.prompt.keys import ObjectKey
from async_cache.testing.virtual import run_virtual


def drained(queue):
    return [queue.pop() for _ in iter(lambda: bool(queue), False)]


def test_owners_take_turns_by_what_theirs_cost_however_much_one_puts_in():
    queue = FairQueue()
    for n in range(10):
        queue.push("red", 100, f"red {n}")
    queue.push("blue", 10, "blue 0")
    queue.push("blue", 10, "blue 1")
    assert drained(queue)[:4] == ["red 0", "blue 0", "blue 1", "red 1"]


def test_those_of_one_owner_come_in_order():
    queue = FairQueue()
    for n in range(5):
        queue.push("red", 5 - n, n)
    assert drained(queue) == [0, 1, 2, 3, 4]


def test_who_was_away_has_no_more_than_the_others_when_he_comes():
    queue = FairQueue()
    for n in range(100):
        queue.push("red", 1, n)
    for _ in range(50):
        queue.pop()
    for n in range(50):
        queue.push("late", 1, f"late {n}")
    first = [queue.pop() for _ in range(20)]
    assert 9 <= sum(isinstance(item, str) for item in first) <= 11


def test_an_item_that_is_taken_out_never_comes():
    queue = FairQueue()
    items = [object() for _ in range(3)]
    for item in items:
        queue.push("red", 1, item)
    queue.remove(items[1])
    assert drained(queue) == [items[0], items[2]]
    queue.push("red", 1, items[1])
    queue.remove(items[1])
    assert not queue


async def test_a_gate_lets_in_so_much_and_others_as_room_comes():
    gate = Gate(100)
    await gate.enter("red", 80)
    waiting = [asyncio.create_task(gate.enter(owner, 50)) for owner in ("red", "red", "blue")]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    gate.leave(80)
    await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [True, False, True]
    gate.leave(50)
    gate.leave(50)
    await waiting[1]
    gate.leave(50)
    assert not gate.inside


async def test_who_gives_up_leaves_nothing_behind_in_a_gate():
    gate = Gate(100)
    await gate.enter("red", 100)
    waiting = [asyncio.create_task(gate.enter("red", 60)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    gate.leave(100)
    waiting[1].cancel()  # in the step in which it is let in
    await asyncio.wait(waiting, timeout=60)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    gate.leave(60)
    assert not gate.inside


async def test_what_is_larger_than_the_gate_goes_alone():
    gate = Gate(100)
    await gate.enter("red", 1000)
    gate.leave(1000)
    assert not gate.inside


class Slow(MemoryBackend):
    """One thread's worth of searches: 50 microseconds for an object."""

    async def open(self):
        await super().open()
        self.thread = asyncio.Lock()

    async def lookup(self, keys):
        async with self.thread:
            await asyncio.sleep(len(keys) * 50e-6)
            return await super().lookup(keys)


def test_a_search_that_is_queued_for_long_is_not_ill_and_others_need_not_wait_for_all_of_it():
    async def search():
        backend = Slow()
        await backend.open()
        guard = Guard(backend, Breaker(1, 5.0), Timeouts(lookup_seconds=1.0))
        many = [ObjectKey(n.to_bytes(32, "big"), 0, 0) for n in range(100_000)]
        red = [asyncio.create_task(guard.lookup(many, "red")) for _ in range(3)]
        await asyncio.sleep(0)
        clock = asyncio.get_running_loop().time
        began = clock()
        assert await guard.lookup(many[:8], "blue") == [False] * 8
        assert clock() - began < 0.7, "a part of each that is out, and no more"
        for task in red:
            assert len(await task) == len(many)
        assert clock() - began > 10
        assert guard.breaker.state is BreakerState.CLOSED and not guard.uses

    run_virtual(search())


def test_who_puts_in_one_at_a_time_gets_no_more_than_who_puts_in_all_at_once():
    queue = FairQueue()
    for n in range(200):
        queue.push("small", 1, f"small {n}")
    queue.push("large", 50, "large 0")
    came = []
    for _ in range(104):
        item = queue.pop()
        came.append(item)
        if item.startswith("large"):
            queue.push("large", 50, f"large {len(came)}")
    assert sum(item.startswith("large") for item in came) <= 3


def test_a_step_does_not_look_at_all_owners():
    queue = FairQueue()
    for n in range(20_000):
        queue.push(f"owner {n}", 1, n)
    items = drained(queue)  # in a second even here, which is far from all of them each time
    assert sorted(items) == list(range(20_000))
    assert not queue._order and not queue._ahead


class Deleting(MemoryBackend):
    """Notes whose objects are deleted, each time for a second."""

    async def open(self):
        await super().open()
        self.asked = []

    async def delete(self, keys):
        self.asked.append(keys[0].chunk_hash)
        await asyncio.sleep(1)
        return await super().delete(keys)


def test_deletions_of_others_have_their_turn_and_their_time_begins_with_it():
    group = ObjectGroup((1,), "uint8")
    layouts = [ModelLayout("m", (group,) * groups, chunk_tokens=1) for groups in (1, 4096)]
    backend = Deleting()

    async def remove():
        async with AsyncCache(CacheConfig(l1_bytes=2**24, store_timeout_seconds=1.5), [backend]) as cache:
            small, large = layouts[0].prompt([1], salt="blue"), layouts[1].prompt([1, 2, 3], salt="red")
            for prompt in (small, large):
                async with cache.store(prompt) as writer:
                    for chunk in writer:
                        chunk.commit()
            await cache.flush()
            red = [asyncio.create_task(cache.delete(large)) for _ in range(3)]
            await asyncio.sleep(0)
            blue = asyncio.create_task(cache.delete(small))
            red[2].cancel()
            assert (await blue).chunks == 1
            assert backend.asked.index(small.chunk_hashes[0]) <= 16, "behind a part of another's, which is 16 calls"
            assert sum([(await task).chunks for task in red[:2]]) >= 3
            assert not cache.core.guards.current[0].removals.inside

    run_virtual(remove())
