"""The network between a backend and its server stalls, trickles, cuts, resets and refuses."""

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from async_cache.errors import BackendError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.valkey import backend as valkey_backend
from async_cache.l2.valkey.backend import ValkeyBackend
from async_cache.l2.valkey.names import Names
from async_cache.l2.valkey.node import COMMAND_CONNECTIONS, Node
from async_cache.testing import Proxy
from async_cache.testing.conformance import CANARY, MIB, content, find, get, key, put, views

from .servers import Server
from .support import eventually, opened, until_it_answers

LOADED, GONE, CORRUPT, FAILED = LoadOutcome


@pytest_asyncio.fixture
async def proxy(tcp: Server) -> AsyncIterator[Proxy]:
    await tcp.say("FLUSHALL")
    async with Proxy("127.0.0.1", tcp.port) as proxy:
        yield proxy


@pytest_asyncio.fixture
async def backend(proxy: Proxy) -> AsyncIterator[ValkeyBackend]:
    async with opened(f"valkey://127.0.0.1:{proxy.port}?connections=2") as backend:
        yield backend


@pytest.mark.parametrize("after", [0, 1, 9, 10, 11, 500, 20_000, MIB, MIB + 30, MIB + 80, MIB + 90, 3 * MIB])
async def test_a_value_that_is_cut_is_no_hit_and_what_came_before_is(
    backend: ValkeyBackend, proxy: Proxy, after: int
) -> None:
    assert await put(backend, range(4), MIB) == [True] * 4
    proxy.cut_after(after)
    (got,) = await asyncio.gather(get(backend, range(4), MIB), return_exceptions=True)
    if isinstance(got, BaseException):
        assert isinstance(got, BackendError) and backend.name in str(got)
    else:
        assert FAILED in got
        assert all(one in (content(n, MIB), FAILED) for n, one in enumerate(got))
    await until_it_answers(backend)
    assert await put(backend, range(4), MIB) == [True] * 4  # anew, where it failed
    assert await get(backend, range(4), MIB) == [content(n, MIB) for n in range(4)]
    assert backend.usage().objects == 4


