"""Where a server listens: what stands there before it, who may open it, and what is left of it."""

import asyncio
import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from contract.support import count_hits, fill, make_prompt, read_back
from soak import rounds

from async_cache import BlockingClient, ConfigError, ConnectionLostError, connect
from async_cache.client import links
from async_cache.client.client import HEARTBEAT_SECONDS
from async_cache.protocol.address import Address
from async_cache.server import listener
from async_cache.server.listener import Listener

from .programs import TESTS, environment, heard, program, serve_command, server, socket_in, tell
from .support import reconnected

PROMPT = make_prompt(2)
IN_TIME_SECONDS = 60
LISTENERS = 4


def run(*command):
    return subprocess.run(command, cwd=TESTS, env=environment(), capture_output=True, text=True, timeout=100)


def refused(directory, *listen):
    """What a server says that can not start: one line, and exit code 1."""
    done = run(
        *serve_command(
            *listen or [socket_in(directory)], l1="16MiB", l2=["memory://"], config=None, via=["async_cache"]
        )
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    return done.stderr


async def test_the_stale_socket_of_a_dead_server_is_replaced(tmp_path):
    with server(tmp_path) as first:
        first.kill()
    assert (tmp_path / "s").is_socket()
    with server(tmp_path) as second:
        async with connect(second.url) as cache:
            await fill(cache, PROMPT)
            assert await read_back(cache, PROMPT) == 2
    assert not (tmp_path / "s").exists()


async def test_the_socket_of_a_live_server_is_refused(tmp_path):
    with server(tmp_path) as served:
        async with connect(served.url) as cache:
            await fill(cache, PROMPT)
            assert "a server is listening there already" in refused(tmp_path)
            async with connect(served.url) as another:
                assert await count_hits(another, PROMPT) == await count_hits(cache, PROMPT) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_the_socket_of_a_server_that_is_stopped_is_refused_as_well(tmp_path):
    """It is alive, though it says nothing."""
    with server(tmp_path) as served:
        os.kill(served.pid, signal.SIGSTOP)
        try:
            assert "a server is listening there already" in refused(tmp_path)
        finally:
            os.kill(served.pid, signal.SIGCONT)
        with BlockingClient(served.url) as cache:
            cache.ping()


def test_what_is_no_socket_is_left_alone(tmp_path):
    (tmp_path / "s").write_text("a file of somebody")
    assert "not a socket" in refused(tmp_path)
    assert (tmp_path / "s").read_text() == "a file of somebody"


def test_a_directory_that_somebody_keeps_locked_neither_hangs_a_start_nor_an_end(tmp_path, monkeypatch):
    """Whoever can read a directory can lock it, as `systemd-tmpfiles` has people do."""
    monkeypatch.setattr(listener, "_ALONE_SECONDS", 0.05)
    address = Address.parse(socket_in(tmp_path))
    first = Listener(address)
    with locked(tmp_path):
        first.close()
        with pytest.raises(ConfigError, match=f"another process keeps {tmp_path} locked"):
            Listener(address)
    assert (tmp_path / "s").is_socket()  # dead, and replaced by whoever comes
    Listener(address).close()
    assert not (tmp_path / "s").exists()


@contextmanager
def locked(directory):
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
    os.close(descriptor)


def test_a_tcp_port_in_use_is_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen at tcp://127.0.0.1" in refused(tmp_path, f"tcp://127.0.0.1:{taken.getsockname()[1]}")


def test_the_first_address_is_given_up_where_the_second_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(tmp_path, socket_in(tmp_path), f"tcp://127.0.0.1:{taken.getsockname()[1]}")
    assert list(tmp_path.iterdir()) == []


def test_of_those_who_want_to_listen_at_once_at_a_stale_socket_one_does(tmp_path):
    url = socket_in(tmp_path)
    with ExitStack() as stack:
        children = [stack.enter_context(program("server.listener", url)) for _ in range(LISTENERS)]
        for _ in range(rounds(50, 3_000)):
            with socket.socket(socket.AF_UNIX) as stale:
                stale.bind(str(tmp_path / "s"))
            for child in children:
                tell(child, "listen")
            said = sorted(map(heard, children))
            assert said.count("listening") == 1
            assert all("a server is listening there already" in line for line in said if line != "listening")
            for child in children:
                tell(child, "close")
            assert set(map(heard, children)) == {"closed"}
            assert list(tmp_path.iterdir()) == []


def listening():
    """The names of sockets that listen, as the system tells them: systemd-tmpfiles spares what is among them."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return [fields[7] for fields in map(str.split, lines) if len(fields) > 7]


@pytest.mark.parametrize("by_a_link", [False, True])
def test_the_system_knows_the_socket_by_the_name_that_it_has(tmp_path, by_a_link):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with server(tmp_path, f"unix://{tmp_path}/{'link' if by_a_link else 'run'}/s") as served:
        assert f"{tmp_path}/run/s" in listening()
        with BlockingClient(served.url) as cache:
            cache.ping()
    assert not (tmp_path / "run" / "s").exists()


def test_no_other_name_is_touched_whatever_it_looks_like(tmp_path):
    """Such as those under which sockets were bound before: two containers have processes of the same number."""
    others = [tmp_path / f".{number:x}" for number in (1, 2, os.getpid())]
    for other in others:
        other.write_text("of somebody")
    bound = Listener(Address.parse(socket_in(tmp_path)))
    names = {path.name for path in tmp_path.iterdir()}
    bound.close()
    assert names == {"s", *(other.name for other in others)}
    assert [other.read_text() for other in others] == ["of somebody"] * 3


def test_who_listens_no_more_removes_no_socket_of_another(tmp_path):
    first = Listener(Address.parse(socket_in(tmp_path)))
    (tmp_path / "s").unlink()
    second = Listener(Address.parse(socket_in(tmp_path)))
    first.close()
    assert (tmp_path / "s").is_socket()
    second.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_only_its_owner_may_open_the_socket(tmp_path, umask):
    before = os.umask(umask)
    try:
        with server(tmp_path) as served:
            mode = (tmp_path / "s").stat().st_mode
            assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
            with BlockingClient(served.url) as cache:
                cache.ping()
    finally:
        os.umask(before)


def test_a_directory_that_is_made_for_it_is_its_owners(tmp_path):
    with server(tmp_path, f"unix://{tmp_path}/new/s"):
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it(tmp_path, number):
    with server(tmp_path) as served, BlockingClient(served.url) as cache:
        waiting = cache.prefetch(PROMPT)
        waiting.load_done.result()
        assert served.stop(number) == 0
        assert not Path(tmp_path / "s").exists()
        with pytest.raises(ConnectionLostError):
            cache.ping()


def test_a_second_signal_changes_nothing(tmp_path):
    with server(tmp_path) as served:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(served.pid, number)
        assert served.child.wait(IN_TIME_SECONDS) == 0


async def test_a_client_whose_server_is_absent_fails_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(links, "_LAST_ATTEMPT_SECONDS", 60)  # no attempt ends by time
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for url in (socket_in(tmp_path), f"tcp://127.0.0.1:{port}"):
        for connect_timeout_seconds in (0.05, 1):
            with pytest.raises(ConnectionLostError, match=f"^there is no server at {url}: .*async-cache serve") as told:
                await connect(url, connect_timeout_seconds=connect_timeout_seconds).open()
            assert "\n" not in str(told.value)
        with pytest.raises(ConnectionLostError, match="there is no server at"):
            await asyncio.to_thread(BlockingClient(url, connect_timeout_seconds=0.05).open)


@pytest.mark.parametrize("command", ["ping", "status"])
def test_the_command_line_says_in_one_line_that_no_server_is_there(tmp_path, command):
    done = run(sys.executable, "-m", "async_cache", command, "--url", socket_in(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("async-cache: there is no server at unix://")
    assert done.stderr.count("\n") == 1 and not done.stdout


async def test_a_server_that_accepts_and_says_nothing_is_given_up(tmp_path):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        with pytest.raises(ConnectionLostError, match=r"no answer from unix://.* within 0\.3 s"):
            await connect(socket_in(tmp_path), connect_timeout_seconds=0.3).open()


async def test_a_server_that_stops_is_given_up_after_two_heartbeats(tmp_path):
    with server(tmp_path) as served:
        async with connect(served.url, heartbeat_seconds=1) as cache:
            await reconnected(cache)
            os.kill(served.pid, signal.SIGSTOP)
            began = time.monotonic()
            try:
                with pytest.raises(ConnectionLostError, match=r"has not answered for 1\.0 s"):
                    await cache.lookup(PROMPT)
            finally:
                os.kill(served.pid, signal.SIGCONT)
            assert 1 <= time.monotonic() - began < HEARTBEAT_SECONDS, "it is what was given, and not the default"
            await reconnected(cache)
