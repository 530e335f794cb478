"""A cache behind a server and a connection, all in one loop, with the members of an embedded cache."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import async_solipsism
from async_solipsism.socket import socketpair

from async_cache import AsyncCache, CacheConfig
from async_cache.client.client import CacheClient
from async_cache.client.link import Link, Lost
from async_cache.client.memory import Segment
from async_cache.config import ServerConfig
from async_cache.l2 import Backend
from async_cache.memory.mapping import map_read_only
from async_cache.protocol.messages import NEWER, VERSION, Welcome
from async_cache.server import Server
from async_cache.server.access import Tenant
from async_cache.server.segment import ClientSegment


class BoundTenant(Tenant):
    """One that is not trusted with digests, but may do all that these tests do."""

    trusted = False

    def check_trusted(self, what: str) -> None:
        """It is."""


class ServedCache(CacheClient):
    """A client, and for the tests the cache behind its server."""

    def __init__(self, cache: AsyncCache, server: Server, kind: str, tenant: Tenant | None = None):
        super().__init__(self._connect)
        self._cache, self._server, self._kind = cache, server, kind
        self._tenant = tenant or (BoundTenant() if kind == "bound" else Tenant())

    def check_integrity(self) -> None:
        self._cache.check_integrity()

    async def _connect(self, lost: Lost, timeout_seconds: float) -> Link:
        """A connection without a socket of the machine, or a greeting: `mapped`, `framed`, or `bound` to salts."""
        mapped = self._kind == "mapped"
        tenant = self._tenant
        segment = Segment() if mapped else None
        received = ClientSegment(os.dup(segment.fd), len(self._cache.memory)) if segment else None
        session = self._server.session(tenant, "", received, mapped=mapped)
        arena = None
        if segment is not None:
            segment.grow(len(self._cache.memory))
            arena = map_read_only(self._cache.core.arena.fd, len(self._cache.memory))
        ttl = self._cache.core.config.result_ttl_seconds
        welcome = Welcome(VERSION, len(self._cache.memory), mapped, tenant.trusted, ttl, list(NEWER))
        link = Link(welcome, arena, segment, lost)
        loop = asyncio.get_running_loop()
        ours, theirs = socketpair() if isinstance(loop, async_solipsism.EventLoop) else socket.socketpair()
        await loop.connect_accepted_socket(lambda: session.connection, theirs)
        await loop.create_connection(lambda: link.connection, sock=ours)
        return link


@asynccontextmanager
async def serve(config: CacheConfig, backends: Iterable[Backend] | None, kind: str) -> AsyncIterator[ServedCache]:
    """As `AsyncCache(config, backends)`, served."""
    async with (
        AsyncCache(config, backends) as cache,
        closed_at_the_end(Server(cache, ServerConfig(max_requests=100_000))) as server,
        ServedCache(cache, server, kind) as client,
    ):
        yield client


@asynccontextmanager
async def closed_at_the_end(server: Server) -> AsyncIterator[Server]:
    """A server that does not listen."""
    try:
        yield server
    finally:
        await server.close()
