"""Dialling: one owner for each descriptor, a server that is busy or of another user, and streams that are closed."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop
from contract.support import fill, make_prompt, read_back

from async_cache import AccessDeniedError, ConfigError, ConnectionLostError, connect
from async_cache.client import dial as dialling
from async_cache.client import memory as client_memory
from async_cache.protocol import greeting
from async_cache.protocol.address import Address
from async_cache.protocol.greeting import peer_process
from async_cache.protocol.messages import VERSION, Hello

from .servers import SECONDS, serve, serve_in_process, short_directory, until

PROMPT = make_prompt(3)
FILES = 8
IN_ANOTHER_LOOP = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
def url() -> Iterator[str]:
    """Where nothing listens yet."""
    with short_directory() as directory:
        yield f"unix://{directory}/s"


def ignore(*_: Any) -> None:
    return


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of what a loop accepts as its accepting is cancelled
@pytest.mark.parametrize("make_loop", IN_ANOTHER_LOOP.values(), ids=IN_ANOTHER_LOOP)
@pytest.mark.parametrize("where", ["client", "server"])
def test_whoever_is_given_up_at_any_step_closes_no_descriptor_of_others(
    make_loop: Callable[[], asyncio.AbstractEventLoop], where: str, url: str
) -> None:
    """Files that are opened as soon as it is given up get its numbers, and stay open."""
    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(_give_up(url, where))


async def _give_up(url: str, where: str) -> None:
    faults: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    address, done, steps = Address.parse(url), False, 0
    while not done:
        async with serve(url) as (_, server):
            dial = asyncio.create_task(dialling.dial(address, Hello(VERSION), ignore, SECONDS))
            for _ in range(steps):
                await asyncio.sleep(0)
            done = dial.done()
            steps += 1
            if where == "client":
                dial.cancel()
                await asyncio.wait([dial])
            else:
                greeting_tasks = [task for task in server._tasks if "_welcome" in repr(task.get_coro())]
                await asyncio.sleep(0)  # by now they have begun
                for task in greeting_tasks:
                    task.cancel()
                await asyncio.sleep(0)
            opened = {os.open(f"/proc/self/task/{os.getpid()}/comm", os.O_RDONLY) for _ in range(FILES)}
            inodes = {descriptor: os.fstat(descriptor).st_ino for descriptor in opened}
            if where == "server":
                await server.close()
                with suppress(ConnectionLostError):
                    (await dial).abort("this test has it no more")
            for _ in range(10):
                await asyncio.sleep(0)
            assert {descriptor: os.fstat(descriptor).st_ino for descriptor in opened} == inodes, f"{steps} steps"
            for descriptor in opened:
                os.close(descriptor)
            if where == "client" and not dial.cancelled():
                dial.result().abort("this test has it no more")
    assert not faults and steps > 3


async def test_a_server_whose_backlog_is_full_is_busy_and_is_asked_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = Address.parse(url)
    full = socket.socket(socket.AF_UNIX)
    full.bind(address.path)
    full.listen(0)
    waiting = []
    with suppress(ConnectionLostError):
        while True:
            waiting.append(dialling._connect_unix(address))
    with pytest.raises(ConnectionLostError, match=f"^the server at {url} is busy"):
        await connect(url, connect_timeout_seconds=0.05).open()
    attempts: list[Address] = []
    connect_unix = dialling._connect_unix
    monkeypatch.setattr(dialling, "_connect_unix", lambda place: attempts.append(place) or connect_unix(place))
    client = connect(url, connect_timeout_seconds=SECONDS)
    opening = asyncio.create_task(client.open())
    await until(lambda: len(attempts) > 1)
    for sock in (full, *waiting):
        sock.close()
    async with serve(url):
        await opening
        await client.close()


LISTEN = (
    "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(); sys.stdin.read()"
)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_root_is_let_in_by_the_server_of_a_user_but_for_its_own_default(monkeypatch: pytest.MonkeyPatch) -> None:
    with short_directory() as directory:
        directory.chmod(0o777)
        path = f"{directory}/async_cache.sock"
        command = ["/usr/bin/env", "python3", "-c", LISTEN, path]
        with subprocess.Popen(command, user=65534, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdin is not None
            assert child.stdout.readline() == b"\n"
            address = Address(path=path)
            with dialling._connect_unix(address) as sock:
                assert peer_process(sock) == (child.pid, 65534)
                dialling._check_owner(sock, address)
                monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
                with pytest.raises(AccessDeniedError, match="another user, number 65534"):
                    dialling._check_owner(sock, address)
                monkeypatch.delenv("XDG_RUNTIME_DIR")
                monkeypatch.setattr(os, "geteuid", lambda: 1000)
                with pytest.raises(AccessDeniedError, match="another user, number 65534"):
                    dialling._check_owner(sock, address)
            child.stdin.close()


@pytest.mark.parametrize("make_loop", IN_ANOTHER_LOOP.values(), ids=IN_ANOTHER_LOOP)
def test_no_message_over_tcp_waits_for_the_one_before_it_to_be_acknowledged(
    make_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def nodelay() -> list[int]:
        async with serve("tcp://127.0.0.1:0") as (_, server):
            link = await dialling.dial(server.addresses[0], Hello(VERSION), ignore, SECONDS)
            await until(lambda: bool(server._sessions and link.connection.is_open))
            ends = [link.connection, *(session.connection for session in server._sessions)]
            socks = [end._transport.get_extra_info("socket") for end in ends if end._transport is not None]
            link.abort("this test has it no more")
            return [sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for sock in socks]

    with asyncio.Runner(loop_factory=make_loop) as runner:
        assert runner.run(nodelay()) == [1, 1]


PROGRAM = """
import os, sys
for number in sys.argv[2]:
    os.close(int(number))
