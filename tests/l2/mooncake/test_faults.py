"""A master and a helper that die under load, seen through a whole cache: no wrong byte, no hit that was not there."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
from contract.support import (
    LAYOUT,
    assert_fails_alone,
    assert_nothing_held,
    fill,
    fill_l2,
    make_prompt,
    open_cache,
    read_back,
)
from soak import rounds

from async_cache import AsyncCache, ObjectGroup
from async_cache.errors import BackendError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.guard.breaker import BreakerState
from async_cache.l2.mooncake import backend as mooncake_backend
from async_cache.l2.mooncake.backend import MooncakeBackend
from async_cache.l2.mooncake.calls import Load
from async_cache.l2.mooncake.process import HelperProcess
from async_cache.l2.urls.registry import from_url
from async_cache.memory.arena import Arena
from async_cache.testing.conformance import MIB, content, find, get, key, put

from .support import Bare, Master

PROMPTS = [make_prompt(8, number) for number in range(4)]
RETURN_SECONDS = 50
PATIENCE_SECONDS = 100


def make(master: Master, **parameters: object) -> MooncakeBackend:
    backend = from_url(master.url("faults", **parameters))
    assert isinstance(backend, MooncakeBackend)
    return backend


@pytest.fixture(scope="module")
def pool() -> Iterator[Master]:
    """A master, with the memory of another process."""
    with Master() as master, Bare(master, 64 * MIB):
        yield master


async def until(holds: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> float:
    """Wait until something holds, and say how long it took."""
    begin = time.monotonic()
    while not holds():
        assert time.monotonic() - begin < seconds
        await asyncio.sleep(0.02)
    return time.monotonic() - begin


def helper_of(backend: MooncakeBackend) -> int:
    assert backend._helper is not None
    return backend._helper._process.pid


async def test_loads_and_stores_go_to_l1_itself_in_which_nobody_else_can_write(pool: Master) -> None:
    backend = make(pool)
    async with open_cache(backend) as cache:
        assert backend._mapped == [True, True]
        with pytest.raises(PermissionError):
            mmap(cache.core.arena.fd, cache.core.arena.size_bytes)
        await fill_l2(cache, *PROMPTS)
        staged = memoryview(backend._staging[1])[:64]  # type: ignore[index]
        for prompt in PROMPTS:
            assert await read_back(cache, prompt) == len(prompt)
        assert bytes(staged) == bytes(64)  # nothing went that way
        staged.release()
        await cache.clear("all")
        assert [item async for item in backend.keys()] == []
        await assert_nothing_held(cache)


@pytest.mark.timeout(rounds(300, 1800))
async def test_a_master_that_dies_and_returns_under_load(pool: Master) -> None:
    """After its return it knows nothing: a hit would be one that is not there."""
    for _ in range(rounds(1, 50)):
        with Master() as master, Bare(master, 64 * MIB):
            backend = make(master, breaker_reset=0.5, lookup_timeout=5)
            async with open_cache(backend, pages=128) as cache:
                await die_and_return(cache, master)


async def die_and_return(cache: AsyncCache, master: Master) -> None:
    (guard,) = cache.core.guards
    failures = 0
    failed = guard.failed

    def count(why: str) -> None:
        nonlocal failures
        failures += guard.breaker.state is BreakerState.CLOSED
        failed(why)

    guard.failed = count  # type: ignore[method-assign]
    await fill_l2(cache, *PROMPTS)
    assert [await read_back(cache, prompt) for prompt in PROMPTS] == [8] * 4
    ended = asyncio.Event()

    async def load() -> int:
        """Read from L2 all the time, and check all bytes; the number of chunks."""
        chunks = 0
        while not ended.is_set():
            await cache.clear("l1")
            for prompt in PROMPTS:
                chunks += await read_back(cache, prompt)
            await asyncio.sleep(0.01)
        return chunks

    loading = asyncio.create_task(load())
    await asyncio.sleep(0.05)
    master.kill()
    await until(lambda: guard.breaker.state is not BreakerState.CLOSED)
    assert failures <= 3
    master.start()
    assert await until(lambda: guard.breaker.state is BreakerState.CLOSED) < RETURN_SECONDS
    ended.set()
    assert await loading > 0
    await cache.clear("l1")
    assert [await read_back(cache, prompt) for prompt in PROMPTS] == [0] * 4
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (await cache.lookup(PROMPTS[0])).chunks < 8:  # once the memory is mounted again, it can be stored again
        assert time.monotonic() < deadline
        await fill(cache, PROMPTS[0])
        await cache.flush()
        await cache.clear("l1")
        await asyncio.sleep(0.1)
    assert await read_back(cache, PROMPTS[0]) == 8
    await assert_nothing_held(cache)


async def test_a_helper_that_crashes_is_replaced_and_no_byte_is_wrong(pool: Master) -> None:
    backend = make(pool)
    async with open_cache(backend) as cache:
        await fill_l2(cache, *PROMPTS)
        os.kill(helper_of(backend), signal.SIGSEGV)
        await until(lambda: backend._helper is None or backend._helper.has_ended)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while await read_back(cache, PROMPTS[0]) == 0:  # a new one takes its time, longer perhaps than a lookup may
            assert time.monotonic() < deadline
        for prompt in PROMPTS:
            assert await read_back(cache, prompt) == len(prompt)
        assert backend._mapped == [True, False]  # L1 is sealed: from now on, its bytes are copied
        await cache.clear("all")
        await assert_nothing_held(cache)


async def test_calls_that_are_out_end_with_the_helper(pool: Master) -> None:
    backend = make(pool)
    await backend.open()
    try:
        assert await put(backend, [1], MIB) == [True]
        os.kill(helper_of(backend), signal.SIGSTOP)
        asked = asyncio.create_task(get(backend, [1], MIB))
        await asyncio.sleep(0.05)
        asked.cancel()
        await asyncio.sleep(0.05)
        assert not asked.done()  # the buffer is not free yet
        os.kill(helper_of(backend), signal.SIGKILL)
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert await get(backend, [1], MIB) == [content(1, MIB)]
    finally:
        await backend.close()


async def test_what_had_come_before_the_helper_died_has_come(pool: Master, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_backend, "LOAD_BYTES", 2 * MIB)
    arena = Arena(8 * MIB)
    buffers = [arena.view[n * MIB : (n + 1) * MIB] for n in range(6)]
    backend = make(pool)
    backend.register(arena.fd, arena.view)
    await backend.open()
    try:
        assert await put(backend, range(6), MIB) == [True] * 6
        helper = backend._helper
        assert helper is not None
        real, asked = helper.ask, 0

        async def ask(call: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked == 2:
                os.kill(helper_of(backend), signal.SIGKILL)
            return await real(call)

        monkeypatch.setattr(helper, "ask", ask)
        outcomes = await backend.load([key(n) for n in range(6)], buffers)
        assert outcomes == [LoadOutcome.LOADED] * 2 + [LoadOutcome.FAILED] * 4
        assert buffers[:2] == [content(n, MIB) for n in range(2)]
    finally:
        await backend.close()
        for buffer in buffers:
            buffer.release()
        arena.close()


async def test_what_a_terminal_or_a_supervisor_signals_to_the_group_does_not_end_the_helper(pool: Master) -> None:
    backend = make(pool)
    await backend.open()
    try:
        pid = helper_of(backend)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
            assert await put(backend, [77], 5000) == [True]  # a cache that ends flushes now
        assert helper_of(backend) == pid and await get(backend, [77], 5000) == [content(77, 5000)]
    finally:
        await backend.close()


def helpers() -> set[int]:
    """The helpers that are children of this process and have not ended."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if (
                int(parent) == os.getpid()
                and state != "Z"
                and b"mooncake.helper" in (stat.parent / "cmdline").read_bytes()
            ):
                found.add(int(stat.parent.name))
    return found


