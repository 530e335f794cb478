"""The protocol of Valkey and Redis, RESP version 2: https://valkey.io/topics/protocol/. Pure: bytes in, replies out."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from async_cache.errors import BackendError

SCRATCH_BYTES = 16 * 1024
MAX_REPLY_BYTES = 64 * 2**20

Reply = bytes | int | None | list["Reply"]
"""Text, a number, nothing, or an array of these; an error is a BackendError that is raised."""


class Redirect(NamedTuple):
    """Where a cluster says that a slot is: for good (MOVED), or for the next command only (ASK)."""

    slot: int
    host: str  # "": the host that said so
    port: int
    is_moved: bool


def command(*arguments: bytes | str | int) -> bytes:
    """A command and its arguments, as they are sent."""
    encoded = [argument if isinstance(argument, bytes) else str(argument).encode() for argument in arguments]
    return b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in encoded)


def parse_redirect(line: bytes) -> Redirect | None:
    """What an error of one line, such as `-MOVED 3999 127.0.0.1:6381`, redirects to; None if it does not."""
    if not line.startswith((b"-MOVED ", b"-ASK ")):
        return None
    try:
        kind, slot, address = line.decode().split()
        host, _, port = address.rpartition(":")
        return Redirect(int(slot), host.strip("[]"), int(port), kind == "-MOVED")
    except ValueError:
        return None


class Lines:
    """Reads a known number of replies of one line each: numbers, OK, errors, and nothing (`$-1`)."""

    def __init__(self, count: int):
        self.done: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.lines: list[bytes] = []
        self._count = count
        self._data = bytearray()
        self._scratch = bytearray(SCRATCH_BYTES)

    def buffer(self) -> memoryview:
        return memoryview(self._scratch)

    def received(self, count: int) -> None:
        self._data += memoryview(self._scratch)[:count]
        found = self._data.count(b"\r\n")
        if found > self._count or len(self._data) > MAX_REPLY_BYTES:
            raise BackendError("the server said more than it was asked")
        if found == self._count and self._data.endswith(b"\r\n"):
            self.lines = bytes(self._data).split(b"\r\n")[:-1]
            self.done.set_result(None)


class Tree:
    """Reads one reply of any shape."""

    def __init__(self) -> None:
        self.done: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.reply: Reply = None
        self._data = bytearray()
        self._scratch = bytearray(SCRATCH_BYTES)

    def buffer(self) -> memoryview:
        return memoryview(self._scratch)

    def received(self, count: int) -> None:
        self._data += memoryview(self._scratch)[:count]
        if len(self._data) > MAX_REPLY_BYTES:
            raise BackendError("the reply has no end")
        try:
            self.reply, end = _parse(self._data, 0)
        except IndexError:
            return  # more is to come
        except ValueError as error:
            raise BackendError(f"what the server says is not RESP: {error}") from error
        if end != len(self._data):
            raise BackendError("the server said more than it was asked")
        self.done.set_result(None)


def _parse(data: bytearray, begin: int) -> tuple[Reply, int]:
    """The reply that begins there, and where it ends. Raises IndexError if there is more of it to come."""
    end = data.find(b"\r\n", begin)
    if end < 0:
        raise IndexError
    kind, text, end = data[begin : begin + 1], bytes(data[begin + 1 : end]), end + 2
    if kind == b"-":
        raise BackendError(text.decode(errors="replace"))
    if kind == b"+":
        return text, end
    number = int(text)
    if kind == b":":
        return number, end
    if number < 0:
        return None, end
    if kind == b"$":
        if len(data) < end + number + 2:
            raise IndexError
        return bytes(data[end : end + number]), end + number + 2
    if kind != b"*":
        raise ValueError(bytes(kind))
    items: list[Reply] = []
    for _ in range(number):
        item, end = _parse(data, end)
        items.append(item)
    return items, end


def text_of(reply: Reply) -> str:
    """A reply that is text. Raises BackendError."""
    if not isinstance(reply, bytes):
        raise BackendError(f"the server answered {type(reply).__name__} where text was expected")
    return reply.decode(errors="replace")


def items_of(reply: Reply) -> Sequence[Reply]:
    """A reply that is an array. Raises BackendError."""
    if not isinstance(reply, list):
        raise BackendError(f"the server answered {type(reply).__name__} where an array was expected")
    return reply
