"""`connect`: how a client gets to its server, what breaks with the connection, and how it gets back."""

import asyncio
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import async_solipsism
import pytest
from contract.served import serve as serve_virtually
from contract.support import fill, make_layout, make_prompt, outcomes, read_back

from async_cache import (
    AccessDeniedError,
    BlockingClient,
    CacheClient,
    CacheClosedError,
    CacheConfig,
    ConfigError,
    ConnectionLostError,
    LimitError,
    ObjectGroup,
    ProtocolError,
    RequestConflictError,
    ServerConfig,
    TenantConfig,
    UnknownRequestError,
    WriterClosedError,
    connect,
)
from async_cache.client import links
from async_cache.client.client import HEARTBEAT_SECONDS
from async_cache.client.link import Link, Lost
from async_cache.client.links import Links
from async_cache.l2.memory import MemoryBackend
from async_cache.prompt.layout import HASH_AT_ONCE_TOKENS
from async_cache.protocol import messages
from async_cache.protocol.frames import frame
from async_cache.protocol.messages import encode
from async_cache.server import Server
from async_cache.testing import GatedBackend
from tests.virtual import virtual

from .servers import SECONDS, make_cache, serve, serve_in_process, short_directory, stopped, until

PROMPT = make_prompt(3)
TOKENS = ["token-of-operations", "token-of-acme-number-1"]


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


@pytest.fixture
def url(directory: Path) -> str:
    """Where nothing listens yet."""
    return f"unix://{directory}/s"


@asynccontextmanager
async def served_twice(url: str) -> AsyncIterator[tuple[Server, GatedBackend, Any]]:
    """A server over a gated backend, and a call that puts another one in the place of it after it has gone."""
    gate = GatedBackend(MemoryBackend())
    async with make_cache(gate) as cache:
        servers = []

        async def again() -> None:
            servers.append(await Server(cache, ServerConfig(listen=(url,))).open())

        await again()
        try:
            yield servers[0], gate, again
        finally:
            gate.release()
            for server in servers:
                await server.close()


def count_dials(client: CacheClient) -> list[float]:
    """When the client tries to connect from now on."""
    dial, attempts = client._links._dial, list[float]()

    async def counted(lost: Lost, timeout_seconds: float) -> Link:
        attempts.append(asyncio.get_running_loop().time())
        return await dial(lost, timeout_seconds)

    client._links._dial = counted
    return attempts


async def is_lost(client: CacheClient) -> None:
    """Return once the client has noticed."""
    await until(lambda: client._links.current is None)


async def answers(client: CacheClient) -> None:
    """Return once the server has answered: on a busy machine, a heartbeat may be late now and then."""
    async with asyncio.timeout(SECONDS):
        while True:
            with suppress(ConnectionLostError):
                await client.ping()
                return


# Getting there.


async def test_an_absent_server_fails_with_one_clear_line(url: str) -> None:
    with pytest.raises(ConnectionLostError) as caught:
        await connect(url, connect_timeout_seconds=0.3).open()
    assert str(caught.value) == (
        f"there is no server at {url}: No such file or directory; `async-cache serve` starts one"
    )


async def test_a_port_at_which_nobody_listens_is_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_LAST_ATTEMPT_SECONDS", SECONDS)  # its one attempt does not end by time
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"tcp://127.0.0.1:{gone.getsockname()[1]}"
    with pytest.raises(ConnectionLostError, match=f"there is no server at {url}: Connect.*; `async-cache serve`"):
        await connect(url, connect_timeout_seconds=0).open()


@pytest.mark.parametrize("host", ["host.invalid", "a..b", "a" * 64])
async def test_a_host_that_there_is_not_is_told_as_well(host: str) -> None:
    with pytest.raises((ConnectionLostError, ConfigError)) as caught:
        await connect(f"tcp://{host}:7000", connect_timeout_seconds=0.1).open()
    assert "\n" not in str(caught.value)