async def test_a_close_while_another_helper_is_started_leaves_none(pool: Master) -> None:
    for turns in (0, 1, 2, 5, 20, 100):
        before = helpers()
        backend = make(pool)
        await backend.open()
        os.kill(helper_of(backend), signal.SIGKILL)
        await until(lambda its=backend: its._helper is None or its._helper.has_ended)  # type: ignore[misc]
        asked = asyncio.create_task(find(backend, [1]))
        for _ in range(turns):
            await asyncio.sleep(0.001)
        begin = time.monotonic()
        await backend.close()
        assert time.monotonic() - begin < 20
        await asyncio.wait([asked])
        assert helpers() <= before and backend._helper is None


async def test_a_start_or_a_close_that_is_given_up_leaves_no_helper_and_no_descriptor(pool: Master) -> None:
    before, descriptors = helpers(), len(os.listdir("/proc/self/fd"))
    for turns in (0, 1, 2, 3, 5, 8, 20, 100, 300):
        for verb in ("start", "close"):
            backend = make(pool, segment="16MiB")
            opening = asyncio.create_task(backend.open())
            if verb == "close":
                await opening
                opening = asyncio.create_task(backend.close())
            for _ in range(turns):
                await asyncio.sleep(0.001 if verb == "start" else 0)
            opening.cancel()
            await asyncio.wait([opening])
            await backend.close()
            await until(lambda: helpers() <= before)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 1)


