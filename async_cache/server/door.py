"""Before a token is known: how many may knock at a time, what they are told, and what the log says of a flood."""

import asyncio
import logging
import resource
import socket
from collections import OrderedDict

from async_cache.errors import AccessDeniedError, LimitError

log = logging.getLogger(__name__)

_KEPT_DESCRIPTORS = 256  # for storage, listeners and the arena
_DESCRIPTORS_EACH = 2  # of a connection: its socket, and its segment
_RESERVED_PART = 16  # of the connections: so many are kept for the Unix socket
_KNOCKING_PART = 4  # of the connections: so many may be greeted at a time
_FEW = 16
_LINES = 20  # of the log, of refusals, ...
_LINES_SECONDS = 10.0  # ... in so many seconds
_WRONG_FREE = 8  # wrong tokens from an address, before they are answered late
_WRONG_SECONDS = 0.1  # later for each more, ...
_WRONG_MOST_SECONDS = 1.0  # ... up to this
_ADDRESSES = 1024  # of which wrong tokens are counted


def fitting_connections(wanted: int) -> int:
    """As many connections as this process has descriptors for, beside those that storage needs."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    fitting = max((most - min(_KEPT_DESCRIPTORS, most // 4)) // _DESCRIPTORS_EACH, 1)
    if fitting < wanted:
        log.warning("max_connections: %d, and not %d: this process may have %d descriptors", fitting, wanted, most)
    return min(wanted, fitting)


class Door:
    """Who is let in to say hello: connections that are greeted, and those that are open, are bounded.

    Who has not said hello makes room for the next, the oldest first: whoever is in earnest has said it in a
    millisecond. A part of the connections is kept for the Unix socket.
    """

    def __init__(self, max_connections: int):
        self.max_connections = max_connections
        """May be changed meanwhile."""
        self._knocking: OrderedDict[asyncio.Task[None], None] = OrderedDict()
        self._wrong: OrderedDict[str, int] = OrderedDict()
        self._lines = _LINES
        self._lines_from = 0.0
        self._unsaid = 0
        self._loop = asyncio.get_running_loop()

    def knock(self, task: "asyncio.Task[None]") -> None:
        """Greet one more; the oldest of too many is given up."""
        if len(self._knocking) >= max(self.max_connections // _KNOCKING_PART, _FEW):
            oldest, _ = self._knocking.popitem(last=False)
            oldest.cancel()
        self._knocking[task] = None
        task.add_done_callback(self._left)

    def _left(self, task: "asyncio.Task[None]") -> None:
        self._knocking.pop(task, None)

    def heard(self) -> None:
        """The running task has heard its hello: it makes room for nobody any more."""
        task = asyncio.current_task()
        if task is not None:
            self._left(task)

    def check(self, connections: int, family: socket.AddressFamily) -> None:
        """Check that there is room for one more beside so many. Raises LimitError."""
        reserved = 0 if family == socket.AF_UNIX else self.max_connections // _RESERVED_PART
        if connections >= self.max_connections - reserved:
            raise LimitError(f"the server has {connections} connections, which is its limit")

    def refused(self, peer: str, error: Exception) -> None:
        """Say in the log that a client was refused: of a flood some lines, and how many more there were."""
        now = self._loop.time()
        if now >= self._lines_from + _LINES_SECONDS:
            if self._unsaid:
                log.warning("%d more clients were refused", self._unsaid)
            self._lines, self._lines_from, self._unsaid = _LINES, now, 0
        if self._lines:
            self._lines -= 1
            log.warning("%s is refused: %s", peer, error)
        else:
            self._unsaid += 1

    async def slow_down(self, address: str, error: Exception) -> None:
        """Answer late who has given many wrong tokens, so that guessing takes its time."""
        if isinstance(error, AccessDeniedError):
            wrong = self._wrong[address] = self._wrong.pop(address, 0) + 1
            if len(self._wrong) > _ADDRESSES:
                self._wrong.popitem(last=False)
            await asyncio.sleep(min(max(wrong - _WRONG_FREE, 0) * _WRONG_SECONDS, _WRONG_MOST_SECONDS))