async def test_a_silent_server_fails_with_one_clear_line(directory: Path, url: str) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(directory / "s"))
        silent.listen()
        with pytest.raises(ConnectionLostError) as caught:
            await connect(url, connect_timeout_seconds=0.3).open()
    assert str(caught.value) == f"no answer from {url} within 0.3 s"


@pytest.mark.parametrize("kind", ["absent", "silent"])
@virtual
async def test_who_finds_no_server_gives_up_in_its_time(kind: str) -> None:
    async def dial(lost: Lost, timeout_seconds: float) -> Link:
        if kind == "silent":
            await asyncio.sleep(timeout_seconds)
        raise ConnectionLostError(kind)

    with pytest.raises(ConnectionLostError, match=kind):
        await Links(dial, connect_timeout_seconds=0.3, heartbeat_seconds=None).open()
    assert asyncio.get_running_loop().time() == pytest.approx(0.3)


async def test_a_server_that_comes_in_time_is_found(url: str) -> None:
    opening = asyncio.create_task(connect(url, connect_timeout_seconds=SECONDS).open())
    await asyncio.sleep(0)
    async with serve(url):
        client = await opening
        assert await client.ping() < SECONDS
        await client.close()


async def test_a_server_that_was_there_first_is_found_at_the_first_attempt(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "_LAST_ATTEMPT_SECONDS", SECONDS)
    async with serve(url), connect(url, connect_timeout_seconds=0.0001) as client:
        assert await client.ping() < SECONDS


async def test_what_is_no_address_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="allowed: unix:///path, tcp://host:port or tls://host:port"):
        connect("localhost:7000")


@pytest.mark.parametrize("namespace", ["a\0", "n" * 129, "\ud800"])
def test_a_namespace_that_can_not_be_used_is_refused_at_once(namespace: str) -> None:
    with pytest.raises(ValueError, match="namespace"):
        connect("unix:///s", namespace)


@pytest.mark.parametrize("make", [connect, BlockingClient])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("heartbeat_seconds", [0, -1, math.nan, math.inf, "x", True]),
        ("connect_timeout_seconds", [-1, math.nan, math.inf, 10**400, "1", None]),
        ("token", [5, b"token", "\ud800"]),
        ("namespace", [5, None]),
        ("tls", [True]),
    ],
)
def test_an_argument_that_can_not_be_used_is_named_at_once(
    name: str, values: list[Any], make: Callable[..., Any]
) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=name):
            make("tls://localhost:1", **{name: value})


@pytest.mark.parametrize("token", [None, "wrong", TOKENS[0] + "x", "", "x" * 5000])
async def test_a_wrong_token_is_refused_at_once(token: str | None) -> None:
    async with serve("tcp://127.0.0.1:0", tenants={"a": {"tokens": TOKENS}}) as (_, server):
        began = time.monotonic()
        refused = (AccessDeniedError, ProtocolError) if token and len(token) > 1024 else AccessDeniedError
        with pytest.raises(refused):
            await connect(str(server.addresses[0]), token=token, connect_timeout_seconds=SECONDS).open()
        assert time.monotonic() - began < SECONDS / 2, "it is not tried again"
        for right in TOKENS:
            async with connect(str(server.addresses[0]), token=right) as client:
                await client.ping()


async def test_over_a_unix_socket_a_wrong_token_is_refused_and_none_is_not(url: str) -> None:
    async with serve(url, tenants={"a": {"tokens": TOKENS, "salts": []}}):
        with pytest.raises(AccessDeniedError, match="the server does not know this token"):
            await connect(url, token="token-of-nobody").open()
        async with connect(url) as trusted, connect(url, token=TOKENS[0]) as bound:
            assert (await trusted.clear()).chunks == 0
            assert len(trusted.memory) > 0
            with pytest.raises(AccessDeniedError):
                await bound.clear()
            with pytest.raises(AccessDeniedError):
                _ = bound.memory
            assert isinstance(bound.prefetch(PROMPT).load_done, asyncio.Future)
            with pytest.raises(AccessDeniedError):
                await bound.prefetch(PROMPT).load_done


