"""One backend as the cache sees it: every call has an end, failures open a breaker, loads are metered."""

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from itertools import compress
from typing import Any, Self, TypeVar

from msgspec import Struct

from async_cache.config import CacheConfig
from async_cache.errors import BackendError
from async_cache.l2.backend import (
    Backend,
    Loaded,
    LoadOutcome,
    LookupNowait,
    Room,
    nobody_listens,
    not_told,
)
from async_cache.l2.faults import Faults
from async_cache.l2.guard.breaker import Breaker, BreakerState
from async_cache.l2.guard.budget import WriteBudget
from async_cache.l2.guard.call import Call
from async_cache.l2.guard.failures import Failures
from async_cache.l2.guard.fair import Gate
from async_cache.l2.guard.listing import Listing, next_keys
from async_cache.l2.guard.meter import Meter
from async_cache.l2.guard.told import Told, those_found
from async_cache.ledger.ledger import Ledger
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import ModelLayout
from async_cache.prompt.origin import Selection
from async_cache.values import BackendState, Removal

T = TypeVar("T")

log = logging.getLogger(__name__)

_SEARCHED_AT_ONCE = 4096  # objects in a question to a backend: some ten milliseconds of one thread
_SEARCHED_TOGETHER = 8192  # objects in the questions that are out
_REMOVED_TOGETHER = 4096  # objects that are looked for, and deleted, at a time
_LOSSES = {LoadOutcome.GONE: Removal.LOST, LoadOutcome.CORRUPT: Removal.DAMAGED}
_CLOSED, _OPEN, _ = BreakerState  # each access to a member by its enum is a call, in Python 3.11


class Timeouts(Struct, frozen=True):
    """How long each kind of call to a backend may take. The defaults are those of `CacheConfig`."""

    lookup_seconds: float = 1.0
    load_seconds: float = 30.0
    store_seconds: float = 30.0