async def test_what_could_not_be_read_and_cannot_be_removed_is_not_said_to_be_stored(
    backend: ValkeyBackend, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await put(backend, range(4), MIB) == [True] * 4
    proxy.cut_after(MIB + 500)
    got = await get(backend, range(4), MIB)
    assert FAILED in got and got[0] == content(0, MIB)
    await until_it_answers(backend)
    asked = Node.ask

    async def ask(*_: object) -> list[bytes]:
        raise BackendError("the connection was idle for too long")

    monkeypatch.setattr(Node, "ask", ask)  # while those for values are well
    assert await put(backend, range(4), MIB) == [one is not FAILED for one in got]
    monkeypatch.setattr(Node, "ask", asked)
    assert await put(backend, range(4), MIB) == [True] * 4  # and it is still known what is to be replaced
    assert not backend._faults
    assert await get(backend, range(4), MIB) == [content(n, MIB) for n in range(4)]


class Memory(bytearray):
    """What can be seen to be let go."""


async def test_calls_that_fail_leave_nothing_behind(backend: ValkeyBackend, proxy: Proxy) -> None:
    assert await put(backend, range(2), 5000) == [True] * 2
    proxy.stall()
    kept = []
    for verb in (backend.load, backend.store, backend.load, backend.store):
        buffers = [Memory(5000) for _ in range(2)]
        kept += map(weakref.ref, buffers)
        call = asyncio.ensure_future(verb([key(7), key(8)], views(buffers)))  # type: ignore[operator]
        await asyncio.sleep(0.01)
        proxy.reset()
        with pytest.raises(BackendError):
            await call
        del call, buffers
    proxy.resume()
    gc.collect()
    assert [memory() for memory in kept if memory() is not None] == []


async def test_after_a_reset_it_is_connected_anew(backend: ValkeyBackend, proxy: Proxy) -> None:
    for _ in range(20):
        assert await put(backend, range(2), 5000) == [True] * 2
        proxy.reset()
        await until_it_answers(backend)
        assert await get(backend, range(2), 5000) == [content(n, 5000) for n in range(2)]


async def test_a_load_that_is_given_up_in_a_stall_lets_go_of_its_buffers_at_once(
    backend: ValkeyBackend, proxy: Proxy
) -> None:
    assert await put(backend, range(2), 4 * MIB) == [True] * 2
    buffers = [bytearray(4 * MIB) for _ in range(2)]
    proxy.bytes_per_second = 8 * MIB
    load = asyncio.ensure_future(backend.load([key(0), key(1)], views(buffers)))
    passed = proxy.passed_bytes
    while proxy.passed_bytes < passed + MIB:  # noqa: ASYNC110 (in the middle of a value)
        await asyncio.sleep(0.001)
    proxy.stall()
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(load, 60)
    for buffer in buffers:
        buffer[:] = bytes([CANARY]) * len(buffer)
    proxy.bytes_per_second = None
    proxy.resume()
    await until_it_answers(backend)
    assert await get(backend, range(2), 4 * MIB) == [content(n, 4 * MIB) for n in range(2)]
    assert all(buffer.count(CANARY) == len(buffer) for buffer in buffers)


async def test_a_store_that_is_given_up_in_a_stall_sends_nothing_of_what_its_buffers_hold_later(
    backend: ValkeyBackend, proxy: Proxy, tcp: Server
) -> None:
    blob = bytearray(content(1, 16 * MIB))
    proxy.stall()
    store = asyncio.ensure_future(backend.store([key(1)], views([blob])))
    await asyncio.sleep(0.3)
    store.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(store, 60)
    blob[:] = bytes([CANARY]) * len(blob)
    proxy.resume()
    await until_it_answers(backend)
    assert await get(backend, [1], 16 * MIB) == [GONE]
    assert await put(backend, [1], 16 * MIB) == [True]
    assert await get(backend, [1], 16 * MIB) == [content(1, 16 * MIB)]


@pytest.mark.parametrize("verb", ["lookup", "load", "store", "delete", "keys"])
async def test_a_call_that_is_given_up_in_a_stall_ends_at_once_and_the_next_one_finds_the_server(
    backend: ValkeyBackend, proxy: Proxy, verb: str
) -> None:
    assert await put(backend, range(3), 70_000) == [True] * 3
    keys, buffers = [key(n) for n in range(3)], [bytearray(70_000) for _ in range(3)]
    proxy.stall()

    async def listing() -> None:
        assert [entry async for entry in backend.keys()]

    call = {
        "lookup": lambda: backend.lookup(keys),
        "load": lambda: backend.load(keys, views(buffers)),
        "store": lambda: backend.store([key(n) for n in range(10, 13)], views(buffers)),
        "delete": lambda: backend.delete(keys),
        "keys": listing,
    }[verb]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call(), 0.1)
    proxy.resume()
    await until_it_answers(backend)
    there = verb != "delete"  # what was sent may be carried out
    got = await get(backend, range(3), 70_000)
    assert all(one == content(n, 70_000) or (one is GONE and not there) for n, one in enumerate(got))


async def test_a_trickle_brings_the_right_bytes_or_ends_when_it_is_given_up(
    backend: ValkeyBackend, proxy: Proxy
) -> None:
    assert await put(backend, range(2), 3000) == [True] * 2
    proxy.bytes_per_second = 20_000
    assert await get(backend, range(2), 3000) == [content(n, 3000) for n in range(2)]
    proxy.bytes_per_second = 100
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(get(backend, range(2), 3000), 0.2)
    proxy.bytes_per_second = None
    assert await get(backend, range(2), 3000) == [content(n, 3000) for n in range(2)]


async def test_a_distant_server_costs_a_lookup_one_round_trip(backend: ValkeyBackend, proxy: Proxy) -> None:
    assert await put(backend, range(256), 100) == [True] * 256
    await find(backend, range(256))
    proxy.delay_seconds = 1
    loop = asyncio.get_running_loop()
    for _ in range(5):  # a busy machine spoils one, a second round trip all
        begin = loop.time()
        assert await find(backend, range(300)) == [True] * 256 + [False] * 44
        took = loop.time() - begin
        assert took >= 2
        if took < 4:
            return
    pytest.fail("it took two round trips")


