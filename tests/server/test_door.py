"""Before a token is known: floods of connections, of those that say nothing, and of wrong tokens."""

import asyncio
import logging
import os
import resource
import socket
from contextlib import ExitStack

import pytest

from async_cache import AccessDeniedError, LimitError, connect
from async_cache.protocol.frames import frame
from async_cache.protocol.messages import VERSION, Hello, encode
from async_cache.server.door import Door, fitting_connections
from async_cache.testing.virtual import run_virtual

from .programs import server
from .support import Peer

TOKEN = "token-of-red____________"
HELLO = frame(encode(Hello(VERSION)))
CONFIG = f'[server.tenants.red]\ntokens = ["{TOKEN}"]\nsalts = ["red"]\n'


def serve(directory, **settings):
    (directory / "c.toml").write_text(CONFIG)
    urls = f"unix://{directory}/s", "tcp://127.0.0.1:0"
    return server(directory, *urls, config=directory / "c.toml", **settings)


async def test_those_who_say_nothing_make_room_for_those_who_do(tmp_path):
    with serve(tmp_path, server_max_connections=64, server_hello_timeout_seconds=1000) as served, ExitStack() as stack:
        for half in (b"", b"\x20", b"\x20\0\0\0") * 30:
            peer = stack.enter_context(Peer(served.urls[1], hello=False))
            peer.socket.sendall(half)
        async with connect(served.urls[1], token=TOKEN) as client:
            await client.ping()
        assert served.descriptors() < 64 + 40


async def test_some_connections_are_kept_for_the_unix_socket(tmp_path):
    with serve(tmp_path, server_max_connections=32) as served, ExitStack() as stack:
        let_in = 0
        while True:
            peer = stack.enter_context(Peer(served.urls[1], token=TOKEN))
            if not hasattr(peer.welcome, "arena_bytes"):
                break
            let_in += 1
        assert let_in == 30
        assert peer.welcome.code == "limit"
        async with connect(served.urls[0]) as operator:
            await operator.ping()


def test_the_segment_of_a_client_that_is_refused_when_it_has_said_hello_is_closed(tmp_path):
    with serve(tmp_path, server_max_connections=1) as served, ExitStack() as stack:
        late = [stack.enter_context(Peer(served.url, hello=False)) for _ in range(8)]
        stack.enter_context(Peer(served.url))  # the one that is let in
        segment = os.memfd_create("late", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        stack.callback(os.close, segment)
        for peer in late:
            peer._greet(HELLO, segment)
            assert peer.welcome.code == "limit"
            assert peer.socket.recv(1) == b""  # all that there was of it is closed by now
        assert not [path for path in served.open_files() if path.startswith("/memfd:late")]


async def test_wrong_tokens_are_refused_with_the_peers_address_and_few_lines(tmp_path):
    with serve(tmp_path) as served:
        guesses = [connect(served.urls[1], token=f"wrong-{number:_<20}").open() for number in range(30)]
        refusals = await asyncio.gather(*guesses, return_exceptions=True)
        assert {type(refusal) for refusal in refusals} == {AccessDeniedError}
        assert served.says("is refused")
        lines = [line for line in served.log.splitlines() if "is refused" in line]
        assert 0 < len(lines) <= 20
        assert all("127.0.0.1" in line and "wrong-" not in line for line in lines)
        async with connect(served.urls[1], token=TOKEN) as client:
            await client.ping()


def test_guessing_takes_longer_with_each_wrong_token_but_a_mistake_does_not():
    async def guess():
        door, clock = Door(100), asyncio.get_running_loop().time
        for _ in range(8):
            await door.slow_down("a", AccessDeniedError(""))
        assert clock() == 0
        for _ in range(100):
            await door.slow_down("a", AccessDeniedError(""))
        assert clock() > 80
        now = clock()
        await door.slow_down("b", AccessDeniedError(""))
        await door.slow_down("a", LimitError(""))
        assert clock() == now

    run_virtual(guess())


def test_a_flood_has_some_lines_and_a_count(caplog):
    async def flood():
        door = Door(100)
        for _ in range(1000):
            door.refused("the client at 1.2.3.4", LimitError("too many"))
        await asyncio.sleep(11)
        door.refused("the client at 1.2.3.4", LimitError("too many"))

    with caplog.at_level(logging.WARNING):
        run_virtual(flood())
    assert len(caplog.records) == 22
    assert "980 more" in caplog.text


def test_connections_fit_the_descriptors(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    assert fitting_connections(4096) == (1024 - 256) // 2
    assert fitting_connections(100) == 100


def test_a_part_of_the_connections_is_the_unix_sockets():
    async def check():
        door = Door(32)
        door.check(29, socket.AF_INET)
        with pytest.raises(LimitError):
            door.check(30, socket.AF_INET)
        door.check(31, socket.AF_UNIX)
        with pytest.raises(LimitError):
            door.check(32, socket.AF_UNIX)

    run_virtual(check())