@pytest.mark.parametrize("end", ["server.server", "client.connecting"])
async def test_another_version_of_the_protocol_is_refused(end: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"async_cache.{end}.VERSION", 2)
    async with serve(url):
        with pytest.raises(ProtocolError, match=r"the server speaks version \d of the protocol, the client \d"):
            await connect(url).open()


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", frame(b"\xc1"), frame(b"\x90"), b"\0\0\0\0", b"\xff\xff\xff\xff"],
    ids=["HTTP", "no MessagePack", "no message", "no length", "too long"],
)
async def test_what_is_no_server_of_this_protocol_is_told(answer: bytes) -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.setblocking(False)

        async def say() -> None:
            connection, _ = await loop.sock_accept(other)
            with connection:
                await loop.sock_sendall(connection, answer)
                while await loop.sock_recv(connection, 4096):
                    pass

        saying = asyncio.create_task(say())
        with pytest.raises(ProtocolError):
            await connect(f"tcp://127.0.0.1:{other.getsockname()[1]}", connect_timeout_seconds=1).open()
        with suppress(ConnectionResetError):
            await saying


async def test_a_server_that_is_full_says_so(url: str) -> None:
    async with serve(url, max_connections=1), connect(url) as client:
        with pytest.raises(LimitError, match="1 connections, which is its limit"):
            await connect(url).open()
        await client.ping()


# Before it is open, and after it is closed.


def calls(client: CacheClient) -> dict[str, Any]:
    """A call of every member, to be made."""
    return {
        "prefetch": lambda: client.prefetch(PROMPT),
        "lookup": lambda: client.lookup(PROMPT),
        "query_lookup_hits": lambda: client.query_lookup_hits("r"),
        "query_status": lambda: client.query_status("r"),
        "read": lambda: client.read("r"),
        "store": lambda: client.store(PROMPT),
        "renew": lambda: client.renew("r"),
        "end_request": lambda: client.end_request("r"),
        "flush": lambda: client.flush(),
        "delete": lambda: client.delete(PROMPT),
        "clear": lambda: client.clear(),
        "stats": lambda: client.stats(),
        "ping": lambda: client.ping(),
        "memory": lambda: client.memory,
    }


MEMBERS = list(calls(connect("unix:///s")))


async def attempt(call: Any) -> Any:
    outcome = call()
    return await outcome if hasattr(outcome, "__await__") else outcome


@pytest.mark.parametrize("member", MEMBERS)
async def test_a_call_before_open_is_refused(member: str) -> None:
    with pytest.raises(CacheClosedError, match="the client is not open"):
        await attempt(calls(connect("unix:///s"))[member])


async def test_a_call_after_close_is_refused(url: str) -> None:
    async with serve(url):
        async with connect(url) as client:
            pass
        for call in calls(client).values():
            with pytest.raises(CacheClosedError, match="the client was closed"):
                await attempt(call)


async def test_a_client_is_opened_once(url: str) -> None:
    async with serve(url):
        async with connect(url) as client:
            with pytest.raises(CacheClosedError, match="a client is opened once"):
                await client.open()
            await client.ping()
        with pytest.raises(CacheClosedError, match="a client is opened once"):
            await client.open()


async def test_close_is_idempotent(url: str) -> None:
    async with serve(url):
        client = connect(url)
        await client.close()
        client = await connect(url).open()
        await asyncio.gather(client.close(), client.close())
        await client.close()


async def test_a_client_that_was_never_opened_is_closed_for_good(url: str) -> None:
    async with serve(url):
        client = connect(url)
        await client.close()
        with pytest.raises(CacheClosedError):
            await client.open()