async def test_a_master_that_is_not_there_yet_is_found_later() -> None:
    with Master() as master:
        master.kill()
        backend = make(master, segment="16MiB")
        await backend.open()
        try:
            with pytest.raises(BackendError, match=r"no master answers at .*: check that mooncake_master runs"):
                await find(backend, [1])
            master.start()
            assert await put(backend, [1], 5000) == [True]
        finally:
            await backend.close()


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_close_does_not_wait_for_a_dead_master(signal_number: int) -> None:
    with Master() as master:
        backend = make(master, segment="16MiB")
        await backend.open()
        assert await put(backend, [1], 5000) == [True]
        assert master.process is not None
        os.kill(master.process.pid, signal_number)
        asked = asyncio.create_task(find(backend, [1]))
        await asyncio.sleep(0.05)
        begin = time.monotonic()
        await backend.close()
        assert time.monotonic() - begin < 20  # 1.8 s, and then the helper is killed
        await asyncio.wait([asked])
        assert asked.exception() is None or isinstance(asked.exception(), BackendError)


async def test_the_loop_is_not_held_while_the_library_waits_for_a_master() -> None:
    """In this process, its `setup` would hold the interpreter's lock for seconds."""
    with Master() as master:
        assert master.process is not None
        os.kill(master.process.pid, signal.SIGSTOP)
        backend = make(master)
        opening = asyncio.create_task(backend.open())
        longest = 0.0
        while not opening.done():
            begin, worked = time.monotonic(), time.thread_time()
            await asyncio.sleep(0.005)
            longest = max(longest, min(time.monotonic() - begin, 10 * (time.thread_time() - worked) + 0.3))
        await opening
        await backend.close()
        assert longest < 0.5


async def test_objects_of_megabytes_land_in_l1_whole(pool: Master) -> None:
    layout = type(LAYOUT)("big", (ObjectGroup((MIB,), "uint8"), ObjectGroup((12_345,), "uint8")), chunk_tokens=4)
    prompt = make_prompt(6, 1, layout)
    async with open_cache(make(pool), pages=4096) as cache:
        await fill_l2(cache, prompt)
        assert await read_back(cache, prompt) == 6
        await cache.clear("all")


@pytest.mark.parametrize("chunks", [1, 3])
async def test_what_cannot_be_read_of_one_prompt_leaves_the_pool_in_use(
    monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    bad, sound = make_prompt(chunks, 11), make_prompt(3, 12)
    asked = HelperProcess.ask

    async def ask(helper: HelperProcess, call: Any) -> Any:
        answer = await asked(helper, call)
        spoilt = isinstance(call, Load) and any(k.chunk_hash in bad.chunk_hashes for k in call.keys)
        return [LoadOutcome.FAILED.value] * len(answer) if spoilt else answer  # as after a transfer that failed

    with Master() as master, Bare(master, 64 * MIB):
        async with open_cache(make(master)) as cache:
            await fill_l2(cache, bad, sound)
            monkeypatch.setattr(HelperProcess, "ask", ask)
            await assert_fails_alone(cache, bad, sound)
