"""`Server`: accepts connections, and ends them."""

import asyncio
import dataclasses
import logging
import os
import socket
import ssl
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import Enum
from types import TracebackType
from typing import Any, Self

from async_cache.aio.slices import turn, working_for
from async_cache.cache import AsyncCache
from async_cache.config import ServerConfig, prefixed
from async_cache.errors import (
    AccessDeniedError,
    AsyncCacheError,
    CacheClosedError,
    ConfigError,
    ConnectionLostError,
    LimitError,
    ProtocolError,
)
from async_cache.prompt.keys import check_label
from async_cache.protocol.address import Address
from async_cache.protocol.greeting import check_byte_order, peer_process, receive_hello, send
from async_cache.protocol.messages import NEWER, VERSION, Hello, Welcome, failed
from async_cache.protocol.partials import Partials
from async_cache.protocol.secured import Secured
from async_cache.recording.recording import Recording
from async_cache.server.access import Access, Pass, Tenant, pass_of
from async_cache.server.accounts import Account, Accounts
from async_cache.server.apart import tell_apart
from async_cache.server.deletions import ModelDeletions
from async_cache.server.door import Door, fitting_connections
from async_cache.server.layouts import SharedLayouts
from async_cache.server.listener import Listener
from async_cache.server.partials import TenantPartials
from async_cache.server.prefetches import Holders
from async_cache.server.probe import Probe
from async_cache.server.segment import ClientSegment
from async_cache.server.session import Session
from async_cache.server.shared import Shared
from async_cache.server.turns import Turns

log = logging.getLogger(__name__)

_COPIERS = 2
_MAKERS = 1  # what they do holds the interpreter: more of them would take no less time
_QUIET_SECONDS = 60.0  # after what may happen ten times a second
_RETRY_SECONDS = 0.1  # where there are no file descriptors left, for one
_THE_DOOR = "\0door"  # has turns of its own, as a tenant has
_CHANGED = "the token was removed, or its rights were changed"
_TELL_SECONDS = 0.5  # for the open connections to take their last message
_KEEPALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}


class ServerState(Enum):
    """NEW -> LISTENING -> CLOSED; a new one may be closed at once."""

    NEW = "new"
    LISTENING = "listening"
    CLOSED = "closed"