async def test_a_client_that_is_closed_while_it_opens_has_given_up_its_dial_then() -> None:
    ended = 0

    async def dial(lost: Lost, timeout_seconds: float) -> Link:
        nonlocal ended
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0)
            ended += 1
        raise AssertionError

    links = Links(dial, connect_timeout_seconds=1000, heartbeat_seconds=None)
    opening = asyncio.create_task(links.open())
    for _ in range(3):
        await asyncio.sleep(0)
    await links.close()
    assert ended == 1
    with pytest.raises(CacheClosedError, match="the client was closed"):
        await opening


async def test_a_client_that_is_closed_while_it_opens_is_closed(url: str) -> None:
    client = connect(url, connect_timeout_seconds=SECONDS)
    opening = asyncio.create_task(client.open())
    await asyncio.sleep(0)
    await client.close()
    async with serve(url):
        with pytest.raises(CacheClosedError, match="the client was closed"):
            await opening
        with pytest.raises(CacheClosedError, match="the client was closed"):
            await client.ping()


async def test_close_breaks_those_who_wait(url: str) -> None:
    gate = GatedBackend(MemoryBackend(), "lookup")
    async with serve(url, gate), connect(url) as client:
        prefetch = client.prefetch(PROMPT, request_id="r")
        waits = [
            asyncio.ensure_future(each)
            for each in (
                prefetch.lookup_done,
                prefetch.load_done,
                client.lookup(PROMPT),
                client.query_lookup_hits("r"),
                client.query_status("r"),
                client.query_status("r"),
                client.read("r"),
            )
        ]
        await gate.reached("lookup", 2)
        await client.close()
        for outcome in await outcomes(*waits):
            assert isinstance(outcome, CacheClosedError), outcome
        gate.release()


async def test_close_breaks_those_who_wait_for_a_connection(url: str) -> None:
    async with served_twice(url) as (server, _, _), connect(url) as client:
        await server.close()
        await is_lost(client)
        asking = asyncio.create_task(client.ping())
        await until(lambda: bool(client._links._waiting))
        await client.close()
        with pytest.raises((CacheClosedError, ConnectionLostError)):
            await asking


async def test_close_waits_for_what_was_committed(url: str) -> None:
    async with serve(url) as (cache, _):
        async with connect(url) as client:
            await fill(client, PROMPT)
        assert (await cache.lookup(PROMPT)).chunks == len(PROMPT)


async def test_an_error_that_is_told_often_takes_no_more_memory(url: str) -> None:
    async with serve(url):
        async with connect(url) as client:
            pass
        depths = []
        for _ in range(3):
            with pytest.raises(CacheClosedError) as caught:
                await client.stats()
            depth, trace = 0, caught.value.__traceback__
            while trace is not None:
                depth, trace = depth + 1, trace.tb_next
            depths.append(depth)
        assert len(set(depths)) == 1, f"the same exception was raised again: it keeps the frames of all: {depths}"


# Losing it, and getting back.


async def test_what_is_pending_fails_with_the_connection_and_new_calls_work(url: str) -> None:
    async with served_twice(url) as (server, gate, again), connect(url) as client:
        await fill(client, PROMPT)
        gate.hold("lookup")
        other = make_prompt(3, 2)
        prefetch = client.prefetch(other, request_id="r")
        waits = [
            asyncio.ensure_future(each)
            for each in (prefetch.lookup_done, prefetch.load_done, client.lookup(other), client.query_status("r"))
        ]
        await gate.reached("lookup", 2)
        await server.close()
        for outcome in await outcomes(*waits):
            assert isinstance(outcome, ConnectionLostError), outcome
            assert "shutting down" in str(outcome)
        gate.release()
        await again()
        assert await client.ping() < SECONDS
        assert await read_back(client, PROMPT, request_id="r") == len(PROMPT), "the id is free again"


async def test_what_was_held_is_gone_with_the_connection(url: str) -> None:
    async with served_twice(url) as (server, _, again), connect(url) as client:
        await fill(client, PROMPT)
        await client.prefetch(PROMPT, request_id="r").load_done
        lease = await client.read("r")
        writer = await client.store(make_prompt(2, 2))
        await server.close()
        await is_lost(client)
        with pytest.raises(WriterClosedError):
            writer[0].commit()
        writer.close()
        lease.release()
        await again()
        with pytest.raises(UnknownRequestError):
            await client.query_lookup_hits("r")
        stats = await client.stats()
        assert (stats.requests, stats.leases, stats.reserved_bytes) == (0, 0, 0)


