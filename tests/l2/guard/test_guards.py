"""Tests of what is asked of several backends at once."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from async_cache.l2.guard.breaker import Breaker
from async_cache.l2.guard.guard import Guard
from async_cache.l2.guard.guards import ask_all, held_by
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import FailingBackend, GatedBackend
from async_cache.testing.conformance import key, put


@pytest.mark.parametrize("ask", [held_by, ask_all])
@pytest.mark.parametrize("answers_as_it_is_cancelled", [False, True])
async def test_who_is_cancelled_while_one_is_silent_keeps_no_pin_of_those_that_have_answered(
    ask: Callable[..., Awaitable[object]], answers_as_it_is_cancelled: bool
) -> None:
    fast, slow = MemoryBackend("fast"), MemoryBackend("slow")
    gate = GatedBackend(slow, "lookup")
    for backend in (fast, slow):
        await put(backend, range(3), 16)
    guards = [Guard(backend, Breaker(5, 1.0)) for backend in (fast, gate)]
    asking = asyncio.ensure_future(ask(guards, [key(n) for n in range(3)]))
    await gate.reached("lookup")
    while guards[0].uses != 3:  # noqa: ASYNC110 (its lookup has ended in some turn)
        await asyncio.sleep(0)
    if answers_as_it_is_cancelled:
        gate.release()
    asking.cancel()
    await asyncio.wait([asking])
    for guard in guards:
        async with asyncio.timeout(60):
            await guard.wait_until_unused()
    assert asking.cancelled() and (fast.pins, slow.pins) == (0, 0)
    for guard in guards:
        await guard.close(1.0)


async def test_who_asks_all_hears_what_each_has_though_one_fails() -> None:
    good, bad = MemoryBackend("good"), FailingBackend(MemoryBackend("bad"), "lookup")
    await put(good, [0], 16)
    guards = [Guard(backend, Breaker(5, 1.0)) for backend in (good, bad)]
    assert await ask_all(guards, [key(0), key(1)]) == [[True, False], None]
    assert await ask_all([], [key(0)]) == []
    guards[0].unpin([key(0)])
    assert good.pins == 0
    for guard in guards:
        await guard.close(1.0)
