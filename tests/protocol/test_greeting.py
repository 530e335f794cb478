"""The greeting: however its bytes come it is heard, what is none is refused, and no descriptor is left."""

import asyncio
import fcntl
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest

from async_cache import AccessDeniedError, ConnectionLostError, LimitError, ProtocolError
from async_cache.protocol.frames import MAX_GREETING_BYTES, frame
from async_cache.protocol.greeting import greet, receive_hello, send
from async_cache.protocol.messages import VERSION, Done, Failed, Hello, Ping, Welcome, encode

HELLO = Hello(VERSION, "a token", "namespace")
WELCOME = Welcome(VERSION, 4096, True, True, 60.0)


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends; the test leaves no more descriptors than it found."""
    before = descriptors()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()
    assert descriptors() <= before


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create("memory")
    yield descriptor
    os.close(descriptor)


def same_file(one: int, other: int) -> bool:
    return os.path.sameopenfile(one, other)


async def heard(sock: socket.socket) -> tuple[Hello, int | None]:
    async with asyncio.timeout(60):
        return await receive_hello(sock)


async def test_a_greeting_that_is_cut_anywhere_is_heard(pair: Any, memory: int) -> None:
    ours, theirs = pair
    data = frame(encode(HELLO))
    for place in range(1, len(data)):
        hearing = asyncio.create_task(heard(theirs))
        socket.send_fds(ours, [data[:place]], [memory])
        await asyncio.sleep(0)  # it has what there is, and waits for the rest
        ours.send(data[place:])
        hello, descriptor = await hearing
        assert hello == HELLO and descriptor is not None and same_file(descriptor, memory)
        os.close(descriptor)


async def test_a_greeting_that_comes_byte_by_byte_is_heard(pair: Any) -> None:
    ours, theirs = pair
    data = frame(encode(HELLO))
    hearing = asyncio.create_task(heard(theirs))
    for begin, end in pairwise(range(len(data) + 1)):
        ours.send(data[begin:end])
        await asyncio.sleep(0)
    assert await hearing == (HELLO, None)


async def test_not_a_byte_behind_a_greeting_is_taken(pair: Any) -> None:
    ours, theirs = pair
    ours.send(frame(encode(HELLO)) + frame(encode(Ping(1))))
    assert await heard(theirs) == (HELLO, None)
    assert theirs.recv(100) == frame(encode(Ping(1)))


@pytest.mark.parametrize("size", [0, MAX_GREETING_BYTES + 1, 2**31, 2**32 - 1])
async def test_a_greeting_that_is_too_large_is_refused_as_soon_as_its_length_is_known(
    pair: Any, memory: int, size: int
) -> None:
    ours, theirs = pair
    socket.send_fds(ours, [size.to_bytes(4, "little")], [memory])
    with pytest.raises(ProtocolError, match=f"{size} bytes"):
        await heard(theirs)


@pytest.mark.parametrize("payload", [encode(Ping(1)), encode(WELCOME), b"\xc0", b"GET / HTTP/1.1\r\n\r\n", bytes(4096)])
async def test_what_is_no_greeting_is_refused(pair: Any, memory: int, payload: bytes) -> None:
    ours, theirs = pair
    socket.send_fds(ours, [frame(payload)], [memory])
    with pytest.raises(ProtocolError, match="not a message"):
        await heard(theirs)


@pytest.mark.parametrize("sent_bytes", [0, 1, 4, 9])
async def test_a_peer_that_goes_before_it_has_said_hello_is_lost(pair: Any, memory: int, sent_bytes: int) -> None:
    ours, theirs = pair
    if sent_bytes:
        socket.send_fds(ours, [frame(encode(HELLO))[:sent_bytes]], [memory])
    ours.close()
    with pytest.raises(ConnectionLostError):
        await heard(theirs)


async def test_whoever_gives_up_waiting_for_a_greeting_keeps_no_descriptor(pair: Any, memory: int) -> None:
    ours, theirs = pair
    socket.send_fds(ours, [frame(encode(HELLO))[:9]], [memory])
    hearing = asyncio.create_task(heard(theirs))
    await all_taken(theirs)
    hearing.cancel()
    with suppress(asyncio.CancelledError):
        await hearing
    assert hearing.cancelled()


async def all_taken(sock: socket.socket) -> None:
    """Return when all that was sent to a socket was received there."""
    with suppress(BlockingIOError):
        while sock.recv(1, socket.MSG_PEEK):  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)


async def test_surplus_descriptors_are_closed_whether_they_come_together_or_one_by_one(pair: Any, memory: int) -> None:
    ours, theirs = pair
    before = descriptors()
    data = frame(encode(HELLO))
    socket.send_fds(ours, [data[:1]], [memory] * 5)
    for begin, end in pairwise(range(1, len(data) + 1)):
        socket.send_fds(ours, [data[begin:end]], [memory])
    hello, descriptor = await heard(theirs)
    assert hello == HELLO and descriptor is not None
    os.close(descriptor)
    assert descriptors() == before


@pytest.mark.parametrize("who", ["server", "client"])
async def test_a_greeting_whose_descriptor_the_system_drops_is_refused(pair: Any, memory: int, who: str) -> None:
    ours, theirs = pair
    await send(theirs if who == "client" else ours, WELCOME if who == "client" else HELLO, memory)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(memory)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        with pytest.raises(LimitError, match="dropped"):
            await (greet(ours, HELLO, None) if who == "client" else heard(theirs))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_surplus_descriptors_do_not_pile_up_while_a_greeting_comes(pair: Any, memory: int) -> None:
    ours, theirs = pair
    before = descriptors()
    data = frame(encode(Hello(VERSION, "x" * 900)))
    hearing = asyncio.create_task(heard(theirs))
    most = 0
    for begin, end in pairwise(range(500)):
        socket.send_fds(ours, [data[begin:end]], [memory])
        await all_taken(theirs)
        most = max(most, descriptors() - before)
    ours.send(data[499:])
    _, descriptor = await hearing
    assert descriptor is not None
    os.close(descriptor)
    assert most < 10


async def test_a_descriptor_that_was_passed_is_not_inherited(pair: Any, memory: int) -> None:
    ours, theirs = pair
    await send(ours, HELLO, memory)
    _, descriptor = await heard(theirs)
    assert descriptor is not None and fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(descriptor)


async def test_both_ends_greet_each_other_and_pass_what_they_have(pair: Any, memory: int) -> None:
    ours, theirs = pair
    greeting = asyncio.create_task(greet(ours, HELLO, memory))
    hello, segment = await heard(theirs)
    await send(theirs, WELCOME, memory)
    welcome, arena = await greeting
    assert (hello, welcome) == (HELLO, WELCOME)
    assert segment is not None and arena is not None and same_file(segment, arena)
    os.close(segment)
    os.close(arena)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Failed(0, "access_denied", "no"), AccessDeniedError),
        (Failed(0, "protocol", "no"), ProtocolError),
        (Failed(0, "cache_closed", "no"), ConnectionLostError),
        (Failed(0, "value", "no"), ConnectionLostError),
        (Failed(0, "of a later version", "no"), Exception),
        (Done(1), ProtocolError),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
async def test_a_client_that_is_refused_raises_why_and_keeps_no_descriptor(
    pair: Any, memory: int, answer: Any, error: type[Exception], beside: bool
) -> None:
    ours, theirs = pair
    await send(theirs, answer, memory if beside else None)
    with pytest.raises(error):
        await greet(ours, HELLO, None)


async def test_a_welcome_whose_memory_did_not_come_is_refused(pair: Any) -> None:
    ours, theirs = pair
    await send(theirs, WELCOME)
    with pytest.raises(ProtocolError, match="memory"):
        await greet(ours, HELLO, None)
