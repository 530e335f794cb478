"""Requests and threads that are waited for to their end."""

import asyncio
import threading
import time

import pytest

from async_cache.errors import BackendError
from async_cache.l2.object_store import requests
from async_cache.l2.object_store.requests import STEP_BYTES, Requests


async def test_who_is_cancelled_waits_for_the_thread_however_often_it_is() -> None:
    under_way, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        under_way.set()
        go_on.wait(20)
        ended.set()

    its = Requests("test")
    call = asyncio.ensure_future(its.in_thread(work))
    await asyncio.to_thread(under_way.wait, 20)
    for _ in range(3):
        call.cancel()
        await asyncio.sleep(0)
    assert not call.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended.is_set()
    await its.close()


async def test_a_close_gives_up_what_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "CLOSE_SECONDS", 0.05)
    its = Requests("test")
    silent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    call = asyncio.ensure_future(its.to_its_end(silent))
    await asyncio.sleep(0)
    await asyncio.gather(its.close(), its.close())
    with pytest.raises(BackendError, match="closed"):
        await call
    assert silent.cancelled()
    with pytest.raises(BackendError, match="closed"):
        await its.in_thread(time.sleep, 0)


async def test_the_threads_end_with_the_close() -> None:
    before = threading.active_count()
    its = Requests("test")
    assert await its.in_thread(int, "7") == 7
    assert threading.active_count() > before
    await its.close()
    while threading.active_count() > before:  # noqa: ASYNC110 (a thread is waited for)
        await asyncio.sleep(0.001)


async def test_all_that_the_loop_copies_in_one_step_is_bounded() -> None:
    its, size_bytes, steps = Requests("test"), STEP_BYTES // 4, 0
    taken: list[int] = []

    async def take() -> None:
        await its.turn(size_bytes)
        taken.append(steps)

    calls = [asyncio.ensure_future(take()) for _ in range(64)]
    while not all(call.done() for call in calls):
        steps += 1
        await asyncio.sleep(0)
    assert max(map(taken.count, taken)) <= 4
    assert steps <= 64 // 4 * 4  # and it is no more steps than that takes, but for those of the lock
    await its.close()
