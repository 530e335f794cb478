"""What must not be left behind is waited for, cancelled or not."""

import asyncio
import threading

import pytest

from async_cache.aio.ending import in_thread, to_its_end, until_done


@pytest.mark.parametrize("cancels", [0, 1, 3])
@pytest.mark.parametrize("end", ["result", "error", "cancel"])
async def test_a_wait_ends_with_its_future_and_a_cancel_is_raised_then(cancels: int, end: str) -> None:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(to_its_end(future))
    await asyncio.sleep(0)
    for _ in range(cancels):
        waiting.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
    {"result": lambda: future.set_result(1), "error": lambda: future.set_exception(OSError()), "cancel": future.cancel}[
        end
    ]()
    await asyncio.wait([waiting])
    assert waiting.cancelled() == bool(cancels)
    if not cancels:
        assert waiting.result() is future
        assert end != "error" or future.exception()


@pytest.mark.parametrize("end", ["result", "error", "cancel", "time", "caller", "before"])
async def test_a_wait_for_the_first_of_some_ends_with_it_and_leaves_nothing_at_the_others(end: str) -> None:
    loop = asyncio.get_running_loop()
    first, other = loop.create_future(), loop.create_future()
    if end == "before":
        first.set_result(1)
    waiting = asyncio.create_task(until_done(loop, other, first, timeout_seconds=0.001 if end == "time" else 60))
    await asyncio.sleep(0)
    assert waiting.done() == (end == "before")
    if end in ("result", "error", "cancel", "caller"):
        {
            "result": lambda: first.set_result(1),
            "error": lambda: first.set_exception(OSError()),
            "cancel": first.cancel,
            "caller": waiting.cancel,
        }[end]()
    await asyncio.wait([waiting], timeout=60)
    assert waiting.cancelled() if end == "caller" else waiting.result() is None
    assert first.done() == (end not in ("time", "caller"))
    assert not other.done() and not other._callbacks
    assert end != "error" or first.exception()


def test_a_thread_has_ended_when_its_caller_goes_on() -> None:
    began, end, ended = threading.Event(), threading.Event(), []

    def work(value: int, *, more: int) -> int:
        began.set()
        assert end.wait(60)
        ended.append(value + more)
        return value + more

    async def main() -> None:
        task = asyncio.create_task(in_thread(work, 1, more=2))
        await asyncio.to_thread(began.wait, 20)
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done() and not ended
        end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [3]
        assert await in_thread(work, 3, more=4) == 7

    asyncio.run(main())
