"""The precise clock is the loop's, and moves within a turn of it."""

import asyncio
import time

import uvloop

from async_cache.aio.clock import precise_clock
from async_cache.testing.virtual import run_virtual


async def agrees() -> bool:
    loop = asyncio.get_running_loop()
    clock = precise_clock(loop)
    began = clock()
    while clock() == began:  # it does not stand still in this turn
        pass
    await asyncio.sleep(0)
    return abs(clock() - loop.time()) < 60 and abs(clock() - time.monotonic()) < 60  # on a busy machine, too


def test_it_is_the_loops_on_every_loop() -> None:
    assert asyncio.run(agrees())
    assert uvloop.run(agrees())


def test_where_a_test_moves_the_time_it_moves_too() -> None:
    async def main() -> list[float]:
        clock = precise_clock(asyncio.get_running_loop())
        before = clock()
        await asyncio.sleep(100)
        return [before, clock()]

    assert run_virtual(main()) == [0, 100]
