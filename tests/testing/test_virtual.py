"""Virtual time: it jumps, it keeps the order of deadlines, and what would hang fails."""

import asyncio
import time

import pytest
from async_solipsism import SleepForeverError

from async_cache.testing.virtual import run_virtual


def test_an_hour_passes_at_once() -> None:
    async def main() -> float:
        await asyncio.gather(*(asyncio.sleep(seconds) for seconds in (3600, 1800)))
        return asyncio.get_running_loop().time()

    begin = time.monotonic()
    assert run_virtual(main()) == 3600
    assert time.monotonic() - begin < 60


def test_deadlines_pass_in_order() -> None:
    async def main() -> list[float]:
        order: list[float] = []

        async def wait(seconds: float) -> None:
            await asyncio.sleep(seconds)
            order.append(seconds)

        await asyncio.gather(*map(wait, (3, 1, 2)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        return [*order, asyncio.get_running_loop().time()]

    assert run_virtual(main()) == [1, 2, 3, 8]


def test_an_exception_comes_out() -> None:
    async def main() -> None:
        raise LookupError("out")

    with pytest.raises(LookupError, match="out"):
        run_virtual(main())


def test_a_task_that_is_left_is_cancelled_and_the_loop_closed() -> None:
    async def main() -> tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]:
        return asyncio.get_running_loop(), asyncio.create_task(asyncio.sleep(1))

    loop, task = run_virtual(main())
    assert task.cancelled()
    assert loop.is_closed()


def test_what_would_hang_fails() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(SleepForeverError):
        run_virtual(main())
