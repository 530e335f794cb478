"""What the tests of the service share: what is held, waiting for something to come true, and a peer that only does
what it is told."""

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from contract.support import make_layout

from async_cache import CacheClient, CacheStats, ConnectionLostError, ObjectGroup
from async_cache.prompt.layout import ModelLayout
from async_cache.protocol import messages
from async_cache.protocol.address import Address
from async_cache.protocol.frames import FrameReader, frame
from async_cache.protocol.messages import VERSION, Decoder, Hello, Welcome, encode
from async_cache.protocol.prompts import describe

from .programs import ServerProcess

HELD = ("requests", "leases", "leased_bytes", "reserved_bytes", "quarantined_bytes")
NOTHING = dict.fromkeys(HELD, 0)
MIB = 2**20
BIG = make_layout(ObjectGroup((MIB,), "uint8"))

_welcome_decoder = Decoder(Welcome | messages.Failed)
_answer_decoder = Decoder(messages.Answer)


def held(stats: CacheStats) -> dict[str, int]:
    return {name: getattr(stats, name) for name in HELD}


async def wait_until(ask: Callable[[], Awaitable[bool]], seconds: float = 60) -> float:
    """Ask until the answer is yes; the seconds that it took."""
    began = time.monotonic()
    while not await ask():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        await asyncio.sleep(0)
    return time.monotonic() - began


async def given_back(cache: CacheClient, wanted: dict[str, int] = NOTHING, seconds: float = 60) -> float:
    """Wait until this, and no more, is held; the seconds that it took. Each question is a round trip."""
    now: dict[str, int] = {}

    async def is_it() -> bool:
        now.update(held(await cache.stats()))
        return now == wanted

    try:
        return await wait_until(is_it, seconds)
    except AssertionError as error:
        raise AssertionError(f"{now} is held") from error


async def descriptors_given_back(served: ServerProcess, cache: CacheClient, wanted: int) -> None:
    """Wait until the server has no more descriptors than that."""

    async def are_they() -> bool:
        await cache.ping()
        return served.descriptors() <= wanted

    await wait_until(are_they)


async def reconnected(cache: CacheClient, seconds: float = 60) -> None:
    """Wait until a client has a connection again; each failed call has waited for the next attempt to connect."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(ConnectionLostError):
            await cache.ping()
            return
        assert time.monotonic() < deadline


class Peer:
    """A client on the bare socket, which says hello, and then only sends and receives what it is told to."""

    def __init__(self, url: str, *, token: str | None = None, segment: int | None = None, hello: bool = True):
        address = Address.parse(url)
        self.socket = socket.socket(socket.AF_UNIX if address.path else socket.AF_INET)
        self.socket.settimeout(10)
        self.socket.connect(address.path or (address.host, address.port))
        self.numbers = iter(range(1, 2**40))
        self.arena_fd: int | None = None
        self._frames = FrameReader()
        if hello:
            self._greet(frame(encode(Hello(VERSION, token))), segment)

    def _greet(self, hello: bytes, segment: int | None) -> None:
        if segment is not None:
            socket.send_fds(self.socket, [hello], [segment])
        else:
            self.socket.sendall(hello)
        if self.socket.family == socket.AF_UNIX:
            header, descriptors, _, _ = socket.recv_fds(self.socket, 4, 1)
        else:
            header, descriptors = self.socket.recv(4, socket.MSG_WAITALL), []
        self.arena_fd = descriptors[0] if descriptors else None
        payload = self.socket.recv(int.from_bytes(header, "little"), socket.MSG_WAITALL)
        self.welcome = _welcome_decoder.decode(payload)

    def number(self) -> int:
        return next(self.numbers)

    def register(self, layout: ModelLayout) -> None:
        """As number 0."""
        self.send(messages.RegisterLayout(self.number(), 0, describe(layout)))

    def send(self, *sent: messages.Message) -> None:
        """In one piece."""
        self.socket.sendall(b"".join(frame(encode(message)) for message in sent))

    def answers(self, count: int) -> list[Any]:
        """The next so many; more that came with them are lost."""
        got: list[Any] = []
        while len(got) < count:
            data = self.socket.recv(MIB)
            if not data:
                raise EOFError(f"the connection ended after {got}")
            # what a message refers to is only valid until the next: a copy is not
            got += [_answer_decoder.decode(bytes(payload)) for payload in self._frames.feed(data)]
        return got

    def close(self) -> None:
        self.socket.close()
        if self.arena_fd is not None:
            os.close(self.arena_fd)
            self.arena_fd = None

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
