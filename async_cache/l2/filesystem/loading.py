"""Loads: where objects lie is told by the catalog, threads share the runs, and what could not be read is given up."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from threading import Event
from typing import Any

from async_cache.aio.slices import InTurns, turn
from async_cache.errors import BackendError
from async_cache.l2.backend import Loaded, LoadOutcome
from async_cache.l2.faults import Faults
from async_cache.l2.filesystem.ahead import Ahead
from async_cache.l2.filesystem.catalog import Catalog
from async_cache.l2.filesystem.directory import Directory
from async_cache.l2.filesystem.files import NotOpened
from async_cache.l2.filesystem.following import Following
from async_cache.l2.filesystem.format import parse_segment
from async_cache.l2.filesystem.room import SLICE, Room
from async_cache.l2.filesystem.runs import Todo, Wanted, runs
from async_cache.l2.filesystem.work import Threads
from async_cache.l2.workers import settle
from async_cache.prompt.keys import ObjectKey
from async_cache.values import Removal

logger = logging.getLogger(__name__)

THREAD_BYTES = 8 * 2**20  # for which another thread is woken: two that take turns at the interpreter's lock are slower

_LOADED, _GONE, _CORRUPT, _FAILED = LoadOutcome  # each access to a member by its enum is a call, in Python 3.11
_REMOVALS = {_GONE: Removal.LOST, _CORRUPT: Removal.DAMAGED}

Placed = list[tuple[int, bytes] | None]


class Loading:
    """Loads from one directory, of which `readers` threads read at a time."""

    def __init__(
        self,
        directory: Directory,
        catalog: Catalog,
        threads: Threads,
        ahead: Ahead,
        room: Room,
        following: Following,
        faults: Faults,
        *,
        readers: int,
    ):
        self._directory, self._catalog, self._threads, self._room = directory, catalog, threads, room
        self._ahead, self._following, self._faults, self._readers = ahead, following, faults, readers
        self._unopened: set[str] = set()  # segments that could not be opened once

    async def load(
        self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview], loaded: Loaded, *, exact: bool
    ) -> tuple[list[LoadOutcome], Placed]:
        """What became of each object, and its size and place in the catalog when the load began."""
        placed: Placed = [None] * len(keys)
        outcomes: list[Any] = [_GONE] * len(keys)  # a LoadOutcome each, or the OSError that it met
        find = partial(self._find, keys, buffers, placed, outcomes, exact=exact)
        found = await find(range(len(keys)))
        if None in placed and not self._following.knows_all():
            with suppress(OSError):
                await self._following.catch_up()
            found += await find([number for number, at in enumerate(placed) if at is None])
        await self._read(found, buffers, outcomes, loaded)
        while outcomes.count(_LOADED) < len(outcomes):
            if _CORRUPT in outcomes:  # it may have been given up by others
                with suppress(OSError):
                    await self._following.look()
            found = await find([number for number, outcome in enumerate(outcomes) if outcome is not _LOADED])
            if not found:
                return await self._note_losses(keys, placed, outcomes), placed
            await self._read(found, buffers, outcomes, loaded)  # another body of it was kept
        if self._faults:
            async for some in InTurns(keys, SLICE):
                self._faults.over(some)
        return outcomes, placed

    async def _find(
        self,
        keys: Sequence[ObjectKey],
        buffers: Sequence[memoryview],
        placed: Placed,
        outcomes: list[Any],
        numbers: Sequence[int],
        *,
        exact: bool,
    ) -> list[list[Wanted]]:
        """Look where objects lie, by their numbers in the call, in slices: the runs of those that lie elsewhere now.

        What does not fit its buffer is corrupt.
        """
        found: list[list[Wanted]] = []
        at, new = self._catalog.segments.at, tuple.__new__
        if len(numbers) > SLICE:
            await turn()  # also the first slice: many loads may begin at once, or have waited for the same
        async for some in InTurns(numbers, SLICE):
            asked = [keys[number] for number in some]
            self._ahead.taken(asked)
            wanted = []
            for number, place in zip(some, self._catalog.index.placed(asked), strict=True):
                if place is not None and place != placed[number]:
                    placed[number] = place
                    size_bytes, length = place[0], len(buffers[number])
                    if size_bytes == length or (size_bytes < length and not exact):
                        segment, page, checksum = at(place[1])
                        wanted.append(new(Wanted, (segment.name, page, number, size_bytes, checksum)))
                        outcomes[number] = _GONE
                    else:
                        outcomes[number] = _CORRUPT
            wanted.sort()
            found += runs(wanted)
        return found

    async def _read(
        self, found: list[list[Wanted]], buffers: Sequence[memoryview], outcomes: list[Any], loaded: Loaded
    ) -> None:
        """Fill buffers, and put into `outcomes` what became of each."""
        todo, stop = Todo(found), Event()
        size_bytes = sum([each.size_bytes for run in found for each in run])
        # Submitted one by one: `settle` must know of each call whether it has begun.
        futures = [
            self._threads.loads.submit(self._directory.runs.read, todo, buffers, outcomes, loaded, stop)
            for _ in range(min(self._readers, len(todo), 1 + size_bytes // THREAD_BYTES))
        ]
        await settle(futures, stop, self._threads.given_up)

    async def _note_losses(
        self, keys: Sequence[ObjectKey], placed: Placed, outcomes: list[LoadOutcome | OSError]
    ) -> list[LoadOutcome]:
        """What is told of each object, after a load that did not bring all of them."""
        told: list[LoadOutcome] = []
        lost: dict[Removal, list[tuple[ObjectKey, tuple[int, bytes]]]] = {Removal.LOST: [], Removal.DAMAGED: []}
        failed: list[ObjectKey] = []
        faults: list[OSError] = []
        for key, found, outcome in zip(keys, placed, outcomes, strict=True):
            if isinstance(outcome, OSError):
                faults.append(outcome)
                outcome = _FAILED
            if outcome is not _LOADED and not (found is not None and self._catalog.believes(key, found)):
                outcome = _GONE
            if outcome in _REMOVALS and found is not None:
                lost[_REMOVALS[outcome]].append((key, found))
            if outcome is _FAILED:
                failed.append(key)
            told.append(outcome)
            if len(told) % SLICE == 0:
                await turn()
        unreadable = set(self._faults.failed(failed, beside_others=len(failed) < len(keys)))
        if unreadable:
            lost[Removal.DAMAGED] += [
                (key, at) for key, at in zip(keys, placed, strict=True) if at and key in unreadable
            ]
            logger.warning("%s: %d objects cannot be read: %s", self._directory.name, len(unreadable), faults[0])
        for removal, objects in lost.items():
            await self._room.give_up(objects, removal)
        await self._set_aside_unopened({fault.filename for fault in faults if isinstance(fault, NotOpened)})
        if failed and not unreadable and len(failed) == len(keys):
            raise BackendError(f"{self._directory.name}: {faults[0]}") from faults[0]
        return told

    async def _set_aside_unopened(self, names: set[str]) -> None:
        """What could not be opened twice is not tried for each of its objects."""
        for name in names & self._unopened:
            logger.warning("%s: the segment %s cannot be opened: set aside as %s.bad", self._directory.name, name, name)
            if (parsed := parse_segment(name)) is not None:
                await self._room.set_aside(self._catalog.segments.get(*parsed))
        self._unopened ^= names
