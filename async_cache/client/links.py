"""One link after the other: a new one is dialled when one is lost, and a server that has fallen silent is given up."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from enum import Enum

from async_cache.aio.home import Home
from async_cache.client.link import Link, Lost
from async_cache.errors import CacheClosedError, ConnectionLostError
from async_cache.protocol.messages import Ping

_FIRST_DELAY_SECONDS = 0.02
_LONGEST_DELAY_SECONDS = 1.0
_ATTEMPT_SECONDS = 5.0
_LAST_ATTEMPT_SECONDS = 0.1  # at least, of those that `open` makes
_CLOSE_SECONDS = 5.0
_LAST_CHANCE_SECONDS = 0.05

Dial = Callable[[Lost, float], Awaitable[Link]]
"""Makes a link within so many seconds, and has it call the first argument when it is lost."""


def backoff() -> Iterator[float]:
    """Seconds to wait between attempts: twice as long each time, up to a second."""
    delay = _FIRST_DELAY_SECONDS
    while True:
        yield delay
        delay = min(2 * delay, _LONGEST_DELAY_SECONDS)


class LinksState(Enum):
    """NEW -> OPENING -> OPEN -> CLOSED; a `close` leads to CLOSED from everywhere."""

    NEW = "new"
    OPENING = "opening"
    OPEN = "open"
    CLOSED = "closed"


_OPEN = LinksState.OPEN  # each access to a member of an enum is a call, in Python 3.11


class Links:
    """What a client is connected by. See `LinksState`.

    `current` is the link while the client is open and has a connection. A call that needs one waits in `ready` for the
    attempt that comes next, and fails with it.
    """

    def __init__(self, dial: Dial, *, connect_timeout_seconds: float, heartbeat_seconds: float | None):
        self.current: Link | None = None
        self._dial = dial
        self._connect_timeout_seconds = connect_timeout_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._state = LinksState.NEW
        self._lost = asyncio.Event()
        self._error: Exception = ConnectionLostError("there was no connection yet")
        self._heard_before = 0  # over the links before the current one, and its welcome
        self._waiting: list[asyncio.Future[Link]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._opening: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._home: Home | None = None

    # Life.

    async def open(self) -> None:
        """Connect, and stay connected. Raises CacheClosedError, and what the last attempt failed with that says why."""
        if self._state is not LinksState.NEW:
            raise CacheClosedError("a client is opened once")
        self._state, self._home = LinksState.OPENING, Home()
        opening = self._opening = asyncio.create_task(self._connect())
        try:
            await asyncio.wait((opening,))
        finally:
            opening.cancel()
            await asyncio.wait((opening,))
            failed = None if opening.cancelled() else opening.exception()
        if self._is_closed:
            await self.close()
            self.check_open()
        if failed is not None:
            raise failed
        self._state = LinksState.OPEN
        self._tasks.append(asyncio.create_task(self._stay_connected()))
        if self._heartbeat_seconds is not None:
            self._tasks.append(asyncio.create_task(self._beat(self._heartbeat_seconds)))

    async def _connect(self) -> None:
        """Have the first link, after as many attempts as there is time for."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._connect_timeout_seconds
        why: ConnectionLostError | None = None
        for delay in backoff():
            try:
                await self._attempt(max(deadline - clock(), _LAST_ATTEMPT_SECONDS))
                return
            except ConnectionLostError as error:
                if why is None or not isinstance(error.__cause__, TimeoutError):  # which may only be that of the last
                    why = error
                left = deadline - clock()
                if left <= 0:
                    raise why from why.__cause__
                await asyncio.sleep(min(delay, left))

    async def close(self) -> None:
        """Wait for what was committed, and close; idempotent. All who wait for something else get CacheClosedError.

        Raises RuntimeError in a loop that did not open the client, or after a fork: nothing is changed then.
        """
        if self._home is not None and self._closing is None and self._home.is_elsewhere():
            raise self._home.refusal("client")
        self._state = LinksState.CLOSED
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)  # to the end, also where the caller is cancelled

    async def _close(self) -> None:
        error = CacheClosedError("the client was closed")
        tasks = [*filter(None, [self._opening]), *self._tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        link, self.current = self.current, None
        self._settle_waiters(error)
        if link is not None:
            await link.close(error, _CLOSE_SECONDS)

    # Asking for a link.

    @property
    def _is_closed(self) -> bool:
        return self._state is LinksState.CLOSED

    def check_open(self) -> None:
        """Raises CacheClosedError, unless the client is open."""
        if self._state is not _OPEN:
            what = "was closed" if self._is_closed else "is not open: use `async with`"
            raise CacheClosedError(f"the client {what}")

    def connected(self) -> Link:
        """The link that there is now. Raises CacheClosedError, or the error of the last connection or attempt."""
        self.check_open()
        link = self.current  # once: another thread may ask
        if link is None:
            raise self._error.with_traceback(None)
        return link

    def here(self) -> Link | None:
        """The link that there is now, or None while it is lost. Raises CacheClosedError, unless the client is open.

        Raises RuntimeError in a loop that did not open the client, or after a fork.
        """
        link = self.current
        if link is None:
            self.check_open()
        elif self._home is not None and self._home.is_elsewhere():
            raise self._home.refusal("client")
        return link

    async def ready(self) -> Link:
        """The link, or the next one. Raises CacheClosedError, and what the next attempt fails with."""
        self.check_open()
        link = self.here()
        if link is not None and link.connection.is_open:
            return link
        future: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return await future

    @property
    def error(self) -> Exception:
        """Why there is no link, where there is none."""
        return self._error

    def heard(self) -> int:
        """How many messages have come so far, over all links: the same number as before says that none has come."""
        link = self.current
        return self._heard_before + (link.heard if link is not None else 0)

    # Staying connected.

    async def _attempt(self, timeout_seconds: float) -> Link:
        link = await self._dial(self._connection_lost, timeout_seconds)
        if not link.connection.is_open:  # lost already, when `_connection_lost` could not know whose it was
            raise link.reason.with_traceback(None)
        self._heard_before += 1
        self.current = link
        return link

    def _connection_lost(self, link: Link, error: Exception) -> None:
        if link is self.current:
            self.current = None
            self._heard_before += link.heard
            self._error = error
            self._lost.set()

    async def _stay_connected(self) -> None:
        clock = asyncio.get_running_loop().time
        delays, connected = backoff(), clock()
        while True:
            await self._lost.wait()
            self._lost.clear()
            waits = clock() - connected < _LONGEST_DELAY_SECONDS  # it was welcomed, and sent away
            while self.current is None:
                if waits:
                    await asyncio.sleep(next(delays) * random.uniform(0.5, 1))
                else:
                    waits, delays = True, backoff()
                try:
                    self._settle_waiters(await self._attempt(_ATTEMPT_SECONDS))
                except Exception as error:
                    self._error = error
                    self._settle_waiters(error)
            connected = clock()

    def _settle_waiters(self, outcome: Link | Exception) -> None:
        """Give those who wait for an attempt what it has come to."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if future.done():
                continue
            if isinstance(outcome, Link):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

    async def _beat(self, seconds: float) -> None:
        """Give up a server that does not say anything, also when it is asked to."""
        asked = -1
        while True:
            await asyncio.sleep(seconds)
            link = self.current
            if link is None:
                continue
            heard = self.heard()
            if heard == asked:
                await asyncio.sleep(_LAST_CHANCE_SECONDS)  # where this loop was held up, the answer is there, unread
            if heard == asked == self.heard():
                link.abort(f"the server has not answered for {seconds} s")
            else:
                link.send(Ping(link.next_number()))
            asked = heard
