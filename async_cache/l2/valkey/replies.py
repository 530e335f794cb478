"""The protocol of Valkey and Redis, RESP version 2: https://valkey.io/topics/protocol/. Pure: bytes in, replies out."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from async_cache.errors import BackendError

SCRATCH_BYTES = 16 * 1024
MAX_LINE_BYTES = 1024  # on the average of a reply of several lines
MAX_REPLY_BYTES = 64 * 2**20
MAX_DEPTH = 8  # of arrays in arrays

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
        redirect = Redirect(int(slot), host.strip("[]"), int(port), kind == "-MOVED")
    except ValueError:
        return None
    return redirect if is_port(redirect.port) else None


def is_port(number: int) -> bool:
    """Whether one can connect to it: with 0, a host would be taken for the path of a Unix socket."""
    return 0 < number < 65536


def number_of(line: bytes) -> int | None:
    """A reply that is a number; None if it is something else. Raises BackendError for what is neither."""
    if line[:1] != b":":
        return None
    try:
        return int(line[1:])
    except ValueError:
        raise BackendError(f"what the server says is not RESP: {line[:20]!r}") from None


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
        if found > self._count or len(self._data) > MAX_LINE_BYTES * self._count + SCRATCH_BYTES:
            raise BackendError("the server said more than it was asked")
        if found == self._count and self._data.endswith(b"\r\n"):
            self.lines = bytes(self._data).split(b"\r\n")[:-1]
            self.done.set_result(None)


class Tree:
    """Reads one reply of any shape."""

    def __init__(self) -> None:
        self.done: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.reply: Reply = None
        self._at = 0  # how far it is parsed: each part once, however many pieces it comes in
        self._open: list[tuple[list[Reply], int]] = []  # arrays that are not complete yet, and how long they will be
        self._data = bytearray()
        self._scratch = bytearray(SCRATCH_BYTES)

    def buffer(self) -> memoryview:
        return memoryview(self._scratch)

    def received(self, count: int) -> None:
        self._data += memoryview(self._scratch)[:count]
        if len(self._data) > MAX_REPLY_BYTES:
            raise BackendError("the reply has no end")
        while not self.done.done() and (part := self._next()) is not None:
            value, length = part
            if length is not None:
                if len(self._open) == MAX_DEPTH:
                    raise BackendError("the reply is too deep")
                self._open.append(([], length))
            else:
                self._add(value)
            while self._open and len(self._open[-1][0]) == self._open[-1][1]:
                self._add(self._open.pop()[0])

    def _add(self, value: Reply) -> None:
        if self._open:
            self._open[-1][0].append(value)
        else:
            self._finish(value)

    def _finish(self, reply: Reply) -> None:
        if self._at != len(self._data):
            raise BackendError("the server said more than it was asked")
        self.reply = reply
        self.done.set_result(None)

    def _next(self) -> tuple[Reply, int | None] | None:
        """The next value, or the length of an array that begins; None if more is to come. Raises BackendError."""
        end = self._data.find(b"\r\n", self._at, self._at + SCRATCH_BYTES)
        if end < 0:
            if len(self._data) - self._at > SCRATCH_BYTES:
                raise BackendError("what the server says is not RESP: a line has no end")
            return None
        kind, text, end = bytes(self._data[self._at : self._at + 1]), bytes(self._data[self._at + 1 : end]), end + 2
        if kind == b"-":
            raise BackendError(text.decode(errors="replace"))
        if kind == b"+":
            self._at = end
            return text, None
        try:
            number = int(text)
        except ValueError:
            raise BackendError(f"what the server says is not RESP: {text[:20]!r}") from None
        if kind not in (b":", b"$", b"*"):
            raise BackendError(f"what the server says is not RESP: {kind!r}")
        if kind == b":" or number < 0:
            self._at = end
            return (number if kind == b":" else None), None
        if kind == b"*":
            self._at = end
            return None, number
        if len(self._data) < end + number + 2:
            return None
        self._at = end + number + 2
        return bytes(self._data[end : end + number]), None


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
