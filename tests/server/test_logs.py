"""The log: who comes, who is refused and why, and that nobody who reads it holds up the server."""

import asyncio
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from async_cache import AccessDeniedError, AsyncCache, BlockingClient, CacheConfig, ServerConfig, connect
from async_cache.protocol import messages
from async_cache.protocol.frames import frame
from async_cache.protocol.messages import VERSION, Hello, encode
from async_cache.server import Server
from async_cache.server import server as server_module
from async_cache.server.logs import ThreadedLog

from .programs import END_SECONDS, TESTS, environment, serve_command, server, socket_in
from .support import Peer, wait_until

TOKEN = "token-of-somebody"
CONFIG = f"""
[server.tenants.somebody]
tokens = ["{TOKEN}"]
"""
F_SETPIPE_SZ = 1031


async def logged(served, *texts):
    """Wait until the log has these; the last line that has all."""
    found = []

    async def is_there():
        found[:] = [line for line in served.log.splitlines() if all(text in line for text in texts)]
        return bool(found)

    await wait_until(is_there)
    return found[-1]


async def test_who_comes_and_who_goes_has_a_line_each(tmp_path):
    with server(tmp_path, socket_in(tmp_path), "tcp://127.0.0.1:0") as served:
        for url, where in zip(served.urls, (f"process {os.getpid()}, user {os.geteuid()}", "127.0.0.1"), strict=True):
            async with connect(url, "engine-0"):
                assert "INFO" in await logged(served, where, "is let in", "namespace 'engine-0'", "tenant ''")
            await logged(served, where, "is gone")


async def test_a_token_that_is_refused_has_a_line_without_the_token(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(CONFIG)
    with server(tmp_path, socket_in(tmp_path), "tcp://127.0.0.1:0", config=config) as served:
        for token in ("one-of-nobody-at-all", None):
            with pytest.raises(AccessDeniedError):
                await connect(served.urls[1], token=token).open()
        line = await logged(served, "127.0.0.1", "is refused", "does not know this token")
        assert "WARNING" in line and "one-of-nobody" not in served.log
        await logged(served, "127.0.0.1", "is refused", "wants a token")
        async with connect(served.url, token=TOKEN):
            await logged(served, "tenant 'somebody'", "is let in")


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (frame(b"\xc1"), "not a message"),
        (bytes(4), "a frame of 0 bytes"),
        (frame(encode(messages.StoreData(7, 0, 0, memoryview(b"")))) + frame(b"\xc0"), "not a message"),
    ],
)
@pytest.mark.parametrize("greets", [True, False])
async def test_a_frame_that_is_none_has_a_line(tmp_path, sent, told, greets):
    with server(tmp_path) as served, Peer(served.url, hello=greets) as peer:
        peer.socket.sendall(sent)
        line = await logged(served, f"process {os.getpid()}", "is sent away" if greets else "is refused")
        assert "WARNING" in line and (told in line or not greets)


async def test_another_version_is_told_whatever_else_its_greeting_has(tmp_path):
    with server(tmp_path) as served, Peer(served.url, hello=False) as peer:
        fields = ["Hello", VERSION + 1, None, "", True, {"of a later": "version"}]
        peer.socket.sendall(frame(encode(fields)))
        (failed,) = peer.answers(1)
        assert failed.code == "protocol" and f"the server speaks version {VERSION}" in failed.message
        await logged(served, "is refused", f"version {VERSION}")


async def test_a_health_check_that_connects_and_goes_is_no_line(tmp_path):
    with server(tmp_path, "tcp://127.0.0.1:0") as served:
        port = int(served.url.rpartition(":")[2])
        for _ in range(3):
            socket.create_connection(("127.0.0.1", port)).close()
        async with connect(served.url):
            await logged(served, "is let in")
        assert "is refused" not in served.log


