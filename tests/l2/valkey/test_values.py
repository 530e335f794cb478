"""What lies under the name of an object is not it: truncated, another's, too long, of another type, or foreign."""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from typing import cast

import pytest
import pytest_asyncio

from async_cache.errors import BackendError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.valkey import backend as module
from async_cache.l2.valkey.backend import SLICE_KEYS, ValkeyBackend
from async_cache.l2.valkey.items import Item
from async_cache.l2.valkey.names import Names
from async_cache.l2.valkey.values import WINDOW_BYTES
from async_cache.l2.valkey.wire import Wire
from async_cache.testing.conformance import MIB, content, find, get, key, put

from .servers import Server, running
from .support import eventually, opened

LOADED, GONE, CORRUPT, FAILED = LoadOutcome
SIZE = 100_000
RECORD = SIZE + 64
NAME = Names("akv").of(key(1))


@pytest_asyncio.fixture
async def backend(tcp: Server) -> AsyncIterator[ValkeyBackend]:
    await tcp.say("FLUSHALL")
    async with opened(f"valkey://127.0.0.1:{tcp.port}?connections=1") as backend:
        assert await put(backend, range(4), SIZE) == [True] * 4
        yield backend


async def is_mended(backend: ValkeyBackend) -> bool:
    """A load says CORRUPT for it alone; then it is not found, and can be stored."""
    assert await get(backend, range(4), SIZE) == [content(0, SIZE), CORRUPT, *(content(n, SIZE) for n in (2, 3))]
    assert await find(backend, range(4)) == [True, False, True, True]
    assert await put(backend, [1], SIZE) == [True]
    return await get(backend, range(4), SIZE) == [content(n, SIZE) for n in range(4)]


@pytest.mark.parametrize("left", [0, 1, 63, 64, 65, SIZE - 1, SIZE, SIZE + 63])
async def test_a_truncated_value(backend: ValkeyBackend, tcp: Server, left: int) -> None:
    whole = cast(bytes, await tcp.say("GET", NAME))
    await tcp.say("SET", NAME, whole[:left])
    assert await is_mended(backend)


@pytest.mark.parametrize("more", [1, 2, 64, RECORD, 20 * MIB])
async def test_an_oversized_value(backend: ValkeyBackend, tcp: Server, more: int) -> None:
    await tcp.say("APPEND", NAME, b"x" * more)
    assert await is_mended(backend)


async def test_the_value_of_another_object(backend: ValkeyBackend, tcp: Server) -> None:
    await tcp.say("COPY", Names("akv").of(key(2)), NAME, "REPLACE")
    assert await is_mended(backend)


@pytest.mark.parametrize("bit", [0, 8 * SIZE - 1, 8 * SIZE, 8 * (SIZE + 30), 8 * RECORD - 1])
async def test_a_flipped_bit(backend: ValkeyBackend, tcp: Server, bit: int) -> None:
    await tcp.flip_bit(NAME, bit)
    assert await is_mended(backend)


@pytest.mark.parametrize("text", [b"", b"\r\n", b"$-1\r\n", b"-MOVED 1 127.0.0.1:1\r\n" * 4000])
async def test_text_that_looks_like_the_protocol(backend: ValkeyBackend, tcp: Server, text: bytes) -> None:
    await tcp.say("SET", NAME, text)
    assert await is_mended(backend)


@pytest.mark.parametrize("add", [("RPUSH",), ("SADD",), ("HSET", "field"), ("PFADD",), ("ZADD", 1)])
async def test_a_key_of_another_type(backend: ValkeyBackend, tcp: Server, add: tuple[str | int, ...]) -> None:
    await tcp.say("DEL", NAME)
    await tcp.say(add[0], NAME, *add[1:], "x" * 100)
    if add != ("PFADD",):  # which is a string
        assert await find(backend, [1]) == [False]
    assert await is_mended(backend)


