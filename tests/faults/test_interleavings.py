"""Whatever the order in which the loop runs what is ready: every byte that is read is right, promises are kept, nothing
is loaded twice at a time or handed out twice, what was deleted stays away, and in the end nothing is held."""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from async_cache.retention.policies import NAMES

from .interleaving import REPLAY, ShuffledLoop, run, seeds
from .program import Program
from .small_steps import small_steps

REACHED = {
    "promises of what is in L2",
    "promises kept",
    "found what is safe",
    "loaded again after an eviction",
    "loads shared",
    "loads cancelled",
    "waits cancelled",
    "results claimed",
    "queries refused",
    "requests swept",
    "writers swept",
    "removals",
    "closed",
    "reads across a close",
    "write-backs dropped",
    "hits memory",
    "hits deadline",
    "hits backend_error",
    "result deadline",
    "result backend_error",
    "result corrupt",
    "result gone",
    "result cancelled",
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("steps", [nullcontext, small_steps], ids=["", "in small steps"])
def test_in_whatever_order_callbacks_run_the_cache_keeps_its_word(
    steps: Callable[[], AbstractContextManager[None]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    reached: Counter[str] = Counter()
    for seed in seeds(quick=1000, long=40_000):
        with steps():
            run(seed, lambda loop: Program(loop, reached).main())
        assert not caplog.records, f"{REPLAY}={seed}: what went wrong was only logged"
    if REPLAY not in os.environ:
        seldom = {what: reached[what] for what in REACHED if reached[what] < 5}
        assert not seldom, f"too seldom to prove anything: {seldom}"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("policy", [name for name in NAMES if name != "lru"])
def test_whatever_the_policy_the_cache_keeps_its_word(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    for seed in seeds(quick=60, long=5000):
        run(seed, lambda loop: Program(loop, Counter(), policy=policy).main())
        assert not caplog.records, f"{REPLAY}={seed}: what went wrong was only logged"


@pytest.mark.parametrize("seed", [950_426])
def test_a_schedule_that_found_a_fault_in_small_steps(seed: int) -> None:
    """What another request had asked for of a chunk came before the rest: `GONE` was told where a deadline passed."""
    with small_steps():
        run(seed, lambda loop: Program(loop, Counter()).main())


def traced(seed: int) -> list[str]:
    async def main(loop: ShuffledLoop) -> None:
        loop.trace = []
        await Program(loop, Counter()).main()

    return run(seed, main).trace or []


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_makes_the_same_schedule_again(seed: int) -> None:
    first = traced(seed)
    assert len(first) > 100
    assert first == traced(seed) != traced(seed + 1)


def test_what_is_ready_runs_in_any_order_and_all_of_it_runs() -> None:
    orders = set()
    for seed in range(500):
        order: list[int] = []

        async def note(number: int, order: list[int] = order) -> None:
            order.append(number)

        async def main(_: ShuffledLoop, note: Callable[[int], Coroutine[Any, Any, None]] = note) -> None:
            await asyncio.gather(*map(note, range(4)))

        run(seed, main)
        assert sorted(order) == [0, 1, 2, 3]
        orders.add(tuple(order))
    assert len(orders) == 24


def test_a_failure_says_how_to_replay_it() -> None:
    async def main(_: ShuffledLoop) -> None:
        raise KeyError

    with pytest.raises(KeyError) as caught:
        run(7, main)
    assert f"{REPLAY}=7" in caught.value.__notes__[0]