async def test_without_a_connection_a_prefetch_is_broken_at_once_and_the_end_of_a_request_is_fine(url: str) -> None:
    async with served_twice(url) as (server, _, again), connect(url) as client:
        await server.close()
        await is_lost(client)
        prefetch = client.prefetch(PROMPT, request_id="r")
        for future in (prefetch.lookup_done, prefetch.load_done):
            assert future.done()
            assert isinstance(future.exception(), ConnectionLostError)
        prefetch.cancel()
        await client.end_request("r")
        with pytest.raises(ConnectionLostError):
            _ = client.memory
        with pytest.raises(ConnectionLostError):
            await client.ping()
        await again()
        assert await client.ping() < SECONDS
        assert await client.prefetch(PROMPT, request_id="r").load_done


async def test_a_call_waits_for_the_next_attempt_only(url: str) -> None:
    async with served_twice(url) as (server, _, _), connect(url) as client:
        await server.close()
        await is_lost(client)
        attempts = count_dials(client)
        for _ in range(3):
            before = len(attempts)
            with pytest.raises(ConnectionLostError, match="there is no server at"):
                await client.stats()
            assert len(attempts) <= before + 1


async def test_a_caller_that_does_not_wait_for_the_connection_any_more_harms_nobody(url: str) -> None:
    async with served_twice(url) as (server, _, again), connect(url) as client:
        await server.close()
        await is_lost(client)
        impatient = asyncio.create_task(client.ping())
        await until(lambda: bool(client._links._waiting))
        impatient.cancel()
        await again()
        await client.ping()
        assert impatient.cancelled()


async def test_what_the_new_server_refuses_is_told_until_it_does_not(url: str) -> None:
    async with make_cache() as cache:

        async def run(token: str) -> Server:
            config = ServerConfig(listen=(url,), tenants={"a": {"tokens": [token]}})  # type: ignore[dict-item]
            return await Server(cache, config).open()

        server = await run(TOKENS[0])
        async with connect(url, token=TOKENS[0]) as client:
            await server.close()
            server = await run(TOKENS[1])
            await until(lambda: isinstance(client._links.error, AccessDeniedError))
            with pytest.raises(AccessDeniedError):
                await client.ping()
            await server.close()
            server = await run(TOKENS[0])
            await until(lambda: client._links.current is not None)
            await client.ping()
        await server.close()


def test_it_tries_again_at_ever_longer_intervals() -> None:
    """In virtual time."""
    attempts = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        async with serve_virtually(CacheConfig(l1_bytes=2**20, l2=()), (), "framed") as client:
            dial = client._links._dial
            back = asyncio.Event()

            async def absent(lost: Lost, timeout_seconds: float) -> Link:
                attempts.append(loop.time())
                if back.is_set():
                    return await dial(lost, timeout_seconds)
                raise ConnectionLostError("absent")

            client._links._dial = absent
            assert client._links.current is not None
            await asyncio.sleep(2)  # what was connected for so long was not sent away
            client._links.current.abort("for the test")
            lost = loop.time()
            await asyncio.sleep(60)
            assert attempts[0] == pytest.approx(lost, abs=0.001), "the first at once"
            back.set()
            await client.ping()
            attempts.append(loop.time())

    with asyncio.Runner(loop_factory=async_solipsism.EventLoop) as runner:
        runner.run(run())
    intervals = [later - sooner for sooner, later in pairwise(attempts)]
    assert 60 <= len(intervals) <= 130
    for number, interval in enumerate(intervals[:-2]):
        longest = min(0.02 * 2**number, 1.0)
        assert longest / 2 - 0.001 <= interval <= longest + 0.001, "half of it is left to chance"
    assert len({round(interval, 6) for interval in intervals[10:-2]}) > 10
    assert intervals[-1] < 1, "what is there again is found soon"


