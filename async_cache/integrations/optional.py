"""A client for an engine that goes on without it: no call waits for a server that is not there, again and again."""

import math
import threading
import time
from collections.abc import Callable
from enum import Enum

from async_cache.client.blocking import BlockingClient
from async_cache.errors import CacheClosedError


class OptionalState(Enum):
    """OPENING -> OPEN, or ABSENT where that fails, and from there OPENING again when it is needed; all -> CLOSED."""

    OPENING = "opening"
    OPEN = "open"
    ABSENT = "absent"
    CLOSED = "closed"


class OptionalClient:
    """A client that is opened at once, or else in the background when it is needed. See `OptionalState`.

    It is not asked for during `retry_seconds` after a failure. `make` makes a new client, which is not open.
    """

    def __init__(self, make: Callable[[], BlockingClient], retry_seconds: float = 5.0):
        self._make = make
        self._retry_seconds = retry_seconds
        self._lock = threading.Lock()
        self._state = OptionalState.OPENING
        self._client: BlockingClient | None = None  # while it is OPEN
        self._error: Exception = CacheClosedError("there was no connection yet")
        self._retry_at = 0.0
        self._open()

    def get(self) -> BlockingClient:
        """The client, which reconnects by itself once it was open. Raises why there is none, or no connection now."""
        with self._lock:
            if time.monotonic() >= self._retry_at:
                if self._client is not None:
                    self._client.check_connected()
                    return self._client
                if self._state is OptionalState.ABSENT:
                    opening = threading.Thread(target=self._open, name="async_cache connect", daemon=True)
                    opening.start()  # it raises where there can be no more threads; the new one waits for the lock
                    self._state = OptionalState.OPENING
            raise self._error.with_traceback(None)  # it is raised often: its traceback is not to grow

    def failed(self, error: Exception) -> None:
        """Note that a call has waited for the server in vain: none is made for the next `retry_seconds`."""
        with self._lock:
            if error is not self._error and self._state is not OptionalState.CLOSED:
                self._retry_later(error)

    def heard(self) -> int:
        """How many messages have come from the server so far: unchanged, it says that the server is silent."""
        client = self._client
        return client.heard() if client is not None else 0

    def end_request_nowait(self, request_id: str) -> None:
        """Release all that the request holds, without waiting for the server; without a client, nothing is held."""
        client = self._client
        if client is not None:
            client.end_request_nowait(request_id)

    def _retry_later(self, error: Exception) -> None:
        self._error = error
        self._retry_at = time.monotonic() + self._retry_seconds

    def _open(self) -> None:
        client, error = self._make(), None
        try:
            client.open()
        except Exception as failure:
            error = failure
        with self._lock:
            if self._state is not OptionalState.CLOSED:
                if error is None:
                    self._client, self._state = client, OptionalState.OPEN
                    return
                self._state = OptionalState.ABSENT
                self._retry_later(error)
        client.close()

    def close(self) -> None:
        """Close the client; idempotent. From then on, CacheClosedError is raised in place of it."""
        with self._lock:
            self._state, self._retry_at = OptionalState.CLOSED, math.inf
            self._error = CacheClosedError("the client was closed")
            client, self._client = self._client, None
        if client is not None:
            client.close()
