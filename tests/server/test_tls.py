"""TLS: the same service over it, both ends by their certificates, and one clear line where the ends do not fit."""

import asyncio
import os
import signal
import socket
import ssl
from contextlib import suppress

import pytest
import uvloop
from contract.support import fill, make_layout, make_prompt, read_back

from async_cache import (
    AccessDeniedError,
    BlockingClient,
    ConfigError,
    ConnectionLostError,
    ObjectGroup,
    ProtocolError,
    ServerConfig,
    connect,
)
from async_cache.protocol import messages
from async_cache.protocol.address import Address
from async_cache.protocol.certificates import Certificates
from async_cache.protocol.frames import FrameReader, frame
from async_cache.protocol.messages import VERSION, Decoder, Hello, encode

from .certificates import Authority
from .programs import server
from .support import wait_until

TOKEN = "token-of-red____________"
CONFIG = f'[server.tenants.red]\ntokens = ["{TOKEN}"]\nsalts = ["red"]\n'
LARGE = make_layout(ObjectGroup((2**20,), "uint8"))


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


def serve(directory, authority, *, asks=False, **settings):
    """A server by TLS and by TCP, of a process of its own, which runs uvloop."""
    cert, key = authority.issue("server")
    (directory / "c.toml").write_text(CONFIG)
    more = f"&ca={authority.ca}" if asks else ""
    urls = f"tls://127.0.0.1:0?cert={cert}&key={key}{more}", "tcp://127.0.0.1:0"
    return server(directory, *urls, config=directory / "c.toml", **settings)


@pytest.fixture(scope="module")
def served(tmp_path_factory, authority):
    with serve(tmp_path_factory.mktemp("tls"), authority) as served:
        assert served.urls[0].startswith("tls://127.0.0.1:") and "cert" not in served.urls[0]
        yield served


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request):
    """Runs a coroutine in either loop."""

    def run(work):
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(work)

    return run


def test_everything_goes_over_tls_also_what_is_large(served, authority, run):
    async def use():
        prompt = make_prompt(8, 1, salt="red", layout=LARGE)
        async with connect(f"{served.url}?ca={authority.ca}", token=TOKEN) as client:
            await client.ping()
            await client.delete(prompt)
            await fill(client, prompt)
            assert await read_back(client, prompt) == 8

    run(use())


def test_a_context_stands_for_files_and_a_blocking_client_takes_both(served, authority):
    context = ssl.create_default_context(cafile=authority.ca)
    for client in (
        BlockingClient(served.url, token=TOKEN, tls=context),
        BlockingClient(f"{served.url}?ca={authority.ca}", token=TOKEN),
    ):
        with client:
            client.ping()


def test_a_certificate_of_another_authority_is_refused_at_once(served, tmp_path, run):
    other = Authority(tmp_path, "other")

    async def use():
        for url in (served.url, f"{served.url}?ca={other.ca}"):
            with pytest.raises(AccessDeniedError, match="the certificate of the server at tls://127"):
                await connect(url, token=TOKEN, connect_timeout_seconds=60).open()

    run(use())


def test_a_certificate_of_another_host_is_refused(tmp_path, authority, run):
    cert, key = authority.issue("elsewhere", "127.0.0.2")
    with server(tmp_path, f"tls://127.0.0.1:0?cert={cert}&key={key}") as served:

        async def use():
            with pytest.raises(AccessDeniedError, match=r"not valid for '127\.0\.0\.1'"):
                await connect(f"{served.url}?ca={authority.ca}").open()

        run(use())


def test_a_client_without_tls_and_the_reverse_hear_so(served, authority, run):
    plain_at_tls, tls_at_plain = served.url.replace("tls", "tcp"), served.urls[1].replace("tcp", "tls")

    async def use():
        with pytest.raises(ProtocolError, match="speaks TLS: connect to tls://"):
            await connect(plain_at_tls, token=TOKEN, connect_timeout_seconds=60).open()
        with pytest.raises(ProtocolError, match=r"speaks no TLS at .*: connect to tcp://"):
            await connect(f"{tls_at_plain}?ca={authority.ca}", token=TOKEN, connect_timeout_seconds=60).open()

    run(use())
    assert served.says("this address speaks TLS: connect to tls://host:port")
    assert served.says("this address speaks no TLS: connect to tcp://host:port")


