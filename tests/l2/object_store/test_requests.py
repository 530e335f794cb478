"""Requests that are waited for to their end, and turns to copy."""

import asyncio

import pytest

from async_cache.errors import BackendError
from async_cache.l2.object_store import requests
from async_cache.l2.object_store.requests import BLOCK_BYTES, STEP_BYTES, Requests


async def test_who_is_cancelled_waits_for_the_end_however_often_he_is() -> None:
    its = Requests()
    request: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    call = asyncio.ensure_future(its.to_its_end(request))
    for _ in range(3):
        await asyncio.sleep(0)
        call.cancel()
    await asyncio.sleep(0)
    assert not call.done() and not request.cancelled()
    request.set_result(7)
    with pytest.raises(asyncio.CancelledError):
        await call
    await its.close()


async def test_a_close_gives_up_what_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "CLOSE_SECONDS", 0.05)
    its = Requests()
    silent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    call = asyncio.ensure_future(its.to_its_end(silent))
    await asyncio.sleep(0)
    await asyncio.gather(its.close(), its.close())
    with pytest.raises(BackendError, match="closed"):
        await call
    assert silent.cancelled()


async def test_all_that_the_loop_copies_in_one_step_is_bounded() -> None:
    its, steps = Requests(), 0
    taken: list[int] = []

    async def take() -> None:
        async for block in its.blocks(4 * BLOCK_BYTES + 1):
            taken.extend([steps] * (block.stop - block.start > 1))

    calls = [asyncio.ensure_future(take()) for _ in range(16)]
    while not all(call.done() for call in calls):
        steps += 1
        await asyncio.sleep(0)
    assert len(taken) == 64
    assert max(map(taken.count, taken)) * BLOCK_BYTES <= STEP_BYTES