async def test_a_server_that_stands_still_is_given_up(url: str) -> None:
    with serve_in_process(url) as process:
        async with connect(url, heartbeat_seconds=1) as client, connect(url, heartbeat_seconds=None) as patient:
            await answers(client)
            with stopped(process):
                began = time.monotonic()
                prefetch = client.prefetch(PROMPT, request_id="r")
                waiting = asyncio.create_task(patient.ping())
                outcomes_ = await outcomes(prefetch.lookup_done, prefetch.load_done, client.lookup(PROMPT))
                assert 1 <= time.monotonic() - began < HEARTBEAT_SECONDS, "it is what was given, and not the default"
                for outcome in outcomes_:
                    assert isinstance(outcome, ConnectionLostError)
                    assert str(outcome) == "the server has not answered for 1.0 s"
                assert not waiting.done()
            assert await waiting < SECONDS
            await answers(client)
            assert await client.prefetch(PROMPT, request_id="r").load_done


async def test_a_server_that_answers_is_not_given_up(url: str) -> None:
    async with serve(url, GatedBackend(MemoryBackend(), "lookup")), connect(url, heartbeat_seconds=0.05) as client:
        link = client._links.current
        prefetch = client.prefetch(PROMPT)
        before = client.heard()
        await until(lambda: client.heard() >= before + 10)  # heartbeats, and nothing else
        assert not prefetch.lookup_done.done()
        assert client._links.current is link


async def test_a_client_knows_whether_it_has_heard_from_its_server(url: str) -> None:
    async with served_twice(url) as (server, gate, again), connect(url, heartbeat_seconds=None) as client:
        await client.lookup(PROMPT)  # the answer to the layout has come
        gate.hold("lookup")
        before = client.heard()
        client.prefetch(PROMPT)
        await gate.reached("lookup", 2)
        assert client.heard() == before, "there is no answer yet"
        await client.ping()
        assert client.heard() > before
        before = client.heard()
        await server.close()
        await is_lost(client)
        gate.release()
        await again()
        await until(lambda: client._links.current is not None)
        assert client.heard() > before, "another server has said welcome"
        client.check_connected()


async def test_a_killed_server_fails_those_who_wait_at_once_and_another_is_found(url: str) -> None:
    """Without heartbeats nothing but the end of the connection tells of it."""
    with serve_in_process(url) as process:
        async with connect(url, heartbeat_seconds=None) as client:
            with stopped(process):
                prefetch = client.prefetch(PROMPT)
                asking = asyncio.create_task(client.ping())
                await asyncio.sleep(0)
                process.kill()
                async with asyncio.timeout(SECONDS):
                    for outcome in await outcomes(prefetch.lookup_done, prefetch.load_done, asking):
                        assert isinstance(outcome, ConnectionLostError), outcome
            process.wait()
            with serve_in_process(url):
                await until(lambda: client._links.current is not None)
                assert await client.ping() < SECONDS
                await fill(client, PROMPT)
                assert await read_back(client, PROMPT) == len(PROMPT)


async def test_no_descriptor_is_left_by_connections_that_failed_or_ended(directory: Path, url: str) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def fail() -> None:
        for options in ({"token": "token-of-nobody"}, {}):
            with suppress(AccessDeniedError, ConnectionLostError):
                async with connect(url, connect_timeout_seconds=0.01, **options) as client:
                    await client.ping()

    await fail()
    before = descriptors()
    await fail()
    assert descriptors() == before
    async with serve(url):
        during = descriptors()
        for _ in range(4):
            await fail()
        await until(lambda: descriptors() == during)
    await until(lambda: descriptors() == before)


# What only comes later.


