"""A client for an engine that goes on without it: nobody waits for a server that is not there, again and again."""

import math
import threading
import time
from collections.abc import Callable

from async_cache.client.blocking import BlockingClient
from async_cache.errors import CacheClosedError


class OptionalClient:
    """A client that is opened at once, or else in the background when it is needed. NEW -> CLOSED.

    It is not asked for during `retry_seconds` after a failure. `make` makes a new client, which is not open.
    """

    def __init__(self, make: Callable[[], BlockingClient], retry_seconds: float = 5.0):
        self._make = make
        self._retry_seconds = retry_seconds
        self._lock = threading.Lock()
        self._client: BlockingClient | None = None
        self._error: Exception = CacheClosedError("there was no connection yet")
        self._opening: threading.Thread | None = None
        self._retry_at = 0.0
        self._closed = False
        self._open()

    def get(self) -> BlockingClient:
        """The client, which reconnects by itself once it was open. Raises why there is none, or no connection now."""
        with self._lock:
            if time.monotonic() >= self._retry_at:
                if self._client is not None:
                    self._client.check_connected()
                    return self._client
                if self._opening is None:
                    opening = threading.Thread(target=self._open, name="async_cache connect", daemon=True)
                    opening.start()  # it raises where there can be no more threads; the new one waits for the lock
                    self._opening = opening
            raise self._error.with_traceback(None)  # it is raised often: its traceback is not to grow

    def failed(self, error: Exception) -> None:
        """A call has waited for the server in vain."""
        with self._lock:
            if error is not self._error and not self._closed:
                self._error = error
                self._retry_at = time.monotonic() + self._retry_seconds

    def end_request_nowait(self, request_id: str) -> None:
        """As `BlockingClient.end_request_nowait`; without a client there is nothing to end."""
        client = self._client
        if client is not None:
            client.end_request_nowait(request_id)

    def _open(self) -> None:
        client, error = self._make(), None
        try:
            client.open()
        except Exception as failure:
            error = failure
        with self._lock:
            self._opening = None
            if not self._closed:
                if error is None:
                    self._client = client
                    return
                self._error = error
                self._retry_at = time.monotonic() + self._retry_seconds
        client.close()

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._closed, self._retry_at = True, math.inf
            self._error = CacheClosedError("the client was closed")
            client, self._client = self._client, None
        if client is not None:
            client.close()
