"""The proxy: it passes bytes, and does to them what it was told."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from typing import TypeVar

import pytest
import pytest_asyncio

from async_cache.testing import Proxy

T = TypeVar("T")
LONG = bytes(range(256)) * 8192  # 2 MiB


class Echo:
    """A server that sends back what it gets, and knows its connections."""

    def __init__(self) -> None:
        self.ends: list[str] = []

    async def open(self) -> int:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1")
        port: int = self.server.sockets[0].getsockname()[1]
        return port

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            self.ends.append("end")
        except OSError as error:
            self.ends.append(type(error).__name__)
        finally:
            writer.close()


@pytest_asyncio.fixture
async def echo() -> AsyncIterator[Echo]:
    echo = Echo()
    echo.port = await echo.open()  # type: ignore[attr-defined]
    yield echo
    echo.server.close()


@pytest_asyncio.fixture
async def proxy(echo: Echo) -> AsyncIterator[Proxy]:
    async with Proxy("127.0.0.1", echo.port) as proxy:  # type: ignore[attr-defined]
        yield proxy


async def soon(awaitable: Awaitable[T]) -> T:
    return await asyncio.wait_for(awaitable, 60)


async def dial(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", proxy.port)


async def exchange(proxy: Proxy, data: bytes) -> bytes:
    """What comes back of data, until the connection ends or all is there."""
    reader, writer = await dial(proxy)
    writer.write(data)
    came = b""
    try:
        while len(came) < len(data) and (more := await soon(reader.read(65536))):
            came += more
    finally:
        writer.close()
    return came


async def test_bytes_pass_both_ways_unchanged(proxy: Proxy) -> None:
    assert await asyncio.gather(*(exchange(proxy, LONG) for _ in range(3))) == [LONG] * 3
    assert proxy.connections == 3
    assert proxy.passed_bytes == 3 * len(LONG)


async def test_a_delay_is_that_of_each_direction_and_no_bandwidth(proxy: Proxy) -> None:
    proxy.delay_seconds = 0.05
    loop = asyncio.get_running_loop()
    begin = loop.time()
    assert await exchange(proxy, LONG) == LONG
    assert 0.1 <= loop.time() - begin < 0.1 * len(LONG) / 65536  # 32 pieces, which overlap


async def test_a_throttled_connection_has_its_bandwidth(proxy: Proxy) -> None:
    proxy.bytes_per_second = 20_000
    loop = asyncio.get_running_loop()
    begin = loop.time()
    assert await exchange(proxy, LONG[:4000]) == LONG[:4000]
    assert loop.time() - begin >= 0.2


async def test_while_it_stalls_nothing_passes_and_then_all(proxy: Proxy) -> None:
    reader, writer = await dial(proxy)
    writer.write(b"one")
    assert await soon(reader.readexactly(3)) == b"one"
    proxy.stall()
    writer.write(b"two")
    late, late_writer = await dial(proxy)  # it is accepted, and hears nothing
    late_writer.write(b"three")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readexactly(1), 0.1)
    proxy.resume()
    assert await soon(reader.readexactly(3)) == b"two"
    assert await soon(late.readexactly(5)) == b"three"
    writer.close()
    late_writer.close()


async def test_a_cut_is_an_end_and_a_reset_an_error(proxy: Proxy, echo: Echo) -> None:
    reader, writer = await dial(proxy)
    writer.write(b"x")
    await soon(reader.readexactly(1))
    proxy.cut()
    assert await soon(reader.read()) == b""
    writer.close()
    reader, writer = await dial(proxy)
    writer.write(b"x")
    await soon(reader.readexactly(1))
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        await soon(reader.read())
    writer.close()


async def test_it_cuts_after_a_number_of_bytes_once(proxy: Proxy) -> None:
    proxy.cut_after(1000)
    assert await exchange(proxy, LONG) == LONG[:1000]
    assert await exchange(proxy, LONG) == LONG


async def test_it_refuses_until_it_is_opened_again_at_the_same_port(proxy: Proxy) -> None:
    reader, writer = await dial(proxy)
    await proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await dial(proxy)
    writer.write(b"old")
    assert await soon(reader.readexactly(3)) == b"old"
    writer.close()
    await proxy.open()
    assert await exchange(proxy, b"new") == b"new"


async def test_a_server_that_is_not_there_ends_the_connection() -> None:
    listener = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1")
    port = listener.sockets[0].getsockname()[1]
    listener.close()
    async with Proxy("127.0.0.1", port) as proxy:
        assert await exchange(proxy, b"x") == b""


@pytest.mark.parametrize("state", ["idle", "stalled", "throttled"])
async def test_closing_ends_all_connections_and_tasks(proxy: Proxy, state: str) -> None:
    before = asyncio.all_tasks()
    reader, writer = await dial(proxy)
    if state == "stalled":
        proxy.stall()
    if state == "throttled":
        proxy.bytes_per_second = 1
    writer.write(b"some bytes that may not come")
    await asyncio.sleep(0)
    await soon(proxy.close())
    await soon(proxy.close())
    await soon(reader.read())
    writer.close()
    await writer.wait_closed()
    left = {task for task in asyncio.all_tasks() - before if "Echo" not in repr(task)}
    assert left == set()


async def test_closing_ends_a_connection_whose_task_was_cancelled_before_it_began(echo: Echo) -> None:
    class Struck(Proxy):
        def _accept(self, listener: socket.socket) -> None:
            super()._accept(listener)
            for task in self._tasks:
                task.cancel()
            struck.set()

    struck = asyncio.Event()
    async with Struck("127.0.0.1", echo.port) as proxy:  # type: ignore[attr-defined]
        reader, writer = await dial(proxy)
        await soon(struck.wait())
    assert await soon(reader.read()) == b""
    writer.close()


@pytest.mark.parametrize("turns", range(6))
async def test_what_connects_as_it_refuses_is_not_lost(echo: Echo, turns: int) -> None:
    """A server of asyncio leaves open what it was just accepting, and nobody knows of it."""
    async with Proxy("127.0.0.1", echo.port) as proxy:  # type: ignore[attr-defined]
        sock = socket.create_connection(("127.0.0.1", proxy.port))
        for _ in range(turns):
            await asyncio.sleep(0)
        await proxy.refuse()
    reader, writer = await asyncio.open_connection(sock=sock)
    with suppress(ConnectionResetError):  # it was not accepted
        assert await soon(reader.read()) == b""
    writer.close()