async def test_a_conflict_with_another_client_reaches_the_futures(url: str) -> None:
    async with serve(url, GatedBackend(MemoryBackend(), "lookup")), connect(url) as first, connect(url) as second:
        first.prefetch(PROMPT, request_id="r")
        await first.ping()
        conflict = second.prefetch(make_prompt(3, 2), request_id="r")
        for future in (conflict.lookup_done, conflict.load_done):
            with pytest.raises(RequestConflictError):
                await future


async def test_namespaces_never_meet(url: str) -> None:
    async with serve(url), connect(url, "a") as first, connect(url, "b") as second:
        await fill(first, PROMPT)
        await first.prefetch(PROMPT, request_id="r").load_done
        with pytest.raises(UnknownRequestError, match="'r'"):
            await second.query_lookup_hits("r")
        assert await second.prefetch(make_prompt(3, 2), request_id="r").load_done
        assert (await first.query_status("r")).chunks == len(PROMPT)


@pytest.mark.parametrize("options", [{"skip_tokens": 2**63}, {"skip_tokens": 2**70}, {"deadline_seconds": 2**70}])
async def test_a_number_that_the_embedded_cache_takes_breaks_no_connection(options: dict[str, int], url: str) -> None:
    async with serve(url) as (cache, _), connect(url) as client:
        assert await cache.prefetch(PROMPT, **options).load_done
        link = client._links.current
        assert await client.prefetch(PROMPT, **options).load_done
        await client.ping()
        assert client._links.current is link