def test_a_reader_of_the_log_that_hangs_does_not_hold_up_the_server(tmp_path):
    """It has a pipe of a page, which nobody reads while far more is logged than it holds; and then the server ends."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, F_SETPIPE_SZ, 4096)
    command = serve_command(socket_in(tmp_path), l1="16MiB", l2=["memory://"], config=None, via=["async_cache"])
    command += ["--log-level", "debug"]
    with subprocess.Popen(command, cwd=TESTS, env=environment(), stdout=subprocess.PIPE, stderr=writing) as child:
        os.close(writing)
        try:
            assert child.stdout is not None
            assert any(line.startswith(b"serving at ") for line in child.stdout)
            for _ in range(200):
                with Peer(socket_in(tmp_path)) as peer:  # which is reset: what it is sent is not read
                    peer.send(*(messages.Ping(number) for number in range(1, 9)))
            for _ in range(3):
                with BlockingClient(socket_in(tmp_path)) as cache:
                    cache.ping()
            child.terminate()
            assert child.wait(END_SECONDS) == 0
        finally:
            child.kill()
            os.close(reading)


def full_pipe():
    reading, writing = os.pipe()
    fcntl.fcntl(writing, F_SETPIPE_SZ, 4096)
    os.write(writing, bytes(4096))
    return reading, writing


def pipe_that_nobody_reads():
    reading, writing = os.pipe()
    os.close(reading)
    return os.open(os.devnull, os.O_RDONLY), writing


@pytest.mark.parametrize("output", [full_pipe, pipe_that_nobody_reads])
def test_who_hangs_or_is_gone_where_it_says_that_it_serves_does_not_hold_up_the_server(tmp_path, output):
    reading, writing = output()
    command = serve_command(socket_in(tmp_path), l1="16MiB", l2=["memory://"], config=None, via=["async_cache"])
    with subprocess.Popen(command, cwd=TESTS, env=environment(), stdout=writing, stderr=writing) as child:
        os.close(writing)
        try:
            with BlockingClient(socket_in(tmp_path), connect_timeout_seconds=END_SECONDS) as cache:
                cache.ping()
            child.terminate()
            assert child.wait(END_SECONDS) == 0
        finally:
            child.kill()
            os.close(reading)


@pytest.mark.parametrize("output", [full_pipe, pipe_that_nobody_reads])
def test_who_hangs_or_is_gone_where_an_error_is_told_does_not_hold_up_the_command(output):
    reading, writing = output()
    command = [sys.executable, "-m", "async_cache", "serve", "--l2", "nosuch://"]
    with subprocess.Popen(command, cwd=TESTS, env=environment(), stderr=writing) as child:
        os.close(writing)
        try:
            assert child.wait(END_SECONDS) == 1
        finally:
            child.kill()
            os.close(reading)


async def test_connections_that_cannot_be_accepted_have_one_line_for_all(tmp_path, caplog, monkeypatch):
    loop, left = asyncio.get_running_loop(), [OSError(errno.EMFILE, "Too many open files")] * 20
    accept = loop.sock_accept

    async def refused(sock):
        if left:
            raise left.pop()
        return await accept(sock)

    monkeypatch.setattr(loop, "sock_accept", refused)
    monkeypatch.setattr(server_module, "_RETRY_SECONDS", 0)
    async with (
        AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache,
        Server(cache, ServerConfig(listen=[socket_in(tmp_path)])),
        connect(socket_in(tmp_path)) as client,
    ):
        await client.ping()
    lines = [record.getMessage() for record in caplog.records if "could not be accepted" in record.getMessage()]
    assert not left and lines == ["a connection could not be accepted: Too many open files"]


def test_what_there_is_no_room_for_is_dropped_and_counted():
    reading, writing = os.pipe()
    fcntl.fcntl(writing, F_SETPIPE_SZ, 4096)
    log = ThreadedLog(writing, lines=10)
    long = "x" * 1000
    for number in range(50):
        log.emit(logging.LogRecord("n", logging.INFO, "", 0, "%d %s", (number, long), None))
    text = b""
    while b"dropped" not in text:
        text += os.read(reading, 2**16)

    def finish():
        log.finish(END_SECONDS)
        os.close(writing)

    finishing = threading.Thread(target=finish)
    finishing.start()
    while data := os.read(reading, 2**16):
        text += data
    finishing.join()
    os.close(reading)
    lines = text.decode().splitlines()
    dropped = sum(int(line.split()[0]) for line in lines if "were dropped" in line)
    assert dropped > 0 and dropped + sum(long in line for line in lines) == 50


def test_a_reader_that_is_gone_is_no_fault():
    reading, writing = os.pipe()
    os.close(reading)
    log = ThreadedLog(writing)
    for _ in range(3):
        log.emit(logging.LogRecord("n", logging.INFO, "", 0, "text", (), None))
    log.finish(END_SECONDS)
    os.close(writing)


def test_a_terminal_that_goes_ends_it_in_order_and_none_that_was_to_be_ignored(tmp_path):
    with server(tmp_path) as served, BlockingClient(served.url) as cache:
        cache.ping()
        assert served.stop(signal.SIGHUP) == 0
        assert not (tmp_path / "s").exists()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        with server(tmp_path) as served, BlockingClient(served.url) as cache:
            os.kill(served.pid, signal.SIGHUP)
            cache.ping()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_hello_without_a_descriptor_of_ours_reads_in_frames(tmp_path):
    with server(tmp_path) as served, Peer(served.url, hello=False) as peer:
        with suppress(BlockingIOError):
            peer._greet(frame(encode(Hello(VERSION, descriptors=False))), None)
        assert peer.welcome.trusted and not peer.welcome.mapped and peer.arena_fd is None


async def test_a_line_about_a_backend_has_its_name_as_a_field(tmp_path):
    with server(tmp_path, l2=["valkey://127.0.0.1:1"], server_log_format="json") as served:
        async with connect(served.url) as cache:
            await cache.add_backend("memory://near")
            await cache.remove_backend("near")
    about = {}
    for line in map(json.loads, served.log.splitlines()):
        if "backend" in line:
            about.setdefault(line["backend"], []).append(line["message"])
    away, near = about.pop("valkey://127.0.0.1:1"), about.pop("near")
    assert "it is tried again when it is needed" in away[0]
    assert [message.split("near ")[1] for message in near] == ["was added", "is being removed", "was removed"]
    assert about == {}
