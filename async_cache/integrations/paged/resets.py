"""The emptying of the server that an engine's reset asks for: at once where that is possible, else as soon as it is."""

import logging
import threading
import time

from async_cache.client.blocking import BlockingClient
from async_cache.integrations.optional import OptionalClient
from async_cache.integrations.paged.orders import Complaint
from async_cache.integrations.paged.saves import SavesUnderWay

log = logging.getLogger(__name__)

_RESET_SECONDS = 10.0  # so long the engine waits, for saves and for the server
_RETRY_SECONDS = 5.0


class Resets:
    """The resets that were asked for. Until the server was emptied for the last of them, the cache is not to be used.

    All methods are for the engine's thread.
    """

    def __init__(self, client: OptionalClient, saves: SavesUnderWay):
        self._client = client
        self._saves = saves
        self._asked = 0
        self._done = 0  # how many had been asked for when the server was last emptied
        self._emptying: threading.Thread | None = None
        self._retry_at = 0.0
        self._complaint = Complaint()

    def reset(self) -> bool:
        """Wait for the saves that are under way, and empty the server. Whether it is empty now, or there is none."""
        self._asked += 1
        try:
            client = self._client.get()
        except TimeoutError as error:
            return self._not_done(error)
        except Exception as error:
            log.info("there is no server to empty (%s): one that comes is emptied before it is used", error)
            return True
        if not self._saves.wait(_RESET_SECONDS):
            return self._not_done(TimeoutError(f"{len(self._saves)} saves have not ended in {_RESET_SECONDS:g} s"))
        try:
            self._empty(client, self._asked)
        except Exception as error:
            return self._not_done(error)
        return True

    def _not_done(self, error: Exception) -> bool:
        log.error("the cache was not emptied, and is not used until it is: %s (%s)", error, type(error).__name__)
        return False

    def _empty(self, client: BlockingClient, asked: int) -> None:
        client.clear("all", timeout_seconds=_RESET_SECONDS)
        self._done = max(self._done, asked)

    def are_done(self, client: BlockingClient) -> bool:
        """Whether the cache may be used. If not, the server is emptied in a thread, once nothing is under way."""
        if self._done == self._asked:
            return True
        is_running = self._emptying is not None and self._emptying.is_alive()
        if not is_running and time.monotonic() >= self._retry_at and not len(self._saves):
            emptying = threading.Thread(
                target=self._make_up, args=(client, self._asked), name="async_cache reset", daemon=True
            )
            emptying.start()  # it raises where there can be no more threads
            self._emptying = emptying
        return False

    def _make_up(self, client: BlockingClient, asked: int) -> None:
        try:
            self._empty(client, asked)
        except Exception as error:
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            self._complaint.log(error)

    def close(self) -> None:
        """Wait for the thread. The client is closed before, so that it ends."""
        if self._emptying is not None:
            self._emptying.join()