async def test_a_server_that_welcomes_and_closes_is_not_asked_all_the_time() -> None:
    accepted: list[float] = []

    async def turn_away(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(asyncio.get_running_loop().time())
        await reader.readexactly(int.from_bytes(await reader.readexactly(4), "little"))
        writer.write(frame(encode(messages.Welcome(messages.VERSION, 4096, False, True, 60.0))))
        await writer.drain()
        writer.close()

    with short_directory() as directory:
        listening = await asyncio.start_unix_server(turn_away, str(directory / "s"))
        async with listening, connect(f"unix://{directory}/s"):
            await until(lambda: len(accepted) >= 8)
    assert accepted[7] - accepted[0] > 0.5, "each waits for twice as long as the one before, or for half of that"


async def test_a_forked_child_keeps_no_connection_of_its_parent() -> None:
    with short_directory() as directory:
        url = f"unix://{directory}/s"
        async with serve(url) as (cache, _):
            code = f"""
import asyncio, os, signal, sys, time
from async_cache import ModelLayout, ObjectGroup, connect
async def main():
    client = await connect({url!r}).open()
    prompt = ModelLayout("m", (ObjectGroup((8,), "uint8"),), chunk_tokens=1).prompt([1])
    writer = await client.store(prompt)
    if not os.fork():
        os.close(1)  # who waits for the parent waits for its pipe, too
        time.sleep(60)
    print("forked", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, start_new_session=True
            )
            try:
                assert process.stdout is not None
                assert await process.stdout.readline() == b"forked\n"
                await process.wait()
                async with asyncio.timeout(SECONDS):
                    while (await cache.stats()).reserved_bytes:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
            finally:
                os.killpg(process.pid, signal.SIGKILL)


async def test_a_tensor_keeps_its_block_of_the_segment_when_its_writer_has_left() -> None:
    with short_directory() as directory:
        url = f"unix://{directory}/s"
        async with serve(url), connect(url) as client:
            async with client.store(make_prompt(1, 1)) as writer:
                left, offset = writer[0].tensors()[0], writer[0].offset
                assert len(writer[0].views) == 1
            async with client.store(make_prompt(1, 2)) as writer:
                assert writer[0].offset != offset
                writer[0].views[0][:] = bytes(16)
                left.fill_(255)
                assert bytes(writer[0].views[0]) == bytes(16)
            del left
            async with client.store(make_prompt(1, 3)) as writer:
                assert writer[0].offset == offset


async def test_a_request_that_another_client_has_claimed_is_in_use() -> None:
    with short_directory() as directory:
        url = f"unix://{directory}/s"
        async with serve(url), connect(url) as first, connect(url) as second:
            await fill(first, PROMPT)
            first.prefetch(PROMPT, request_id="a")
            result = await second.query_status("a")
            await first.ping()
            with pytest.raises(RequestConflictError):
                first.prefetch(PROMPT, request_id="a")
            second.unclaim(result)
            await second.ping()
            await first.ping()
            assert (await first.prefetch(PROMPT, request_id="a").load_done).chunks == len(PROMPT)
            assert (await first.query_status("a")).chunks == len(PROMPT)


async def test_a_lease_says_that_its_memory_is_not_kept_when_the_connection_is_lost() -> None:
    with short_directory() as directory:
        url = f"unix://{directory}/s"
        async with serve(url), connect(url) as client:
            await fill(client, PROMPT)
            client.prefetch(PROMPT, request_id="a")
            lease = await client.read("a")
            assert lease.held
            assert client._links.current is not None
            client._links.current.abort("for the test")
            assert not lease.held
            lease.release()


async def test_another_layout_of_the_same_model_is_told_in_a_line(url: str, caplog: pytest.LogCaptureFixture) -> None:
    ours, other = make_layout(model="two ways"), make_layout(model="two ways", chunk_tokens=8, revision="r2")
    bound = TenantConfig(tokens=(TOKENS[1],), salts=("blue",))
    async with (
        serve(url, tenants={"bound": bound}),
        connect(url) as first,
        connect(url) as second,
        connect(url, token=TOKENS[1]) as third,
    ):
        await third.lookup(make_prompt(3, layout=other, salt="blue"))
        for again in (first, second):
            await again.lookup(make_prompt(3, layout=ours))
        await third.lookup(make_prompt(3, layout=ours, salt="blue"))
        assert not caplog.records, "the same one, or of those who are bound to salts, or for them"
        for again in (first, second):
            await again.lookup(make_prompt(3, layout=other))
    assert [record.getMessage() for record in caplog.records] == [
        "model 'two ways' is cached in another layout too, which shares nothing with this one: "
        "chunk_tokens is 8 here and 4 there, revision is 'r2' here and '' there"
    ]


@pytest.mark.parametrize("name", ["x" * 5000, None, 5])
async def test_a_backend_that_cannot_be_named_costs_no_connection(name: Any) -> None:
    with short_directory() as directory:
        url = f"unix://{directory}/s"
        async with serve(url) as (cache, _), connect(url) as client:
            prompt = make_prompt(1)
            writer = await client.store(prompt)
            for call in (client.add_backend, client.drain_backend, client.remove_backend):
                with pytest.raises(TypeError if not isinstance(name, str) else ValueError):
                    await call(name)
            assert (await cache.stats()).reserved_bytes, "what this client holds"
            writer.close()


async def test_a_backend_that_a_client_adds_can_be_drained_and_removed_however_long_its_name() -> None:
    with short_directory() as directory:
        url = f"unix://{directory}/s"
        async with serve(url) as (_, _), connect(url) as client:
            await client.add_backend(f"memory://{'x' * (4096 - len('memory://'))}")
            (added,) = await client.backends()
            await client.drain_backend(added.name)
            await client.remove_backend(added.name)
            assert await client.backends() == []


async def test_a_long_prompt_is_hashed_though_the_default_executor_is_full_of_what_blocks(url: str) -> None:
    loop, freed = asyncio.get_running_loop(), threading.Event()
    layout = make_layout(ObjectGroup((16,), "uint8"), chunk_tokens=64)
    long = [layout.prompt(range(start, start + HASH_AT_ONCE_TOKENS + 64)) for start in (0, 1)]
    async with serve(url), connect(url) as client:
        try:
            blocked = [loop.run_in_executor(None, freed.wait) for _ in range(64)]
            async with asyncio.timeout(SECONDS):
                assert (await client.lookup(long[0])).chunks == 0
                async with client.store(long[1]) as writer:
                    assert writer.is_open
        finally:
            freed.set()
        await asyncio.gather(*blocked)
