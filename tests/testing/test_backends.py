"""The backends that misbehave on purpose: each does what it says, and nothing else."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from async_cache.errors import BackendError
from async_cache.l2.backend import Backend, LoadOutcome
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import (
    BitFlipBackend,
    FailingBackend,
    GatedBackend,
    ThrottledBackend,
    Verb,
    WrappedBackend,
)
from async_cache.testing.conformance import BackendSuite, content, find, get, key, put, views
from async_cache.testing.virtual import run_virtual

VERBS: list[Verb] = ["lookup", "load", "store", "delete"]


class TestConformance(BackendSuite):
    """Wrapped in all of them while they are idle, a backend is still one."""

    async def make(self, tmp_path: Path) -> Backend:
        return wrapped(MemoryBackend())

    async def capacity_backend(self, tmp_path: Path, capacity_bytes: int) -> Backend:
        return wrapped(MemoryBackend(capacity_bytes=capacity_bytes))


def wrapped(memory: MemoryBackend) -> Backend:
    idle = FailingBackend(BitFlipBackend(memory, nth=10**9), "load", 10**9)
    return GatedBackend(ThrottledBackend(idle), stubborn=True)


async def call(backend: Backend, verb: Verb, n: int = 1) -> object:
    """Call a verb about object number `n` of 100 bytes."""
    match verb:
        case "lookup":
            return await find(backend, [n])
        case "load":
            return await get(backend, [n], 100)
        case "store":
            return await put(backend, [n], 100)
        case "delete":
            return await backend.delete([key(n)])


async def test_a_wrapper_counts_calls_and_keys_and_has_the_name_of_the_inner_one() -> None:
    inner = MemoryBackend("near")
    backend = WrappedBackend(inner)
    assert backend.inner is inner
    assert backend.name == "near"
    await put(backend, [1, 2, 3], 100)
    await find(backend, [1, 2])
    await find(backend, [])
    assert backend.calls == {"store": 1, "lookup": 2}
    assert backend.keys_asked == {"store": 3, "lookup": 2}


# The gate.


@pytest.mark.parametrize("verb", VERBS)
async def test_a_held_call_waits_until_its_verb_is_released(verb: Verb) -> None:
    inner = WrappedBackend(MemoryBackend())
    backend = GatedBackend(inner, verb)
    task = asyncio.ensure_future(call(backend, verb))
    await backend.reached(verb)
    backend.release(*(other for other in VERBS if other != verb))
    for other in VERBS:
        if other != verb:
            await call(backend, other)
    assert not task.done()
    assert inner.calls[verb] == 0
    backend.release(verb)
    await task
    assert inner.calls[verb] == 1
    await call(backend, verb)  # and nothing is held any more


async def test_release_and_hold_are_about_all_verbs_if_none_is_named() -> None:
    inner = WrappedBackend(MemoryBackend())
    backend = GatedBackend(inner)
    backend.hold()
    tasks = [asyncio.ensure_future(call(backend, verb)) for verb in VERBS]
    for verb in VERBS:
        await backend.reached(verb)
    assert not inner.calls
    backend.release()
    await asyncio.gather(*tasks)
    assert inner.calls == dict.fromkeys(VERBS, 1)


async def test_what_waited_at_a_released_gate_is_not_held_again() -> None:
    backend = GatedBackend(MemoryBackend(), "lookup")
    first = asyncio.ensure_future(call(backend, "lookup"))
    await backend.reached("lookup")
    backend.release("lookup")
    backend.hold("lookup")
    second = asyncio.ensure_future(call(backend, "lookup"))
    assert await first == [False]
    assert not second.done()
    backend.release()
    await second


async def test_reached_counts_all_calls_of_the_verb_so_far() -> None:
    backend = GatedBackend(MemoryBackend(), "lookup")
    await call(backend, "load")
    second = asyncio.ensure_future(backend.reached("lookup", 2))
    tasks = [asyncio.ensure_future(call(backend, "lookup"))]
    await backend.reached("lookup")
    assert not second.done()
    tasks.append(asyncio.ensure_future(call(backend, "lookup")))
    await second
    await backend.reached("lookup", 2)
    backend.release()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("verb", VERBS)
async def test_a_call_cancelled_at_the_gate_ends_at_once_and_does_nothing(verb: Verb) -> None:
    inner = WrappedBackend(MemoryBackend())
    backend = GatedBackend(inner, verb)
    task = asyncio.ensure_future(call(backend, verb))
    await backend.reached(verb)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    backend.release()
    assert not inner.calls


@pytest.mark.parametrize("verb", ["load", "store"])
async def test_a_stubborn_call_ends_only_when_it_is_released(verb: Verb) -> None:
    inner = WrappedBackend(MemoryBackend())
    backend = GatedBackend(inner, verb, stubborn=True)
    task = asyncio.ensure_future(call(backend, verb))
    await backend.reached(verb)
    for _ in range(3):
        task.cancel()
        assert not (await asyncio.wait([task], timeout=0.001))[0]
    backend.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not inner.calls


async def test_a_stubborn_gate_is_not_stubborn_about_lookups() -> None:
    backend = GatedBackend(MemoryBackend(), "lookup", stubborn=True)
    task = asyncio.ensure_future(call(backend, "lookup"))
    await backend.reached("lookup")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_an_unknown_verb_is_refused() -> None:
    with pytest.raises(ValueError, match="'unpin' is not one of lookup, load, store, delete"):
        GatedBackend(MemoryBackend(), "unpin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'open'"):
        FailingBackend(MemoryBackend(), "open")  # type: ignore[arg-type]


# The throttle.


def test_every_lookup_load_and_store_takes_the_latency_and_latencies_overlap() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        backend = ThrottledBackend(MemoryBackend(), latency_seconds=2)
        await backend.open()
        expected: dict[Verb, int] = {"store": 2, "lookup": 2, "load": 2, "delete": 0}
        for verb, seconds in expected.items():
            begin = loop.time()
            await asyncio.gather(*(call(backend, verb, n) for n in range(3)))
            assert loop.time() - begin == seconds, verb

    run_virtual(main())


def test_lookups_may_have_a_latency_of_their_own() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        backend = ThrottledBackend(MemoryBackend(), latency_seconds=5, lookup_latency_seconds=0.5)
        await backend.open()
        expected: dict[Verb, float] = {"store": 5, "lookup": 0.5, "load": 5, "delete": 0}
        for verb, seconds in expected.items():
            begin = loop.time()
            await call(backend, verb)
            assert loop.time() - begin == seconds, verb

    run_virtual(main())


def test_loads_and_stores_share_the_bandwidth_first_come_first_served() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        backend = ThrottledBackend(MemoryBackend(), latency_seconds=1, bytes_per_second=100)
        await backend.open()
        ends: list[tuple[Verb, float]] = []

        async def timed(verb: Verb, n: int) -> None:
            await call(backend, verb, n)
            ends.append((verb, loop.time()))

        await asyncio.gather(timed("store", 1), timed("load", 1), timed("lookup", 1), timed("store", 2))
        assert ends == [("lookup", 1), ("store", 2), ("load", 3), ("store", 4)]

    run_virtual(main())


def test_a_cancelled_call_leaves_the_pipe_to_the_next() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        backend = ThrottledBackend(MemoryBackend(), bytes_per_second=1)
        await backend.open()
        first = asyncio.ensure_future(call(backend, "store", 1))
        second = asyncio.ensure_future(call(backend, "store", 2))
        await asyncio.sleep(30)
        first.cancel()
        assert await second == [True]
        assert loop.time() == 130
        assert await find(backend, [1, 2]) == [False, True]

    run_virtual(main())


# Faults.


@pytest.mark.parametrize("verb", VERBS)
async def test_the_nth_call_fails_and_only_that(verb: Verb) -> None:
    inner = WrappedBackend(MemoryBackend())
    backend = FailingBackend(inner, verb, 2)
    await call(backend, verb)
    with pytest.raises(BackendError, match="injected"):
        await call(backend, verb)
    await call(backend, verb)
    for other in VERBS:
        await call(backend, other)
    assert inner.calls[verb] == 3


async def test_so_many_calls_fail_with_the_error_given() -> None:
    backend = FailingBackend(MemoryBackend(), "lookup", 1, times=2, error=OSError("dead"))
    for _ in range(2):
        with pytest.raises(OSError, match="dead"):
            await call(backend, "lookup")
    await call(backend, "lookup")


async def test_without_a_number_of_times_it_fails_for_ever() -> None:
    backend = FailingBackend(MemoryBackend(), "lookup", 2, times=None)
    await call(backend, "lookup")
    for _ in range(10):
        with pytest.raises(BackendError):
            await call(backend, "lookup")


async def test_objects_may_fail_alone() -> None:
    backend = FailingBackend(MemoryBackend(), "load", times=None, keys=[key(1)])
    await put(backend, range(3), 100)
    assert await get(backend, range(3), 100) == [content(0, 100), LoadOutcome.FAILED, content(2, 100)]
    backend = FailingBackend(MemoryBackend(), "store", 2, keys=[key(1)])
    assert await put(backend, [0], 100) == [True]
    assert await put(backend, range(3), 100) == [True, False, True]
    assert await put(backend, range(3), 100) == [True, True, True]
    assert await get(backend, range(3), 100) == [content(n, 100) for n in range(3)]


async def test_a_flipped_bit_is_noticed_by_the_nth_load_and_by_no_other() -> None:
    backend = BitFlipBackend(MemoryBackend(), nth=2, bit=799)
    await put(backend, [1, 2], 100)
    assert await get(backend, [1, 2], 100) == [content(1, 100), content(2, 100)]
    assert await get(backend, [1, 3], 100) == [LoadOutcome.CORRUPT, LoadOutcome.GONE]
    assert await backend.store([key(1)], views([content(1, 100)])) == [True]
    assert await get(backend, [1, 2], 100) == [content(1, 100), content(2, 100)]


def test_the_backends_are_imported_without_pytest_and_without_virtual_time() -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(['pytest', 'pytest_asyncio', 'async_solipsism']);"
        "import async_cache.testing as t; assert all(hasattr(t, name) for name in t.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
