"""Values on their way: a GET fills the buffer of its object, a SET leaves from it, verified as the bytes pass.

What arrives is hashed as it arrives, STEP_BYTES at a time, while it is in the processor's cache: five times as fast.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from enum import Enum

from xxhash import xxh3_64

from async_cache.errors import BackendError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.record import TRAILER_BYTES, is_trailer, write_trailer
from async_cache.l2.valkey.items import Item
from async_cache.l2.valkey.replies import Lines
from async_cache.l2.valkey.wire import Wire

STEP_BYTES = 256 * 1024
SEND_BYTES = 256 * 1024  # to send costs more than to receive: on one machine, it does the receiver's work
SCRATCH_BYTES = 16 * 1024  # what a read between two bodies may take of the next one, and copy
WINDOW_BYTES = 4 * 2**20  # asked for and not there yet, of one connection: what a server keeps for a slow client
WINDOW_OBJECTS = 256
ASKING = b"*1\r\n$6\r\nASKING\r\n"

_LOADED, _GONE, _CORRUPT, _FAILED = LoadOutcome


class _Part(Enum):
    """HEADER -> BODY -> TRAILER -> HEADER, or HEADER -> REST -> HEADER where nobody wants the value."""

    HEADER = "header"
    BODY = "body"
    TRAILER = "trailer"
    REST = "rest"


_HEADER, _BODY, _TRAILER, _REST = _Part


class Values:
    """Reads the values of objects into their buffers, and asks for them in time: see `Reader`.

    `todo` may be shared with other connections: whoever is faster takes more. An object whose buffer was touched has
    an outcome when this is done; if the connection is lost, it has none.
    """

    def __init__(self, wire: Wire, todo: Iterator[Item], asking: bool):
        self.done: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._wire = wire
        self._todo = todo
        self._asking = asking
        self._asked: deque[Item] = deque()
        self._asked_bytes = 0
        self._scratch = bytearray(SCRATCH_BYTES)
        self._view = memoryview(self._scratch)
        self._end = 0  # of what is in it
        self._part = _HEADER
        self._body = memoryview(b"")
        self._at = 0  # how much of the body is there
        self._left = 0  # bytes of the body, or of the rest, that are still to come
        self._digest = xxh3_64()

    async def run(self) -> None:
        """Ask for objects until nothing is left to do. Raises BackendError where the connection is lost."""
        self._wire.read_with(self)
        self._ask()
        await self._wire.finish()

    def _ask(self) -> None:
        """Ask for as much as the window has room for, two objects at least."""
        commands = []
        while len(self._asked) < 2 or (self._asked_bytes < WINDOW_BYTES and len(self._asked) < WINDOW_OBJECTS):
            item = next(self._todo, None)
            if item is None:
                break
            if self._asking:
                commands.append(ASKING)
            commands.append(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(item.name), item.name))
            self._asked.append(item)
            self._asked_bytes += len(item.buffer)
        if commands:
            self._wire.expect(WINDOW_BYTES)
            self._wire.send((b"".join(commands),))
        elif not self._asked:
            self.done.set_result(None)

    def buffer(self) -> memoryview:
        if self._part is _BODY:
            return self._body[self._at : self._at + STEP_BYTES]
        return self._view[self._end :]

    def received(self, count: int) -> None:
        if self._part is _BODY:
            begin = self._at
            self._at = end = begin + count
            self._digest.update(self._body[begin:end])
            if end == len(self._body):
                self._part = _TRAILER
            return
        self._end += count
        begin = self._parse()
        if begin:
            left = self._end - begin
            self._view[:left] = self._view[begin : self._end]
            self._end = left

    def _parse(self) -> int:
        """Parse what is in the scratch, and say how far it got."""
        begin = 0
        while begin < self._end and self._part is not _BODY:
            if self._part is _HEADER:
                line_end = self._scratch.find(b"\r\n", begin, self._end)
                if line_end < 0:
                    if self._end - begin > SCRATCH_BYTES // 2:
                        raise BackendError("what the server says is not RESP: a line has no end")
                    break
                line = bytes(self._view[begin:line_end])
                begin = line_end + 2
                self._read_header(line)
                if self._part is _BODY:
                    begin += self._begin_body(self._view[begin : self._end])
            elif self._part is _REST:
                skipped = min(self._left, self._end - begin)
                begin += skipped
                self._left -= skipped
                if not self._left:
                    self._end_of(self._asked[0], _CORRUPT)
            else:
                if self._end - begin < TRAILER_BYTES + 2:
                    break
                self._read_trailer(self._view[begin : begin + TRAILER_BYTES + 2])
                begin += TRAILER_BYTES + 2
        return begin

    def _read_header(self, line: bytes) -> None:
        if not self._asked:
            raise BackendError("the server said more than it was asked")
        item = self._asked[0]
        if line == b"+OK" and self._asking:
            return
        if line[:1] == b"-":
            self._read_error(item, line)
            return
        try:
            if line[:1] != b"$":
                raise ValueError
            size_bytes = int(line[1:])
        except ValueError:
            raise BackendError(f"what the server says is not the value of a key: {line[:20]!r}") from None
        if item.may_be_shorter and TRAILER_BYTES <= size_bytes < len(item.buffer) + TRAILER_BYTES:
            self._asked_bytes -= len(item.buffer) + TRAILER_BYTES - size_bytes
            item.buffer = item.buffer[: size_bytes - TRAILER_BYTES]
        if size_bytes < 0:
            self._end_of(item, _GONE)
        elif size_bytes != len(item.buffer) + TRAILER_BYTES:
            self._part, self._left = _REST, size_bytes + 2
        else:
            self._part, self._body, self._at = _BODY, item.buffer, 0
            self._digest.reset()

    def _read_error(self, item: Item, line: bytes) -> None:
        if line.startswith(b"-WRONGTYPE"):  # something else has its name
            self._end_of(item, _CORRUPT)
        else:
            item.fail(line)
            self._end_of(item, _FAILED)

    def _begin_body(self, there: memoryview) -> int:
        """Take what has come along with the header."""
        count = self._at = min(len(there), len(self._body))
        self._body[:count] = there[:count]
        self._digest.update(self._body[:count])
        if count == len(self._body):
            self._part = _TRAILER
        return count

    def _read_trailer(self, tail: memoryview) -> None:
        item = self._asked[0]
        if bytes(tail[TRAILER_BYTES:]) != b"\r\n":
            raise BackendError("what the server says is not RESP: a value has no end")
        whole = is_trailer(tail, item.key, len(item.buffer), self._digest.intdigest())
        self._end_of(item, _LOADED if whole else _CORRUPT)

    def _end_of(self, item: Item, outcome: LoadOutcome) -> None:
        item.outcome = outcome
        if outcome is _LOADED and item.told is not None:
            item.told()
        self._part, self._body = _HEADER, memoryview(b"")
        self._asked.popleft()
        self._asked_bytes -= len(item.buffer)
        if len(self._asked) < 2 or (self._asked_bytes <= WINDOW_BYTES // 2 and len(self._asked) <= WINDOW_OBJECTS // 2):
            self._ask()


async def store(wire: Wire, item: Item, ttl_milliseconds: int | None, asking: bool) -> bytes:
    """Store an object, unless it is there, and return the reply: OK, nothing, or an error. Raises BackendError.

    The checksum stands behind the body, so that both are read once. Until its last byte has arrived, a server does
    nothing: the object appears whole or not at all.
    """
    size_bytes = len(item.buffer)
    before = [] if not asking else [ASKING]
    options = [b"$2\r\nNX\r\n"]
    if ttl_milliseconds is not None:
        text = b"%d" % ttl_milliseconds
        options.append(b"$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(text), text))
    arguments = 3 + len(options) + (ttl_milliseconds is not None)
    before.append(b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n" % (arguments, len(item.name), item.name))
    before.append(b"$%d\r\n" % (size_bytes + TRAILER_BYTES))
    lines = Lines(1 + asking)
    wire.read_with(lines)
    wire.send((b"".join(before),))
    digest = xxh3_64()
    for begin in range(0, size_bytes, SEND_BYTES):
        part = item.buffer[begin : begin + SEND_BYTES]
        digest.update(part)
        wire.send((part,))
        await wire.drained()
    trailer = bytearray(TRAILER_BYTES)
    write_trailer(trailer, item.key, size_bytes, digest.intdigest())
    wire.send((bytes(trailer) + b"\r\n" + b"".join(options),))
    await wire.finish()
    return lines.lines[-1]