async def test_keys_of_others_are_neither_listed_nor_counted(
    backend: ValkeyBackend, tcp: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("async_cache.l2.valkey.backend.FIRST_COUNT_SECONDS", 20.0)  # opening waits for the count
    others = [b"akv", b"akv:", b"akv:{", b"akv:{x}.0.0", b"akv2:" + NAME[4:], b"x" + NAME, NAME + b"x", NAME + b".0"]
    others += [NAME.replace(b".0.0", b".00.0"), NAME.replace(b".0.0", b".0.-1"), NAME.upper(), b"\xff\x00", b"foo"]
    for other in others:
        await tcp.say("SET", other, "x" * 1000)
    await tcp.say("RPUSH", Names("akv").of(key(9)), "x")
    listed = [entry async for entry in backend.keys()]
    assert sorted(listed) == sorted((key(n), SIZE) for n in range(4))
    async with opened(f"valkey://127.0.0.1:{tcp.port}") as another:
        assert another.usage().objects == 4
        assert another.usage().used_bytes == 4 * RECORD
    assert await backend.delete([key for key, _ in listed]) == 4
    assert await tcp.say("DBSIZE") == len(others) + 1


async def test_namespaces_and_databases_do_not_meet(tcp: Server) -> None:
    await tcp.say("FLUSHALL")
    urls = [
        f"valkey://127.0.0.1:{tcp.port}{more}" for more in ("", "/1", "?namespace=other", "/1?namespace=a-long.one:2")
    ]
    for url in urls:
        async with opened(url) as backend:
            assert await find(backend, [1]) == [False]
            assert await put(backend, [1], SIZE) == [True]
            assert backend.usage().objects == 1


async def test_what_expires_is_gone(tcp: Server) -> None:
    await tcp.say("FLUSHALL")
    async with opened(f"valkey://127.0.0.1:{tcp.port}?ttl=1000") as backend:
        assert await put(backend, [1], SIZE) == [True]
        assert 990 <= cast(int, await tcp.say("TTL", NAME)) <= 1000
        await tcp.say("PEXPIRE", NAME, 1)
        while await find(backend, [1]) != [False]:
            pass
        assert await get(backend, [1], SIZE) == [GONE]


async def test_objects_without_a_time_to_live_have_none(backend: ValkeyBackend, tcp: Server) -> None:
    assert await tcp.say("TTL", NAME) == -1


async def test_a_full_server_stores_no_more_and_serves_what_it_has(tcp: Server, tmp_path: object) -> None:
    await tcp.say("FLUSHALL")
    await tcp.say("CONFIG", "SET", "maxmemory", "30mb", "maxmemory-policy", "noeviction")
    try:
        async with opened(f"valkey://127.0.0.1:{tcp.port}") as backend:
            stored = [(await put(backend, [n], MIB))[0] for n in range(40)]
            assert stored[0] and not stored[-1]
            assert await put(backend, range(100, 104), MIB) == [False] * 4  # and raises nothing
            held = [n for n in range(40) if stored[n]]
            assert await get(backend, held, MIB) == [content(n, MIB) for n in held]
            assert backend.usage().objects == len(held)
            assert await backend.delete([key(n) for n in held]) == len(held)
            assert await put(backend, range(100, 104), MIB) == [True] * 4
    finally:
        await tcp.say("CONFIG", "SET", "maxmemory", "0")


async def test_what_a_server_evicts_is_gone_and_never_wrong(tcp: Server) -> None:
    await tcp.say("FLUSHALL")
    await tcp.say("CONFIG", "SET", "maxmemory", "40mb", "maxmemory-policy", "allkeys-lru")
    try:
        async with opened(f"valkey://127.0.0.1:{tcp.port}") as backend:
            for n in range(0, 80, 4):
                assert await put(backend, range(n, n + 4), MIB) == [True] * 4
            found, got = await find(backend, range(80)), await get(backend, range(80), MIB)
            assert all(one in (content(n, MIB), GONE) for n, one in enumerate(got))
            assert 5 < sum(one is not GONE for one in got) < 40
            assert sum(found) >= sum(one is not GONE for one in got)
    finally:
        await tcp.say("CONFIG", "SET", "maxmemory", "0", "maxmemory-policy", "noeviction")


async def test_usage_is_counted_anew_after_a_server_was_away(tmp_path_factory: pytest.TempPathFactory) -> None:
    with running(tmp_path_factory.mktemp("valkey")) as server:
        async with opened(f"valkey://127.0.0.1:{server.port}") as backend:
            assert await put(backend, range(4), SIZE) == [True] * 4
            assert backend.usage().objects == 4
            server.kill()
            with pytest.raises(Exception, match="valkey"):
                await find(backend, [1])
            server.start()

            async def is_found() -> bool:
                try:
                    return await find(backend, [1]) == [False]
                except Exception:
                    return False

            while not await is_found():
                pass
            await eventually(lambda: backend.usage().objects == 0)


async def test_thousands_of_small_objects_are_found_loaded_and_deleted(tcp: Server) -> None:
    await tcp.say("FLUSHALL")
    async with opened(f"valkey://127.0.0.1:{tcp.port}") as backend:
        numbers = range(3000)
        assert await put(backend, numbers, 16) == [True] * 3000
        assert await find(backend, range(10**6, 10**6 + 1000)) == [False] * 1000
        assert await find(backend, range(3500)) == [True] * 3000 + [False] * 500
        assert await get(backend, numbers, 16) == [content(n, 16) for n in numbers]
        assert len({entry async for entry in backend.keys()}) == 3000
        assert await backend.delete([key(n) for n in range(3500)]) == 3000
        assert backend.usage().objects == 0


async def test_a_server_is_told_each_time_how_much_is_asked_for(
    backend: ValkeyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel widens its window to many times as much again, and acknowledges late then."""
    windows = []

    def expect(wire: Wire, size_bytes: int) -> None:
        honest(wire, size_bytes)
        assert wire._transport is not None
        sock = wire._transport.get_extra_info("socket")
        windows.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP))

    honest = Wire.expect
    monkeypatch.setattr(Wire, "expect", expect)
    assert await put(backend, range(10, 14), 4 * MIB) == [True] * 4
    assert await get(backend, range(10, 14), 4 * MIB) == [content(n, 4 * MIB) for n in range(10, 14)]
    assert windows == [WINDOW_BYTES] * 3  # two objects at first, and one more as each of these has come


async def test_very_many_objects_are_worked_on_in_slices(
    backend: ValkeyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 5 * SLICE_KEYS + 1
    made: list[int] = []  # items, by turn of the loop

    class Counted(Item):  # type: ignore[misc]
        def __post_init__(self) -> None:
            made[-1] += 1

    def turn() -> None:
        made.append(0)
        asyncio.get_running_loop().call_soon(turn)

    monkeypatch.setattr(module, "Item", Counted)
    turn()
    keys = [key(number) for number in range(100, 100 + count)]
    bodies = [bytearray(content(number, 8)) for number in range(100, 100 + count)]
    assert await backend.store(keys, [memoryview(body) for body in bodies]) == [True] * count
    into = [bytearray(16) for _ in keys]
    assert await backend.load(keys, [memoryview(buffer)[:8] for buffer in into]) == [LOADED] * count
    assert [bytes(buffer[:8]) for buffer in into] == bodies
    assert await backend.load_sized(keys, [memoryview(buffer) for buffer in into]) == [8] * count
    assert await backend.delete(keys) == count
    assert sum(made) == 4 * count and max(made) <= SLICE_KEYS


@pytest.mark.parametrize("verb", ["load", "store"])
async def test_of_very_many_objects_those_count_that_were_done_before_the_server_was_gone(
    backend: ValkeyBackend, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(module, "SLICE_KEYS", 2)
    work, slices = getattr(backend, f"_{verb}_some"), 0

    async def fails(items: Sequence[Item]) -> list[object]:
        nonlocal slices
        slices += 1
        if slices == fails_in:
            raise BackendError("gone")
        return cast(list[object], await work(items))

    monkeypatch.setattr(backend, f"_{verb}_some", fails)
    call = {"load": lambda: get(backend, range(4), SIZE), "store": lambda: put(backend, range(4), SIZE)}[verb]
    done, failed = {"load": ([content(0, SIZE), content(1, SIZE)], FAILED), "store": ([True, True], False)}[verb]
    fails_in = 2
    assert await call() == [*cast(list[object], done), failed, failed]
    fails_in = slices + 1
    with pytest.raises(BackendError, match="gone"):
        await call()