class Server:
    """A server of a cache that is open, by `async with`, or by `open` and `close`; its states are in `ServerState`.

    It listens where its settings say, or where it is `given` sockets, there.
    """

    def __init__(self, cache: AsyncCache, config: ServerConfig, given: Sequence[Listener] = ()):
        self._state = ServerState.NEW
        self._cache = cache
        self._config = config
        self._access = Access(config.tenants)
        self._partials = Partials(config.stall_timeout_seconds)
        self._partials_by_tenant: dict[str, TenantPartials] = {}
        self._shared = Shared(
            cache,
            config,
            Holders.of(cache),
            SharedLayouts(),
            ThreadPoolExecutor(_COPIERS, thread_name_prefix="copy"),
            ThreadPoolExecutor(_MAKERS, thread_name_prefix="make"),
            self._partials_of,
            self._reload,
            lambda: self.probe.recent if self.probe is not None else None,
            Turns(),
            Accounts(config.tenant_limits(), cache),
            ModelDeletions(cache.core),
        )
        if config.tenants:
            tell_apart(cache.core, config)
        self.recording = Recording(cache.core.observers)
        """Of the requests, where the settings want that."""
        self._listeners: list[Listener] = []
        self._given = given
        self._sessions: set[Session] = set()
        self._passes: weakref.WeakKeyDictionary[Session, Pass] = weakref.WeakKeyDictionary()
        self._entering = 0  # clients that have said hello, and wait to be let in
        self._door = Door(fitting_connections(config.max_connections))
        self._tasks: set[asyncio.Task[None]] = set()
        self._readable = os.open(f"/proc/self/fd/{cache.core.arena.fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._closing: asyncio.Task[None] | None = None
        self.probe: Probe | None = None
        """Looks for what holds the loop, where somebody has it do so."""
        self.reload: Callable[[], Awaitable[tuple[list[str], list[str]]]] | None = None
        """Reads the settings anew, where there is somebody who knows how: which are changed, and which wait."""

    @property
    def access(self) -> Access:
        """Who may connect, and so may ask by another way, too."""
        return self._access

    @property
    def deletions(self) -> ModelDeletions:
        """Who deletes whole models, for those who ask by another way, too."""
        return self._shared.deletions

    @property
    def is_listening(self) -> bool:
        """Whether clients can connect."""
        return self._state is ServerState.LISTENING

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._sessions)

    @property
    def addresses(self) -> list[Address]:
        """The addresses that it listens at; a port 0 has become a real one."""
        return [listener.address for listener in self._listeners]

    @property
    def accounts(self) -> Accounts:
        """What the tenants have, each against its limits."""
        return self._shared.accounts

    def reconfigure(self, config: ServerConfig) -> None:
        """Go by other settings from now on, as far as they are live.

        Connections whose token is gone, or has other rights by now, end; the others keep their `max_requests`
        and `max_message_objects`.
        """
        self._config = config
        self._door.max_connections = fitting_connections(config.max_connections)
        self._access.replace(config.tenants)
        self._shared.accounts.replace(config.tenant_limits())
        tell_apart(self._cache.core, config)
        self._shared = dataclasses.replace(self._shared, config=config)
        for session, by in list(self._passes.items()):
            if not self._has_still(session.tenant, by):
                session.connection.fail(AccessDeniedError(_CHANGED))

    def _has_still(self, tenant: Tenant, by: Pass) -> bool:
        """Whether who was let in as this tenant would be now."""
        try:
            return self._access.admit(by) == tenant
        except AccessDeniedError:
            return False

    def _partials_of(self, account: Account) -> TenantPartials:
        if account.name not in self._partials_by_tenant:
            self._partials_by_tenant[account.name] = TenantPartials(self._partials, account)
        return self._partials_by_tenant[account.name]

    async def renew_certificates(self) -> None:
        """Read the files of TLS anew. Raises ConfigError."""
        for listener in self._listeners:
            await asyncio.to_thread(listener.renew)

    async def record(self, config: ServerConfig) -> None:
        """Record requests as these settings say. Raises ConfigError, and goes on as before then."""
        with prefixed("record"):
            await self.recording.follow(config.record, config.record_bytes)

    async def _reload(self) -> tuple[list[str], list[str]]:
        if self.reload is None:
            raise ConfigError("this server was started without a file that its settings could be read from anew")
        return await self.reload()

    async def open(self) -> Self:
        """Listen at all addresses, or none. Raises ConfigError; a server is opened once, or raises CacheClosedError."""
        if self._state is not ServerState.NEW:
            raise CacheClosedError("a server is opened once")
        check_byte_order()
        self._state = ServerState.LISTENING
        try:
            await self.record(self._config)
            if self._given:
                self._listeners += self._given
            else:
                for url in self._config.listen:
                    self._listeners.append(Listener(Address.parse(url)))
        except BaseException:
            await self.close()
            raise
        for listener in self._listeners:
            self._spawn(self._accept(listener))
        return self

    async def close(self) -> None:
        """Accept no more connections, and end the open ones, which hear why; idempotent. The cache stays open."""
        if self._closing is None:
            self._state = ServerState.CLOSED
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    def __repr__(self) -> str:
        addresses = "".join(f" {address}" for address in self.addresses)
        return f"<Server, {self._state.value}{addresses}, {len(self._sessions)} connections>"

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for listener in self._listeners:
            listener.close()
        for session in self._sessions:
            session.connection.fail(CacheClosedError("the server is shutting down"))
        ends = {session: asyncio.create_task(session.ended()) for session in self._sessions}
        if ends:
            await asyncio.wait(ends.values(), timeout=_TELL_SECONDS)
            for session in ends:
                session.connection.abort()
            await asyncio.wait(ends.values())
        await self.recording.close()
        self._shared.holders.close()
        self._partials.close()
        self._shared.copiers.shutdown(wait=False)
        self._shared.makers.shutdown(wait=False)
        os.close(self._readable)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, listener: Listener) -> None:
        loop = asyncio.get_running_loop()
        quiet_until = 0.0
        while True:
            try:
                sock, _ = await loop.sock_accept(listener.socket)
            except OSError as error:
                if loop.time() >= quiet_until:
                    log.warning("a connection could not be accepted: %s", error.strerror)
                    quiet_until = loop.time() + _QUIET_SECONDS
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self._door.knock(self._spawn(self._welcome(sock, listener.tls)))

    async def _welcome(self, socket_: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Let one client introduce itself, and then in; or say why not."""
        sock: socket.socket | Secured = socket_
        peer, host = _peer(socket_), _host(socket_)
        segment = None
        try:
            arena_bytes = len(self._cache.memory)
            socket_.setblocking(False)
            _keep_alive(socket_)
            async with asyncio.timeout(self._config.hello_timeout_seconds):
                if tls is not None:
                    sock = await Secured.accept(socket_, tls, turn)
                hello, descriptor = await self._hear(sock)
                if descriptor is not None:
                    segment = ClientSegment(descriptor, arena_bytes)
                await self._turn_to_enter()
                by = pass_of(hello.token, over_unix=sock.family == socket.AF_UNIX)
                tenant = self._admit(hello, by)
                mapped = tenant.trusted and tenant.may_read and hello.descriptors and sock.family == socket.AF_UNIX
                ttl = self._cache.core.config.result_ttl_seconds
                welcome = Welcome(VERSION, arena_bytes, mapped, tenant.trusted, ttl, list(NEWER))
                await send(sock, welcome, self._readable if mapped else None)
            if not self._has_still(tenant, by):
                raise AccessDeniedError(_CHANGED)
            session = self.session(tenant, hello.namespace, segment, mapped=mapped, peer=peer)
            self._passes[session] = by
            segment = None  # it is the session's now
            await session.connection.take(sock)
            log.info("%s is let in", session.name, extra=session.about)
        except ConnectionLostError as error:
            log.debug("%s did not introduce itself: %s", peer, error)
            sock.close()
        except AsyncCacheError as error:
            self._door.refused(peer, error)
            with sock:  # also where this is cancelled meanwhile
                await self._door.slow_down(host, error)
                await _refuse(sock, error)
        except (OSError, TimeoutError) as error:
            log.debug("%s did not introduce itself: %s", peer, error)
            sock.close()
        except BaseException:
            sock.close()
            raise
        finally:
            if segment is not None:
                segment.close()

    async def _hear(self, sock: socket.socket | Secured) -> tuple[Hello, int | None]:
        self._door.check(len(self._sessions), sock.family)
        hello, descriptor = await receive_hello(sock)
        self._door.heard()
        try:
            self._door.check(len(self._sessions) + self._entering, sock.family)
        except LimitError:
            if descriptor is not None:
                os.close(descriptor)
            raise
        return hello, descriptor

    async def _turn_to_enter(self) -> None:
        """Return for one after the other, a turn of the loop apart, however many have said hello at once."""
        self._entering += 1
        before = working_for.set(_THE_DOOR)
        try:
            await turn()
        finally:
            working_for.reset(before)
            self._entering -= 1

    def _admit(self, hello: Hello, by: Pass) -> Tenant:
        if hello.version != VERSION:
            raise ProtocolError(f"the server speaks version {VERSION} of the protocol, the client {hello.version}")
        try:
            check_label("namespace", hello.namespace)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        tenant = self._access.admit(by)
        account = self._shared.accounts.of(tenant)
        if not account.left("connections"):
            raise account.over("connections", f"which is {account.most['connections']}")
        return tenant

    def session(
        self, tenant: Tenant, namespace: str, segment: ClientSegment | None, *, mapped: bool, peer: str = "a client"
    ) -> Session:
        """A new session, which serves one connection and owns the segment."""
        self._shared.accounts.of(tenant).take("connections")
        name = f"{peer}, tenant {tenant.name!r}, namespace {namespace!r},"
        leaves = self._sessions.discard
        session = Session(self._shared, tenant, namespace, segment, mapped=mapped, closed=leaves, name=name)
        self._sessions.add(session)
        return session


def _peer(sock: socket.socket) -> str:
    """Who is at the other end of a socket, for the log."""
    with suppress(OSError):
        if sock.family != socket.AF_UNIX:
            host, port = sock.getpeername()[:2]
            return f"the client at {host} port {port}"
        process, user = peer_process(sock)
        return f"the client of process {process}, user {user}"
    return "a client that is gone"


def _host(sock: socket.socket) -> str:
    """From where wrong tokens are counted together."""
    with suppress(OSError):
        return str(sock.getpeername()[0]) if sock.family != socket.AF_UNIX else ""
    return ""


async def _refuse(sock: socket.socket | Secured, error: AsyncCacheError) -> None:
    """Say why, if the client listens, and close."""
    with sock, suppress(OSError, TimeoutError):
        async with asyncio.timeout(_TELL_SECONDS):
            await send(sock, failed(0, error))


def _keep_alive(sock: socket.socket) -> None:
    """Have the system notice that a host is gone without a word."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