from async_cache import BlockingClient, ModelLayout, ObjectGroup
with BlockingClient(sys.argv[1]) as cache:
    cache.ping()
import asyncio, uvloop
from async_cache import connect
async def ask():
    async with connect(sys.argv[1]) as cache:
        await cache.ping()
taken = [os.open(os.devnull, os.O_RDWR) for _ in sys.argv[2]]  # a loop of its own making has other numbers
loop = uvloop.new_event_loop()
for number in taken:
    os.close(number)
loop.run_until_complete(ask())
os._exit(7)
"""
STREAMS = ["0", "1", "2", "01", "012"]


@pytest.mark.parametrize("closed", STREAMS)
def test_a_program_whose_standard_streams_are_closed_may_have_clients(closed: str, url: str) -> None:
    with serve_in_process(url):
        done = subprocess.run([sys.executable, "-c", PROGRAM, url, closed], timeout=3 * SECONDS, check=False)
    assert done.returncode == 7


def closing(streams: str, *arguments: str) -> list[str]:
    """A command that begins with these streams closed."""
    closed = " ".join({"0": "<&-", "1": ">&-", "2": "2>&-"}[stream] for stream in streams)
    return ["bash", "-c", f'exec "$@" {closed}', "-", sys.executable, "-m", "async_cache", *arguments]


@pytest.mark.parametrize("closed", STREAMS)
def test_the_command_line_works_where_standard_streams_are_closed(closed: str, url: str) -> None:
    serving = subprocess.Popen(closing(closed, "serve", "--listen", url, "--l1-bytes", "1MiB", "--l2", "memory://"))
    try:
        for command in ("ping", "status"):
            while not Path(Address.parse(url).path).exists():
                assert serving.poll() is None
            done = subprocess.run(closing(closed, command, "--url", url), timeout=3 * SECONDS, check=False)
            assert done.returncode == 0
        serving.terminate()
        assert serving.wait(SECONDS) == 0
    finally:
        serving.kill()
        serving.wait()


async def test_a_segment_that_the_system_refuses_is_done_without(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise PermissionError(1, "not allowed")

    async with serve(url):
        monkeypatch.setattr(client_memory, "seal_size", refuse)
        async with connect(url) as cache:
            await fill(cache, PROMPT)
            assert await read_back(cache, PROMPT) == 3


async def test_bytes_travel_in_frames_where_no_descriptor_can_come(url: str) -> None:
    """Somebody between the two passes on bytes, and nothing else."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader_there, writer_there = await asyncio.open_unix_connection(Address.parse(url).path)
        await asyncio.gather(carry(reader, writer_there), carry(reader_there, writer))

    async with serve(url):
        proxy = await asyncio.start_unix_server(between, Address.parse(url).path + "-between")
        async with proxy, connect(f"{url}-between") as cache:
            await fill(cache, PROMPT)
            assert await read_back(cache, PROMPT) == 3


async def test_a_machine_of_the_other_byte_order_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve(url):
        monkeypatch.setattr(greeting.sys, "byteorder", "big")
        with pytest.raises(ConfigError, match="little-endian"):
            await connect(url).open()
        with pytest.raises(ConfigError, match="little-endian"):
            async with serve(f"{url}-2"):
                raise AssertionError


def test_what_an_attempt_was_told_is_told_and_not_that_the_time_of_the_last_was_short(url: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(url.removeprefix("unix://"))
        listener.listen()

        async def use() -> None:
            opening = asyncio.create_task(connect(url, connect_timeout_seconds=0.15).open())
            (await asyncio.to_thread(listener.accept))[0].close()  # and those that come after it wait
            with pytest.raises(ConnectionLostError, match=r"closed|reset"):
                await opening

        asyncio.run(use())
