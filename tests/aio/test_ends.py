"""What is waited for to its end brings what it brings, and a cancel is raised when it has ended and not before."""

import asyncio
import threading

import pytest

from async_cache.aio.ends import at_its_end, in_thread


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_it_brings_a_result_or_raises() -> None:
    loop = asyncio.get_running_loop()
    good, bad = loop.create_future(), loop.create_future()
    good.set_result(1)
    bad.set_exception(ValueError("injected"))
    assert await at_its_end(good) == 1
    with pytest.raises(ValueError, match="injected"):
        await at_its_end(bad)


@pytest.mark.parametrize("end", ["result", "exception", "cancel"])
async def test_a_cancel_that_is_repeated_is_raised_when_it_has_ended(end: str) -> None:
    future = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(at_its_end(future))
    for _ in range(3):
        await turns()
        waiting.cancel()
    await turns()
    assert not waiting.done()
    if end == "result":
        future.set_result(None)
    elif end == "exception":
        future.set_exception(ValueError("nobody asks"))
    else:
        future.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_what_is_cancelled_itself_is_raised_as_that() -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    with pytest.raises(asyncio.CancelledError):
        await at_its_end(future)


def test_a_thread_has_ended_when_its_caller_goes_on() -> None:
    began, end, ended = threading.Event(), threading.Event(), []

    def work(value: int, *, more: int) -> int:
        began.set()
        assert end.wait(20)
        ended.append(value + more)
        return value + more

    async def main() -> None:
        task = asyncio.create_task(in_thread(work, 1, more=2))
        await asyncio.to_thread(began.wait, 20)
        task.cancel()
        await turns()
        assert not task.done() and not ended
        end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [3]
        assert await in_thread(work, 3, more=4) == 7

    asyncio.run(main())
