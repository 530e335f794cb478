"""Time that counts only while the loop runs."""

import asyncio
from typing import Any

import pytest

from async_cache.aio.countdown import Countdown
from tests.virtual import virtual


def hold(seconds: float) -> None:
    """Do something for so long that is not asyncio's."""
    loop: Any = asyncio.get_running_loop()
    loop._selector.clock.advance(seconds)


async def end_of(seconds: float) -> float:
    """When a countdown of so many seconds is over that begins now."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    Countdown(loop, seconds, lambda: over.set_result(loop.time()))
    return await over


@pytest.mark.parametrize("seconds", [0.001, 0.1, 0.3, 1.0, 30.0])
@virtual
async def test_where_the_loop_runs_it_is_as_long_as_it_says(seconds: float) -> None:
    assert await end_of(seconds) == pytest.approx(seconds, abs=1e-5)


@pytest.mark.parametrize("begin", [0.0, 0.1, 0.124, 0.126, 0.5, 0.88, 0.99])
@pytest.mark.parametrize("length", [0.3, 1.0, 60.0])
@virtual
async def test_time_for_which_the_loop_was_held_does_not_count(begin: float, length: float) -> None:
    asyncio.get_running_loop().call_later(begin, hold, length)
    ran = await end_of(1.0) - length
    assert 1.0 - 1 / 8 <= ran <= 1.0 + 1 / 8


@virtual
async def test_short_holds_add_up() -> None:
    loop = asyncio.get_running_loop()
    for number in range(20):
        loop.call_later(number / 20, hold, 0.01)
    assert await end_of(1.0) >= 1.0


@virtual
async def test_it_ends_in_a_loop_that_is_always_held() -> None:
    loop = asyncio.get_running_loop()
    turns = 0

    def hold_again() -> None:
        nonlocal turns
        turns += 1
        hold(1.0)
        loop.call_soon(hold_again)

    loop.call_soon(hold_again)
    await end_of(1.0)
    assert turns < 40


@virtual
async def test_one_that_was_cancelled_calls_nobody_not_even_in_its_last_turn() -> None:
    loop = asyncio.get_running_loop()
    called: list[int] = []
    Countdown(loop, 1.0, lambda: called.append(1)).cancel()
    last = Countdown(loop, 1.0, lambda: called.append(2))
    loop.call_at(1.0, last.cancel)  # between its last part and the turn that it gives to others
    await asyncio.sleep(10)
    assert not called