def test_a_server_that_asks_for_certificates_lets_in_nobody_without(tmp_path, authority, run):
    cert, key = authority.issue("client")
    (tmp_path / "other").mkdir()
    foreign_cert, foreign_key = Authority(tmp_path / "other", "other").issue("client")
    with serve(tmp_path, authority, asks=True) as served:
        url = f"{served.url}?ca={authority.ca}"

        async def use():
            async with connect(f"{url}&cert={cert}&key={key}", token=TOKEN) as client:
                await client.ping()
            for wrong in (url, f"{url}&cert={foreign_cert}&key={foreign_key}"):
                with pytest.raises((AccessDeniedError, ConnectionLostError)) as refusal:
                    await connect(wrong, token=TOKEN, connect_timeout_seconds=1).open()
                assert "certificate" in str(refusal.value) or "unknown ca" in str(refusal.value), refusal.value
            with pytest.raises(AccessDeniedError, match="token"):
                await connect(f"{url}&cert={cert}&key={key}").open()

        run(use())


async def test_certificates_are_read_anew_by_sighup_and_unusable_ones_change_nothing(tmp_path):
    first, second = (Authority(tmp_path, name) for name in ("first", "second"))
    with serve(tmp_path, first) as served:

        async def reloaded(line):
            before = served.log.count(line)
            os.kill(served.pid, signal.SIGHUP)

            async def is_read():
                return served.log.count(line) > before

            await wait_until(is_read)

        async with connect(f"{served.url}?ca={first.ca}", token=TOKEN) as client:
            (tmp_path / "server.key").write_text("no key")
            await reloaded("settings are as they were: the certificates")
            async with connect(f"{served.url}?ca={first.ca}", token=TOKEN) as other:
                await other.ping()
            second.issue("server")
            await reloaded("settings are as they were\n")
            async with connect(f"{served.url}?ca={second.ca}", token=TOKEN) as other:
                await other.ping()
            with pytest.raises(AccessDeniedError):
                await connect(f"{served.url}?ca={first.ca}", token=TOKEN).open()
            await client.ping()


async def test_those_who_never_end_their_handshake_hold_up_nobody(tmp_path, authority):
    with serve(tmp_path, authority, server_max_connections=64, server_hello_timeout_seconds=0.5) as served:
        address = Address.parse(served.url)
        sockets = [socket.create_connection((address.host, address.port)) for _ in range(40)]
        for number, half in enumerate(sockets):
            half.sendall(b"\x16\x03\x01\x02\x00\x01"[: number % 7])
        async with connect(f"{served.url}?ca={authority.ca}", token=TOKEN) as client:
            await client.ping()
            for half in sockets:
                half.settimeout(10)
                with half, suppress(ConnectionResetError):  # of what was not looked at
                    while half.recv(64):
                        pass
        assert served.stop() == 0


async def test_a_client_that_is_given_up_in_its_handshake_leaves_nothing(authority):
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(ConnectionLostError, match="no answer"):
            await connect(f"tls://127.0.0.1:{port}?ca={authority.ca}", connect_timeout_seconds=0.05).open()
    listening.close()

    async def are_closed():
        return len(os.listdir("/proc/self/fd")) < before

    await wait_until(are_closed)


@pytest.mark.parametrize(
    "url",
    [
        "tls://h:1?ca=",
        "tls://h:1?cert=a&cert=b",
        "tls://h:1?password=x",
        "tls://h:1?key=x",
        "tcp://h:1?ca=x",
        "tls://h",
    ],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError):
        Address.parse(url)


def test_a_server_needs_a_certificate_that_can_be_used(tmp_path, authority):
    with pytest.raises(ConfigError, match=r"needs a certificate: tls://127.0.0.1:1\?cert=FILE&key=FILE"):
        ServerConfig(listen=("tls://127.0.0.1:1",))
    cert, key = authority.issue("locked", passphrase=b"secret")
    for files in (Certificates(cert=str(cert), key=str(key)), Certificates(cert=str(tmp_path / "none"))):
        with pytest.raises(ConfigError, match=r"cannot be used: (the key is locked|No such file)"):
            files.server_context()


def test_a_context_is_for_an_address_by_tls():
    with pytest.raises(ConfigError, match="without TLS"):
        connect("tcp://127.0.0.1:1", tls=ssl.create_default_context())


def test_a_peer_that_says_more_than_a_greeting_is_heard_later(served, authority):
    """What comes with the hello, in one piece, is the connection's."""
    address = Address.parse(served.url)
    context = ssl.create_default_context(cafile=authority.ca)
    with (
        socket.create_connection((address.host, address.port)) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as peer,
    ):
        peer.settimeout(10)
        peer.sendall(frame(encode(Hello(VERSION, TOKEN))) + frame(encode(messages.Ping(7))))
        frames, got = FrameReader(), []
        while len(got) < 2:
            got += [bytes(payload) for payload in frames.feed(peer.recv(2**16))]
        assert Decoder(messages.Answer).decode(got[1]) == messages.Done(7)
