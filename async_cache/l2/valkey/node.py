"""One server: its connections, and that it is left alone for a moment where there is none."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from async_cache.errors import BackendError, ConfigError
from async_cache.l2.valkey.replies import command
from async_cache.l2.valkey.settings import Address, Settings
from async_cache.l2.valkey.wire import Wire

FIRST_WAIT_SECONDS = 0.05  # after a connection could not be made; twice as much after the next one
LONGEST_WAIT_SECONDS = 0.5
COMMAND_CONNECTIONS = 4  # for what is short, so that it does not wait for what is long
CLOSE_SECONDS = 1.0

_CREDENTIALS = ("WRONGPASS", "NOAUTH", "NOPERM", "ERR AUTH", "ERR invalid password", "ERR Client sent AUTH")


class RefusedError(BackendError, ConfigError):
    """The server does not let us in, or is not what the URL says: it will not heal by itself."""


class Pool:
    """Connections of one kind to a server, at most `limit` of them, each for one call at a time."""

    def __init__(self, node: "Node", limit: int):
        self._node = node
        self._idle: list[Wire] = []
        self._turn = asyncio.Semaphore(limit)
        self._limit = limit
        self._out = 0
        self.wires: set[Wire] = set()
        """All that are not closed yet."""

    @property
    def free(self) -> int:
        """How many more calls would get a connection at once."""
        return self._limit - self._out

    @asynccontextmanager
    async def wire(self) -> AsyncIterator[Wire]:
        """A connection of one's own. It is closed if what is done with it raises or is cancelled.

        Raises BackendError where there is none to be had.
        """
        async with self._turn:
            self._out += 1
            try:
                wire = self._take() or await self._dial()
                try:
                    yield wire
                except BaseException:
                    wire.abort()
                    raise
                if wire.is_open:
                    self._idle.append(wire)
            finally:
                self._out -= 1

    def _take(self) -> Wire | None:
        while self._idle:
            wire = self._idle.pop()
            if wire.is_open:
                return wire
        return None

    async def _dial(self) -> Wire:
        wire = await self._node.dial()
        self.wires.add(wire)
        wire.ended.add_done_callback(lambda _: self.wires.discard(wire))
        return wire

    def abort(self) -> None:
        """Close all connections at once."""
        for wire in list(self.wires):
            wire.abort()

    def retire(self) -> None:
        """Close those that no call has."""
        while self._idle:
            self._idle.pop().abort()


class Node:
    """One server of a backend. `bulk` connections carry values, `commands` what is short."""

    def __init__(self, settings: Settings, address: Address):
        self.address = address
        self.name = f"{settings.name} at {address}" if settings.is_cluster else settings.name
        self._settings = settings
        self.bulk = Pool(self, settings.connections)
        self.commands = Pool(self, COMMAND_CONNECTIONS)
        self._wait_seconds = 0.0  # 0: the last connection could be made
        self._retry_at = 0.0
        self._why: BackendError | None = None
        self._closed = False

    async def ask(self, verbs: Sequence[bytes], names: Sequence[bytes], asking: bool = False) -> list[bytes]:
        """The replies, of one line each, to each verb about each name: those about the first name come first.

        Raises BackendError.
        """
        before = command("ASKING") if asking else b""
        heads = [b"%b*2\r\n$%d\r\n%b\r\n" % (before, len(verb), verb) for verb in verbs]
        commands = b"".join([b"%b$%d\r\n%b\r\n" % (head, len(name), name) for name in names for head in heads])
        async with self.commands.wire() as wire:
            lines = await wire.ask(commands, len(names) * len(verbs) * (2 if asking else 1))
        return lines[1::2] if asking else lines

    async def dial(self) -> Wire:
        """A new connection, authenticated. Raises BackendError, at once where the last attempt has just failed."""
        loop = asyncio.get_running_loop()
        if self._closed:
            raise BackendError(f"{self.name} is closed")
        if self._why is not None:
            if loop.time() < self._retry_at:
                raise type(self._why)(*self._why.args)
            self._put_off(loop.time() + self._settings.connect_timeout_seconds)  # one tries, for all
        try:
            wire = await self._dial()
        except BaseException as error:
            if isinstance(error, BackendError):
                self._why = error
            self._put_off(loop.time())
            raise
        self._wait_seconds, self._why = 0.0, None
        if self._closed:
            wire.abort()
            raise BackendError(f"{self.name} is closed")
        return wire

    def _put_off(self, now: float) -> None:
        self._wait_seconds = min(max(2 * self._wait_seconds, FIRST_WAIT_SECONDS), LONGEST_WAIT_SECONDS)
        self._retry_at = now + self._wait_seconds

    async def _dial(self) -> Wire:
        settings, address = self._settings, self.address
        loop = asyncio.get_running_loop()
        wire = Wire(self.name)
        try:
            async with asyncio.timeout(settings.connect_timeout_seconds):
                if address.port:
                    await loop.create_connection(lambda: wire, address.host, address.port, ssl=settings.tls)
                else:
                    await loop.create_unix_connection(lambda: wire, address.host)
                await self._greet(wire)
        except TimeoutError as error:
            wire.abort()
            raise BackendError(f"{self.name}: no answer within {settings.connect_timeout_seconds:g} s") from error
        except ssl.SSLCertVerificationError as error:
            wire.abort()
            raise RefusedError(f"{self.name}: {error.verify_message}") from error
        except (OSError, UnicodeError) as error:  # the latter for a name that can be none of a host
            wire.abort()
            raise BackendError(f"{self.name}: {getattr(error, 'strerror', None) or error}") from error
        except BaseException:
            wire.abort()
            raise
        return wire

    async def _greet(self, wire: Wire) -> None:
        """Say who we are. What the server answers to PING is whether it can be used."""
        settings = self._settings
        greetings = []
        password = settings.password
        if settings.password_file is not None:
            password = await asyncio.to_thread(_read_password, settings.password_file)
        if password is not None:
            user = [settings.username] if settings.username is not None else []
            greetings.append(command("AUTH", *user, password))
        if settings.database:
            greetings.append(command("SELECT", settings.database))
        greetings.append(command("PING"))
        for line, greeting in zip(await wire.ask(b"".join(greetings), len(greetings)), greetings, strict=True):
            if line[:1] == b"-":
                said = line[1:].decode(errors="replace")
                if b"AUTH" in greeting and not said.startswith(_CREDENTIALS):  # it may quote what it was told
                    said = "the server does not understand AUTH"
                kind = RefusedError if said.startswith((*_CREDENTIALS, "ERR DB index")) else BackendError
                raise kind(f"{self.name}: {said}")

    def retire(self) -> None:
        """Close what nobody uses: the server is no longer one of those that matter."""
        for pool in (self.bulk, self.commands):
            pool.retire()

    async def close(self) -> None:
        """Close all connections, those in use first of all; idempotent."""
        self._closed = True
        wires = self.bulk.wires | self.commands.wires
        for wire in wires:
            wire.abort()
        if wires:
            await asyncio.wait([wire.ended for wire in wires], timeout=CLOSE_SECONDS)


def _read_password(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise BackendError(f"the password cannot be read from {path}: {error}") from error