class Guard(Told):
    """A backend with its timeouts, its breaker, its meter, and the calls that are out."""

    def __init__(
        self, backend: Backend, breaker: Breaker, timeouts: Timeouts | None = None, ledger: Ledger | None = None
    ):
        super().__init__(backend)
        self._loop = asyncio.get_running_loop()
        self.breaker = breaker
        self.timeouts = timeouts if timeouts is not None else Timeouts()
        self.meter = Meter()
        self.state = BackendState.ACTIVE
        self.faults = Faults()
        """Objects that could not be read: though a lookup may find them, they are to be stored anew."""
        self.calls: Counter[tuple[str, str]] = Counter()
        """How many calls there were, by what was asked and how it ended: succeeded, failed, abandoned."""
        self.failing: defaultdict[str, Failures] = defaultdict(Failures)
        """Failures in a row, by what was asked: that a lookup succeeds says nothing of loads that hang."""
        self.answered_at_once = 0
        """Lookups that needed no call."""
        self.stored_bytes = 0
        budget = backend.placement.write_budget
        self.budget = WriteBudget(budget, self._loop.time) if budget is not None else None
        """What may be written to it, where its URL bounds that."""
        self._storing: dict[Call[list[bool]], Sequence[ObjectKey]] = {}
        self._searches = Gate(_SEARCHED_TOGETHER)
        self.removals = Gate(_REMOVED_TOGETHER)
        """Through which goes whoever looks for what is to be deleted, and deletes it."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ledger = ledger if ledger is not None else Ledger()
        self._hears = backend.on_removed = partial(self._ledger.left, backend.name)

    @classmethod
    def of(cls, backend: Backend, config: CacheConfig, ledger: Ledger | None = None) -> Self:
        """The guard of a backend: what the backend itself says of its limits comes before the cache's settings."""
        guard = cls(backend, Breaker(config.breaker_failures, config.breaker_reset_seconds), None, ledger)
        guard.reconfigure(config)
        return guard

    def reconfigure(self, config: CacheConfig) -> None:
        """Take the limits of the settings, where the backend itself has no others. Calls that are out keep theirs."""
        limits = self.backend.limits
        self.breaker.limit = limits.breaker_failures or config.breaker_failures
        self.breaker.reset_seconds = limits.breaker_reset_seconds or config.breaker_reset_seconds
        self.timeouts = Timeouts(
            limits.lookup_timeout_seconds or config.lookup_timeout_seconds,
            limits.load_timeout_seconds or config.load_timeout_seconds,
            limits.store_timeout_seconds or config.store_timeout_seconds,
        )
        self.bounds.change(config.parsed_quotas)
        self.backend.bound(self.bounds)

    # Calls.

    def allows(self) -> bool:
        """Whether the breaker would let a call through now."""
        return self.breaker.allows(self._loop.time())

    def begin_load(
        self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview], loaded: Loaded = not_told
    ) -> Call[list[LoadOutcome]] | None:
        """Begin to load objects, and hear of each that is `loaded`; None where the backend is left alone."""
        call = self._begin(self.timeouts.load_seconds, keys, self.backend.load_each, keys, buffers, loaded)
        if call is not None:
            call.when_ended(partial(self._note_losses, call, keys))
        return call

    def _note_losses(self, call: Call[list[LoadOutcome]], keys: Sequence[ObjectKey]) -> None:
        outcomes = call.returned()
        if isinstance(outcomes, list) and outcomes.count(LoadOutcome.LOADED) < len(outcomes):
            for key, outcome in zip(keys, outcomes, strict=False):
                if outcome in _LOSSES:
                    self._ledger.left(self.name, key.chunk_hash, _LOSSES[outcome])

    def begin_load_listed(
        self, keys: Sequence[ObjectKey], sizes: Sequence[int], room: Room
    ) -> Call[list[memoryview | LoadOutcome]] | None:
        """Begin to load objects of which one knows what was listed; None where the backend is left alone."""
        return self._begin(self.timeouts.load_seconds, keys, self.backend.load_listed, keys, sizes, room)

    def begin_store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> Call[list[bool]] | None:
        """Begin to store objects; None where the backend is left alone."""
        call = self._begin(self.timeouts.store_seconds, keys, self.backend.store, keys, buffers)
        if call is not None:
            self._storing[call] = keys
            call.when_ended(partial(self._store_ended, call, list(map(len, buffers))))
        return call

    def _store_ended(self, call: Call[list[bool]], sizes: Sequence[int]) -> None:
        keys, stored = self._storing.pop(call), call.returned()
        if isinstance(stored, list):
            stored_bytes = sum(compress(sizes, stored))
            self.stored_bytes += stored_bytes
            if self.budget is not None:
                self.budget.wrote(stored_bytes)
            for chunk_hash in {key.chunk_hash for key in those_found(keys, stored)}:
                self._ledger.stored(self.name, chunk_hash, self.backend.ttl_seconds)

    async def stores_ended(self, chunk_hashes: Collection[bytes] | None) -> bool:
        """Whether the stores that run now, of these chunks or of any, ended before `store_timeout`."""
        ends = [
            call.ended()
            for call, keys in self._storing.items()
            if chunk_hashes is None or any(key.chunk_hash in chunk_hashes for key in keys)
        ]
        if not ends:
            return True
        _, stuck = await asyncio.wait(ends, timeout=self.timeouts.store_seconds)
        return not stuck

    def refused(self, chunk_hash: bytes) -> None:
        """Remember that the backend was not given a chunk."""
        self._ledger.refused(self.name, chunk_hash)

    def _begin(
        self,
        timeout_seconds: float,
        keys: Sequence[ObjectKey],
        verb: Callable[..., Awaitable[T]],
        *arguments: Any,
        answers: bool = True,
    ) -> Call[T] | None:
        """Call a verb, about these objects, with an answer for each; None where the backend is left alone."""
        if not self.breaker.begin(self._loop.time()):
            return None
        name = getattr(verb, "__name__", "call").lstrip("_").removesuffix("_each").removesuffix("_later")
        return Call(self, name, self._start(verb, *arguments), timeout_seconds, keys, answers=answers)

    def _start(self, verb: Callable[..., Awaitable[T]], *arguments: Any) -> "asyncio.Task[T]":
        """A task of its own, owned here until it ends."""
        task = self._loop.create_task(_call(verb, arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def lookup_later(self) -> LookupNowait | None:
        """What answers at once when the backend has heard of what others stored; None: `lookup` must be asked.

        Raises BackendError where it failed, stayed silent or is left alone.
        """
        with self.kept():
            return await self._carried_out((), self.backend.lookup_later, timeout_seconds=self.timeouts.lookup_seconds)

    def lookup_nowait(
        self, layout: ModelLayout, chunk_hashes: Sequence[bytes], mask: int, lookup: LookupNowait | None = None
    ) -> list[bool] | None:
        """For each chunk, whether all objects of a mask are present, and then pinned; None: `lookup` must be asked.

        `lookup` is what `lookup_later` said, if that was asked.
        """
        if self.breaker.state is not _CLOSED or self.backend.shared:  # what others may have changed has to be asked
            return None
        try:
            found = (lookup or self.backend.lookup_nowait)(chunk_hashes, layout.objects.members[mask])
        except (Exception, asyncio.CancelledError):
            log.exception("backend %s could not say at once what it holds", self.name, extra=self.about)
            return None
        if found is None:
            return None
        if isinstance(found, list) and len(found) == len(chunk_hashes):
            self.answered_at_once += 1
            self.uses += _count(found) * mask.bit_count()
            return found
        log.error("backend %s did not answer at once with a list of %d", self.name, len(chunk_hashes), extra=self.about)
        if isinstance(found, list):
            there = [(chunk_hash, mask) for chunk_hash, is_there in zip(chunk_hashes, found, strict=False) if is_there]
            self._tell(self.backend.unpin, layout.objects.keys(there))
        return None

    def present_nowait(self, layout: ModelLayout, chunk_hashes: Sequence[bytes], mask: int) -> list[bool] | None:
        """As `lookup_nowait`, without a pin."""
        if self.breaker.state is not _CLOSED or self.backend.shared:
            return None
        try:
            found = self.backend.present_nowait(chunk_hashes, layout.objects.members[mask])
        except (Exception, asyncio.CancelledError):
            log.exception("backend %s could not say at once what it holds", self.name, extra=self.about)
            return None
        return found if isinstance(found, list) and len(found) == len(chunk_hashes) else None

    async def lookup(self, keys: Sequence[ObjectKey], owner: str = "") -> list[bool] | None:
        """For each key, whether its object is present, and then pinned.

        None where the backend failed, stayed silent or is left alone: it pins nothing then, or gives it back. Very many
        are asked in parts, of which those of other owners have their turn; the time of each runs from its begin.
        """
        found: list[bool] = []
        with self.kept():
            try:
                for begin in range(0, len(keys), _SEARCHED_AT_ONCE):
                    objects = min(_SEARCHED_AT_ONCE, len(keys) - begin)
                    async with self._searches.entered(owner, objects):  # before there is anything of the part
                        answers = await self._search(keys[begin : begin + objects] if objects < len(keys) else keys)
                    if answers is None:
                        self._unpin_parts(keys, found, 0)
                        return None
                    found += answers
            except asyncio.CancelledError:
                self._unpin_parts(keys, found, 0)
                raise
        return found

    def _unpin_parts(self, keys: Sequence[ObjectKey], found: Sequence[bool], begin: int) -> None:
        """Give back what was found, a part in each turn of the loop."""
        while begin < len(found):
            part = found[begin : begin + _SEARCHED_AT_ONCE]
            if any(part):
                self.unpin_found(keys[begin : begin + len(part)], part)
                self._loop.call_soon(self._unpin_parts, keys, found, begin + len(part))
                return
            begin += len(part)

    async def _search(self, keys: Sequence[ObjectKey]) -> list[bool] | None:
        call = self._begin(self.timeouts.lookup_seconds, keys, self.backend.lookup, keys)
        if call is None:
            return None
        try:
            found = await call.result()
        except BackendError:
            self._unpin_late(call, keys)
            return None
        except asyncio.CancelledError:
            call.cancel()
            self._unpin_late(call, keys)
            raise
        self.uses += _count(found)
        return found

    def _unpin_late(self, call: Call[list[bool]], keys: Sequence[ObjectKey]) -> None:
        """Give back the pins of an answer that nobody waits for any more."""

        def answered() -> None:
            found = call.returned()
            if isinstance(found, list):
                self._tell(self.backend.unpin, those_found(keys, found))

        call.when_ended(answered)

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        """Remove objects, and say how many were there. Raises BackendError."""
        deleted = await self._carried_out(keys, self.backend.delete, keys)
        if not isinstance(deleted, int):
            raise BackendError(f"{self.name} did not say how much it deleted")
        for chunk_hash in dict.fromkeys([key.chunk_hash for key in keys]):
            self._ledger.left(self.name, chunk_hash, Removal.DELETED)
        return deleted

    async def next_keys(
        self, listing: Listing, count: int, selection: Selection | None = None
    ) -> list[tuple[ObjectKey, int]]:
        """The next objects of all that the backend holds, and their sizes in bytes; fewer than `count` at the end.

        Or of what is known to be of a selection.

        Raises BackendError.

        Each step has the time of a store: a backend that goes on may take as long as it needs for millions.
        """
        return await self._carried_out((), next_keys, self.backend, listing, count, selection)

    async def close_listing(self, listing: Listing) -> None:
        """End a listing, which may have been left in the middle."""
        close = getattr(listing[0], "aclose", None) if listing else None
        if close is not None:
            closing = self._start(close)
            await asyncio.wait((closing,), timeout=self.timeouts.store_seconds)
            if not closing.cancel() and not closing.cancelled():
                closing.exception()  # looked at: a listing that cannot be closed does no harm

    async def _carried_out(
        self,
        keys: Sequence[ObjectKey],
        verb: Callable[..., Awaitable[T]],
        *arguments: Any,
        timeout_seconds: float | None = None,
    ) -> T:
        """Call a verb and wait for its end, as long as a store may take if nothing else is said."""
        seconds = timeout_seconds if timeout_seconds is not None else self.timeouts.store_seconds
        call = self._begin(seconds, keys, verb, *arguments, answers=False)
        if call is None:
            raise BackendError(f"{self.name} is left alone after failures")
        try:
            return await call.result()
        finally:
            call.cancel()

    async def notes(self) -> dict[str, bytes]:
        """The notes that the backend has kept. Raises BackendError."""
        return await self._carried_out((), self.backend.notes)

    async def note(self, name: str) -> bytes | None:
        """The note that the backend has kept under a name. Raises BackendError."""
        return await self._carried_out((), self.backend.note, name)

    async def keep_note(self, name: str, note: bytes | None) -> None:
        """Have the backend keep a note, or forget it. Raises BackendError."""
        await self._carried_out((), self.backend.keep_note, name, note)

    async def close(self, timeout_seconds: float) -> None:
        """Cancel the calls that are out, and wait for them and for the backend, but not for ever."""
        if self.backend.on_removed is self._hears:  # else another cache uses it by now
            self.backend.on_removed = nobody_listens
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        tasks.add(self._start(self.backend.close))
        _, stuck = await asyncio.wait(tasks, timeout=timeout_seconds)
        for task in stuck:
            task.cancel()
        if stuck:
            log.warning("backend %s: %d calls have not ended at close", self.name, len(stuck), extra=self.about)
        for task in tasks - stuck:
            if not task.cancelled():
                task.exception()  # looked at: nobody else does

    def __repr__(self) -> str:
        return f"<Guard of {self.backend!r}, {self.breaker.state.value}, {len(self._tasks)} calls out>"

    # What calls say of the backend.

    def succeeded(self, verb: str, *, is_trial: bool) -> None:
        """Count a call that succeeded."""
        before = self.breaker.state
        if self.failing:
            self.failing.pop(verb, None)
        if self.failing:
            self.breaker.succeeded_beside(max(map(len, self.failing.values())), is_trial=is_trial)
        else:
            self.breaker.succeeded()
        if before is not self.breaker.state:
            log.info("backend %s is back", self.name, extra=self.about)

    def failed(self, why: str) -> None:
        """Count a call that failed, or did not end in time; `why` is logged."""
        before = self.breaker.state
        self.breaker.failed(self._loop.time())
        left_alone = before is _CLOSED and self.breaker.state is _OPEN
        log.warning(
            "backend %s: %s%s", self.name, why, "; it is left alone for a while" if left_alone else "", extra=self.about
        )

    def abandoned(self) -> None:
        """Count a call that was given up by its caller, and says nothing."""
        self.breaker.abandoned(self._loop.time())


def _count(found: Sequence[bool]) -> int:
    """How many answers say that an object is there."""
    return len(list(filter(None, found)))


async def _call(verb: Callable[..., Awaitable[T]], arguments: tuple[Any, ...]) -> T:
    """Call and await a backend in one coroutine, so that whatever it raises, and when, is raised in the call's task."""
    return await verb(*arguments)
