"""`HTTPServer`: uvicorn in the loop of a server that is there already."""

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from async_cache.errors import ConfigError
from async_cache.metrics import Watch
from async_cache.protocol.address import Address
from async_cache.server.http.site import Site
from async_cache.server.listener import Listener
from async_cache.server.server import Server

log = logging.getLogger(__name__)

_CONNECTIONS = 64
_REQUEST_SECONDS = 40  # of a connection, from one answer to the end of the next: beyond `site._EXPLAIN_SECONDS`
_IDLE_SECONDS = 30
_CLOSE_SECONDS = 0.4


class _Uvicorn(uvicorn.Server):
    """Signals are the process's own: uvicorn takes none."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take no signal."""
        yield


class _Bounded(H11Protocol):
    """A connection that ends where a request is not over in time: not sent whole, not answered, or not read."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._begin()

    def on_response_complete(self) -> None:
        """Wait for the next one."""
        self._begin()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        super().connection_lost(exc)
        if self._deadline is not None:
            self._deadline.cancel()

    def _begin(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(_REQUEST_SECONDS, self.transport.abort)


class HTTPServer:
    """HTTP beside a server, from `open` until `close`. Its failure is a line in the log, and the server goes on."""

    def __init__(self, server: Server, watch: Watch):
        self._site = Site(server, watch)
        self._task: asyncio.Task[None] | None = None
        self._uvicorn: _Uvicorn | None = None
        self._listener: Listener | None = None

    @property
    def address(self) -> Address | None:
        """Where it listens; a port 0 has become a real one. None where it does not."""
        return self._listener.address if self._listener is not None else None

    def open(self, at: Address | Listener) -> None:
        """Begin to listen there, if that can be, or to answer where somebody listens already."""
        try:
            self._listener = at if isinstance(at, Listener) else Listener(at)
        except ConfigError as error:
            log.warning("no HTTP: %s", error)
            return
        config = uvicorn.Config(
            self._site.app,
            lifespan="off",
            ws="none",
            http=_Bounded,
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=1,
        )
        logging.getLogger("uvicorn").setLevel(logging.WARNING)  # that it starts and ends is told here
        self._uvicorn = _Uvicorn(config)
        self._task = asyncio.create_task(self._serve(self._uvicorn, self._listener.socket))
        log.info("HTTP at http://%s", str(self._listener.address).removeprefix("tcp://"))

    async def _serve(self, server: _Uvicorn, sock: socket.socket) -> None:
        try:
            await server.serve([sock])
        except Exception:
            log.exception("HTTP has ended")

    async def close(self) -> None:
        """Answer nobody any more; idempotent."""
        task, self._task = self._task, None
        if task is not None and self._uvicorn is not None and self._listener is not None:
            self._uvicorn.should_exit = True
            done, _ = await asyncio.wait((task,), timeout=_CLOSE_SECONDS)
            if not done:
                task.cancel()
                await asyncio.wait((task,))
            self._listener.close()
