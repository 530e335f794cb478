"""Backends come and go while the cache is open: add, drain and remove."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial

from async_cache.config import CacheConfig
from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import Backend
from async_cache.l2.copy import Copy
from async_cache.l2.guard import Guard
from async_cache.l2.guard.guards import Guards
from async_cache.l2.opening import open_all
from async_cache.l2.tombstones import Tombstones
from async_cache.l2.urls.registry import from_url
from async_cache.ledger.ledger import Ledger
from async_cache.values import BackendState, BackendStatus
from async_cache.write.carrier import Carrier
from async_cache.write.moves import Moves
from async_cache.write.writeback import Writeback

log = logging.getLogger(__name__)


class Backends:
    """Changes which backends there are; a backend's states are in `BackendState`.

    What is begun is carried to its end, also where its caller is cancelled. `joined` hears of a backend that is
    used from now on, and `forget` of one that nobody uses any more, before it is closed.
    """

    def __init__(
        self,
        guards: Guards,
        writeback: Writeback,
        tombstones: Tombstones,
        config: CacheConfig,
        ledger: Ledger,
        moves: Moves,
        joined: Callable[[Guard], None],
        forget: Callable[[Guard], None],
    ):
        self._guards = guards
        self._writeback = writeback
        self._tombstones = tombstones
        self._config = config
        self._ledger = ledger
        self._moves = moves
        self._joined = joined
        self._forget = forget
        self._opening: set[str] = set()
        self._copies: dict[Guard, Copy] = {}
        self._drains: dict[Guard, asyncio.Task[None]] = {}
        self._removals: dict[Guard, asyncio.Task[None]] = {}
        self._carrier = Carrier()

    def reconfigure(self, config: CacheConfig) -> None:
        """Open and close what comes and goes as the settings say now."""
        self._config = config

    def statuses(self) -> list[BackendStatus]:
        """All backends that are not closed, the fastest first."""
        return [self._status(guard) for guard in self._guards]

    async def add(self, url_or_backend: str | Backend, position: int | None = None) -> None:
        """Open a backend, and use it from then on, before the one that is at this position now; None: behind all.

        Raises ConfigError for a URL or a name that cannot be, ValueError for a position that there is not, and what the
        backend raises as it opens.
        """
        there = self._guards.current
        if position is not None and type(position) is not int:
            raise TypeError(f"position must be an int, not {type(position).__name__}")
        if position is not None and not 0 <= position <= len(there):
            raise ValueError(f"position must be from 0 to {len(there)}, not {position}")
        behind = there[position:] if position is not None else ()
        if isinstance(url_or_backend, str):
            backend = await asyncio.to_thread(from_url, url_or_backend)  # it may import
        else:
            backend = url_or_backend
        if backend.name in self._opening or any(guard.name == backend.name for guard in self._guards):
            raise ConfigError(f"there is a backend {backend.name!r} already")
        opening = self._carrier.begin(self._add(backend, behind))
        self._opening.add(backend.name)
        opening.add_done_callback(lambda _: self._opening.discard(backend.name))
        await self._carrier.wait(opening)

    async def _add(self, backend: Backend, behind: Sequence[Guard]) -> None:
        await open_all([backend], self._config)
        guard = Guard.of(backend, self._config, self._ledger)
        self._guards.add(guard, behind)
        self._writeback.add(guard)
        self._joined(guard)
        log.info("backend %s was added", guard.name, extra=guard.about)

    async def drain(self, name: str, deadline_seconds: float | None = None) -> BackendStatus:
        """Write nothing new to a backend, and copy what only it has to the others that are written to.

        Returns when that is done, or `deadline_seconds` are over: it goes on then, and may be waited for again. It is
        done where the state is DRAINED, and else may be begun again. Lookups use the backend until it is removed.
        Raises ConfigError for a name that there is not, and BackendError where the copying cannot go on.
        """
        guard = self._guards.find(name)
        if guard.state is BackendState.LEAVING:
            raise ConfigError(f"backend {name!r} is being removed")
        drain = self._drains.get(guard)
        if drain is None and guard.state is not BackendState.DRAINED:
            guard.state = BackendState.DRAINING
            drain = self._drains[guard] = self._carrier.begin(self._drain(guard))
            drain.add_done_callback(lambda _: self._drains.pop(guard))
        if drain is not None:
            await asyncio.wait((drain,), timeout=deadline_seconds)
            if drain.cancelled() and guard in self._removals:
                raise BackendError(f"{name} is being removed, and was not drained before")
            if drain.done():
                await self._carrier.wait(drain)
        return self._status(guard)

    async def _drain(self, guard: Guard) -> None:
        log.info("backend %s is being drained", guard.name, extra=guard.about)
        await self._writeback.end(guard)
        arrived = self._moves.copying(guard)
        while True:
            others = self._guards.others(guard)
            copy = Copy(guard, partial(self._guards.others, guard), self._stages, self._tombstones, arrived=arrived)
            self._copies[guard] = copy
            copied = await copy.run()
            if set(others).issubset(self._guards.others(guard)):
                break  # else some of it may have left with one of the others
        if not copied.failed:
            guard.state = BackendState.DRAINED
        log.info(
            "backend %s is %s: %d objects were copied", guard.name, guard.state.value, copied.copied, extra=guard.about
        )

    def _stages(self) -> list[list[Guard]]:
        """To whom what is drained goes: as if it were committed now."""
        at_once, later = self._guards.stages()
        return [at_once, *([guard] for guard in later)]

    async def remove(self, name: str) -> None:
        """Ask a backend no more, wait for what was promised of it, and close it.

        What only it has is not found any more: `drain` comes before. Raises ConfigError for a name that there is not.
        """
        guard = self._guards.find(name)
        removal = self._removals.get(guard)
        if removal is None:
            self._guards.leave(guard)
            removal = self._removals[guard] = self._carrier.begin(self._remove(guard))
            removal.add_done_callback(lambda _: self._removals.pop(guard))
        await self._carrier.wait(removal)

    async def _remove(self, guard: Guard) -> None:
        log.info("backend %s is being removed", guard.name, extra=guard.about)
        drain = self._drains.get(guard)
        if drain is not None:
            drain.cancel()
            await asyncio.wait((drain,))
        await self._writeback.end(guard)
        await guard.stores_ended(None)
        await asyncio.sleep(0)  # lookups that were to begin in this turn have begun
        await guard.wait_until_unused()
        await self._moves.leave(guard, self._config.close_timeout_seconds)
        await self._writeback.forget(guard)
        self._forget(guard)
        await guard.close(self._config.close_timeout_seconds)
        self._ledger.closed(guard.name)
        self._copies.pop(guard, None)
        self._guards.left(guard)
        log.info("backend %s was removed", guard.name, extra=guard.about)

    async def close(self) -> None:
        """Cancel what is under way: whoever waits for it gets CacheClosedError."""
        await self._carrier.close()

    def _status(self, guard: Guard) -> BackendStatus:
        placement, copy = guard.backend.placement, self._copies.get(guard)
        queue = self._writeback.queue(guard)
        return BackendStatus(
            name=guard.name,
            state=guard.state,
            breaker=guard.breaker.state.value,
            usage=guard.usage(),
            pending=queue.pending if queue is not None else 0,
            write=placement.write.value,
            promote=placement.promote,
            admit=placement.admit,
            promoted=queue.promoted if queue is not None else 0,
            unpromoted=queue.unpromoted if queue is not None else 0,
            refused=dict(queue.refused) if queue is not None else {},
            write_budget=placement.write_budget,
            budget_left_bytes=max(guard.budget.left_bytes, 0) if guard.budget is not None else None,
            copied=copy.copied if copy is not None else None,
        )
