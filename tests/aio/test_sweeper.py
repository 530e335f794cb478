"""Sweeping: what nobody comes back for expires at its time, and the cost follows what expires, not what lives."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field

from async_cache.aio.sweeper import Expiry, Sweeper
from async_cache.testing.virtual import run_virtual

DAY = 86_399  # all but a second: the virtual clock takes a sleep of 24 hours for one without end


class CountingSweeper(Sweeper):
    """Counts its sweeps."""

    sweeps = 0

    def sweep(self, now: float) -> float | None:
        self.sweeps += 1
        return super().sweep(now)


@dataclass
class Bench:
    """A running sweeper, and what expired when."""

    sweeper: CountingSweeper = field(default_factory=CountingSweeper)
    expired: list[tuple[object, float]] = field(default_factory=list)

    def expiry(self, ttl_seconds: float) -> Expiry[object]:
        return self.sweeper.expiry(ttl_seconds, lambda item: self.expired.append((item, now())))


def now() -> float:
    return asyncio.get_running_loop().time()


def run(scene: Callable[[Bench], Coroutine[None, None, None]]) -> None:
    """Play a scene in virtual time, beside a running sweeper."""

    async def main() -> None:
        bench = Bench()
        task = asyncio.create_task(bench.sweeper.run())
        try:
            await asyncio.sleep(0)
            await scene(bench)
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    run_virtual(main())


def test_an_item_expires_a_ttl_after_it_was_added() -> None:
    async def scene(bench: Bench) -> None:
        expiry = bench.expiry(60)
        expiry.add("a")
        await asyncio.sleep(10)
        expiry.add("b")
        await asyncio.sleep(DAY)
        assert bench.expired == [("a", 60), ("b", 70)]
        assert (expiry.swept, len(expiry)) == (2, 0)

    run(scene)


def test_adding_again_renews() -> None:
    async def scene(bench: Bench) -> None:
        expiry = bench.expiry(60)
        expiry.add("renewed")
        expiry.add("left")
        await asyncio.sleep(59)
        expiry.add("renewed")
        assert list(expiry) == ["left", "renewed"]
        await asyncio.sleep(DAY)
        assert bench.expired == [("left", 60), ("renewed", 119)]

    run(scene)


def test_what_was_discarded_does_not_expire() -> None:
    async def scene(bench: Bench) -> None:
        expiry = bench.expiry(60)
        expiry.add("a")
        expiry.discard("a")
        expiry.discard("never there")
        assert "a" not in expiry
        await asyncio.sleep(DAY)
        assert (bench.expired, expiry.swept) == ([], 0)

    run(scene)


def test_a_sleeping_sweeper_is_woken_by_a_nearer_deadline() -> None:
    async def scene(bench: Bench) -> None:
        far, near = bench.expiry(3600), bench.expiry(1)
        far.add("far")
        await asyncio.sleep(10)
        near.add("near")
        await asyncio.sleep(3600)
        assert bench.expired == [("near", 11), ("far", 3600)]

    run(scene)


def test_what_is_added_while_another_expires_expires_too() -> None:
    async def scene(bench: Bench) -> None:
        second = bench.expiry(5)
        first: Expiry[object] = bench.sweeper.expiry(60, second.add)
        first.add("a")
        await asyncio.sleep(DAY)
        assert bench.expired == [("a", 65)]

    run(scene)


def test_items_that_come_and_go_before_they_are_due_wake_nobody() -> None:
    async def scene(bench: Bench) -> None:
        expiry = bench.expiry(60)
        expiry.add("first")
        await asyncio.sleep(1)
        sweeps = bench.sweeper.sweeps
        expiry.discard("first")
        for number in range(50):
            expiry.add(number)
            await asyncio.sleep(0.1)
            expiry.discard(number)
        assert bench.sweeper.sweeps == sweeps
        expiry.add("last")
        added = now()
        await asyncio.sleep(DAY)
        assert bench.expired == [("last", added + 60)]

    run(scene)


def test_a_day_without_items_costs_one_sweep() -> None:
    async def scene(bench: Bench) -> None:
        bench.expiry(1)
        await asyncio.sleep(DAY)
        assert bench.sweeper.sweeps == 1

    run(scene)


def test_the_sweeps_follow_what_expires_not_what_lives_or_is_renewed() -> None:
    async def scene(bench: Bench) -> None:
        living, expiring = bench.expiry(7200), bench.expiry(60)
        for item in range(10_000):
            living.add(item)
        for _ in range(59):
            for item in range(100):
                living.add(item)
            await asyncio.sleep(1)
        before = bench.sweeper.sweeps
        expiring.add("a")
        await asyncio.sleep(3600)
        assert [item for item, _ in bench.expired] == ["a"]
        assert bench.sweeper.sweeps - before == 2  # it was woken, and the deadline passed
        assert before <= 2

    run(scene)


def test_a_sweep_looks_only_at_what_expires() -> None:
    class Item:
        looks = 0

        def __hash__(self) -> int:
            Item.looks += 1
            return id(self)

    async def scene(bench: Bench) -> None:
        expiry = bench.expiry(60)
        items = [Item() for _ in range(1000)]
        expiry.add(items[0])
        await asyncio.sleep(30)
        for item in items[1:]:
            expiry.add(item)
        Item.looks = 0
        assert bench.sweeper.sweep(now()) == 60
        assert Item.looks < 10
        assert bench.sweeper.sweep(60) == 90
        assert len(bench.expired) == 1
        assert Item.looks < 20

    run(scene)


def test_the_loop_gets_its_turn_while_many_expire_at_once() -> None:
    async def scene(bench: Bench) -> None:
        expiry = bench.expiry(60)
        for item in range(10_000):
            expiry.add(item)
        await asyncio.sleep(60)
        turns, most, before = 0, 0, len(bench.expired)
        while expiry:
            await asyncio.sleep(0)
            turns, most, before = turns + 1, max(most, len(bench.expired) - before), len(bench.expired)
        assert most <= 256
        assert turns >= 10_000 // 256
        assert len(bench.expired) == expiry.swept == 10_000
        assert now() < 61

    run(scene)


def test_what_can_not_be_reclaimed_is_logged_and_the_rest_expires() -> None:
    async def scene(bench: Bench) -> None:
        def fail(item: object) -> None:
            raise LookupError(item)

        failing: Expiry[object] = bench.sweeper.expiry(60, fail)
        working = bench.expiry(60)
        for item in "ab":
            failing.add(item)
        working.add("c")
        await asyncio.sleep(3600)
        assert (len(failing), [item for item, _ in bench.expired]) == (0, ["c"])

    run(scene)
