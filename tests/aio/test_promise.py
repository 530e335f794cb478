"""Promises: one outcome, a future for each who waits, and a cancelled wait that ends alone."""

import asyncio
import gc
from typing import Any

import pytest

from async_cache.aio.promise import Promise


async def test_the_value_comes_to_those_who_wait_and_to_those_who_ask_later() -> None:
    promise: Promise[int] = Promise()
    waiting = [promise.future(), asyncio.ensure_future(promise.wait())]
    await asyncio.sleep(0)
    assert promise.pending
    promise.resolve(0)
    assert not promise.pending
    assert await asyncio.gather(*waiting, promise.future(), promise.wait()) == [0, 0, 0, 0]


async def test_an_error_comes_to_those_who_wait_and_to_those_who_ask_later() -> None:
    promise: Promise[int] = Promise()
    waiting = [promise.future(), asyncio.ensure_future(promise.wait())]
    await asyncio.sleep(0)
    promise.break_with(LookupError("lost"))
    assert not promise.pending
    for future in [*waiting, promise.future(), promise.wait()]:
        with pytest.raises(LookupError, match="lost"):
            await future


async def test_the_first_outcome_stays() -> None:
    resolved: Promise[int] = Promise()
    resolved.resolve(1)
    resolved.resolve(2)
    resolved.break_with(LookupError("late"))
    assert await resolved.wait() == 1

    broken: Promise[int] = Promise()
    broken.break_with(LookupError("first"))
    broken.break_with(LookupError("second"))
    broken.resolve(1)
    with pytest.raises(LookupError, match="first"):
        await broken.wait()


async def test_a_cancelled_wait_ends_alone() -> None:
    promise: Promise[int] = Promise()
    cancelled, task, waiting = promise.future(), asyncio.ensure_future(promise.wait()), promise.future()
    await asyncio.sleep(0)
    cancelled.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    promise.resolve(1)
    assert cancelled.cancelled()
    assert await waiting == 1


async def test_a_promise_does_not_keep_those_who_left() -> None:
    promise: Promise[int] = Promise()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await promise.wait()
    await asyncio.sleep(0)  # a future tells of its end in the next step
    assert promise._waiters == []


async def test_a_waiter_that_is_cancelled_in_the_same_step_is_passed_over() -> None:
    promise: Promise[int] = Promise()
    cancelled, waiting = promise.future(), promise.future()
    cancelled.cancel()
    promise.resolve(1)  # before the loop has told of the cancellation
    assert await waiting == 1


async def test_an_error_that_nobody_looks_at_is_not_logged() -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    promise: Promise[int] = Promise()
    waiting = promise.future()
    promise.break_with(LookupError("lost"))
    asked_later = promise.future()
    del waiting, asked_later
    gc.collect()
    assert told == []