async def test_a_server_that_refuses_is_answered_for_at_once_and_found_soon(
    backend: ValkeyBackend, proxy: Proxy
) -> None:
    assert await put(backend, [1], 5000) == [True]
    await proxy.refuse()
    proxy.reset()
    loop = asyncio.get_running_loop()
    begin = loop.time()
    for _ in range(50):
        with pytest.raises(BackendError, match=r"valkey://127\.0\.0\.1"):
            await find(backend, [1])
    assert loop.time() - begin < 25, "each waited"
    await proxy.open()
    begin = loop.time()
    await until_it_answers(backend)
    assert loop.time() - begin < 10
    assert await get(backend, [1], 5000) == [content(1, 5000)]


async def test_only_one_call_at_a_time_waits_for_a_silent_server(proxy: Proxy) -> None:
    async with opened(f"valkey://127.0.0.1:{proxy.port}?connect_timeout=0.3") as backend:
        proxy.stall()
        proxy.reset()
        with pytest.raises(BackendError):
            await find(backend, [1])  # the first one waits in vain
        loop = asyncio.get_running_loop()
        before = proxy.connections
        begin, quick = loop.time(), 0
        while loop.time() - begin < 1 or quick <= 10:  # on a busy machine, later
            asked = loop.time()
            results = await asyncio.gather(*(find(backend, [n]) for n in range(10)), return_exceptions=True)
            assert all(isinstance(result, BackendError) for result in results)
            quick += loop.time() - asked < 0.3  # in less than an attempt takes
            await asyncio.sleep(0.01)
        attempts = proxy.connections - before  # as many as there are connections at first, then one after the other
        assert attempts <= 5 + (loop.time() - begin) / 0.3
        proxy.resume()
        await until_it_answers(backend)


async def test_a_backend_opens_without_its_server_and_finds_it_later(
    proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    await proxy.refuse()
    with caplog.at_level(logging.WARNING, "async_cache"):
        async with opened(f"valkey://127.0.0.1:{proxy.port}") as backend:
            assert "tried again" in caplog.text
            with pytest.raises(BackendError):
                await find(backend, [1])
            await proxy.open()
            await until_it_answers(backend)
            assert await put(backend, [1], 5000) == [True]
            await proxy.refuse()  # its listener is not what is counted


async def test_closing_ends_calls_that_wait_for_a_dead_server(proxy: Proxy) -> None:
    async with opened(f"valkey://127.0.0.1:{proxy.port}?connect_timeout=8") as backend:
        assert await put(backend, [1], 5000) == [True]
        proxy.stall()
        waiting = [asyncio.ensure_future(find(backend, [n])) for n in range(20)]
        waiting.append(asyncio.ensure_future(get(backend, [1], 5000)))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        async with asyncio.timeout(6):  # it waits for nobody, and not as long as those who connect
            await backend.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, BackendError) for result in results)
        with pytest.raises(BackendError, match="not open"):
            await find(backend, [1])
        proxy.resume()


async def test_a_count_that_meets_a_silent_server_ends_and_is_made_anew(
    tcp: Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(valkey_backend, "PAGE_SECONDS", 0.2)
    async with opened(f"valkey://127.0.0.1:{proxy.port}") as backend:
        assert backend.usage().objects == 0
        proxy.stall()
        for number in range(5):
            await tcp.say("SET", Names("akv").of(key(number)), b"x" * 1000)  # of another host
        assert backend._router is not None and backend._router.only is not None
        commands = backend._router.only.commands
        backend._recount.set()
        await eventually(lambda: commands.free < COMMAND_CONNECTIONS)
        await eventually(lambda: commands.free == COMMAND_CONNECTIONS)
        proxy.resume()
        await until_it_answers(backend)
        await eventually(lambda: backend.usage().objects == 5)
