"""One backend as the cache sees it: every call has an end, failures open a breaker, loads are metered."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import compress
from typing import Any, Generic, Self, TypeVar

from msgspec import Struct

from async_cache.config import CacheConfig
from async_cache.errors import BackendError
from async_cache.l2.backend import Backend, LoadOutcome, Room, nobody_listens
from async_cache.l2.guard.breaker import Breaker, BreakerState
from async_cache.l2.guard.meter import Meter
from async_cache.ledger.ledger import Ledger
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import ModelLayout
from async_cache.values import BackendState, BackendUsage, Removal

T = TypeVar("T")

log = logging.getLogger(__name__)

_MAX_DOUBTFUL = 65_536  # objects
_LOSSES = {LoadOutcome.GONE: Removal.LOST, LoadOutcome.CORRUPT: Removal.DAMAGED}
_CLOSED, _OPEN, _HALF_OPEN = BreakerState  # each access to a member by its enum is a call, in Python 3.11


class CallTimeoutError(BackendError):
    """A call took too long. It was cancelled, but may not have ended: until then it owns its buffers."""


Listing = list[AsyncIterator[tuple[ObjectKey, int]]]
"""A listing of a backend's objects: empty until it has begun."""


class Timeouts(Struct, frozen=True):
    """How long each kind of call to a backend may take. The defaults are those of `CacheConfig`."""

    lookup_seconds: float = 1.0
    load_seconds: float = 30.0
    store_seconds: float = 30.0


class Call(Generic[T]):
    """One call to a backend, in a task of its own, which owns its buffers until it has ended, whoever gives it up.

    Its outcome is counted once, by whichever comes first: its end, its timeout, or that it is cancelled.
    """

    __slots__ = ("_answers", "_counted", "_guard", "_is_trial", "_task", "_timeout_seconds", "_verb")

    def __init__(self, guard: "Guard", verb: str, task: "asyncio.Task[T]", timeout_seconds: float, answers: int | None):
        self._guard = guard
        self._verb = verb
        self._task = task
        self._timeout_seconds = timeout_seconds
        self._answers = answers
        self._counted = False
        self._is_trial = guard.breaker.state is _HALF_OPEN
        task.add_done_callback(self._ended)

    @property
    def has_ended(self) -> bool:
        """Whether the backend touches nothing any more that it was given."""
        return self._task.done()

    def ended(self) -> "asyncio.Task[T]":
        """What to wait for by `asyncio.wait`, and nothing else."""
        return self._task

    def when_ended(self, callback: Callable[[], object]) -> None:
        """Call a function in the loop's next turn after the call has ended."""
        self._task.add_done_callback(lambda _: callback())

    def cancel(self) -> None:
        """Ask the call to end; unless it was counted before, it says nothing about the backend."""
        if not self._task.done():
            self._count_failure(self._guard.abandoned)
            self._task.cancel()

    def returned(self) -> T | None:
        """What it returned in the end, good or not, whoever waited for it; None if it raised or has not ended."""
        task = self._task
        return task.result() if task.done() and not task.cancelled() and task.exception() is None else None

    async def result(self) -> T:
        """Wait for what the backend returns, and check it.

        Raises BackendError for a failure or a wrong number of answers, CallTimeoutError for silence. Where the waiter
        is cancelled, the call goes on.
        """
        task = self._task
        await asyncio.wait((task,), timeout=self._timeout_seconds)
        if not task.done():
            why = f"did not answer within {self._timeout_seconds} s"
            self._count_failure(self._guard.failed, why)
            task.cancel()
            raise CallTimeoutError(f"{self._guard.name} {why}")
        self._ended(task)  # counted before it is told: who makes the next call finds the breaker as it is by now
        if task.cancelled():
            raise BackendError(f"the call to {self._guard.name} was cancelled")
        error = self._error()
        if error is not None:
            raise BackendError(f"{self._guard.name} failed: {error}") from error
        return task.result()

    def _error(self) -> BaseException | None:
        error = self._task.exception()
        if error is None and self._answers is not None:
            result: Any = self._task.result()
            if not isinstance(result, list) or len(result) != self._answers:
                return BackendError(f"it did not answer {self._answers} questions with a list of as many answers")
        return error

    def _ended(self, task: "asyncio.Task[T]") -> None:
        if task.cancelled():
            self._count_failure(self._guard.abandoned)
        elif (error := self._error()) is not None:
            self._count_failure(self._guard.failed, repr(error))
        elif _brought_nothing(task.result()):
            self._count_failure(self._guard.failed, "nothing that was asked for could be read")
        else:
            self._count(self._guard.succeeded)

    def _count_failure(self, outcome: Callable[..., None], *arguments: str) -> None:
        """Count it, unless another call is the trial now, of which one that began before says nothing."""
        says_something = self._is_trial or self._guard.breaker.state is not _HALF_OPEN
        self._count(outcome, *arguments, says_something=says_something)

    def _count(self, outcome: Callable[..., None], *arguments: str, says_something: bool = True) -> None:
        if not self._counted:
            self._counted = True
            self._guard.calls[self._verb, outcome.__name__] += 1
            if says_something:
                outcome(*arguments)


class Guard:
    """A backend with its timeouts, its breaker, its meter, and the calls that are out."""

    def __init__(
        self, backend: Backend, breaker: Breaker, timeouts: Timeouts | None = None, ledger: Ledger | None = None
    ):
        self.backend = backend
        self.breaker = breaker
        self.timeouts = timeouts if timeouts is not None else Timeouts()
        self.meter = Meter()
        self.state = BackendState.ACTIVE
        self.doubtful: set[ObjectKey] = set()
        """Objects that could not be read: though a lookup may find them, they are to be stored anew."""
        self.calls: Counter[tuple[str, str]] = Counter()
        """How many calls there were, by what was asked and how it ended: succeeded, failed, abandoned."""
        self.answered_at_once = 0
        """Lookups that needed no call."""
        self.stored_bytes = 0
        self.uses = 0
        """Pins that are held, and those who need the backend to stay: it is not closed before they are gone."""
        self._unused: asyncio.Event | None = None  # while somebody waits for that
        self._storing: dict[Call[list[bool]], Sequence[ObjectKey]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()
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

    @property
    def name(self) -> str:
        """The name of the backend."""
        return self.backend.name

    # Calls.

    def allows(self) -> bool:
        """Whether the breaker would let a call through now."""
        return self.breaker.allows(self._loop.time())

    def begin_load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> Call[list[LoadOutcome]] | None:
        """Begin to load objects; None where the backend is left alone."""
        call = self._begin(self.timeouts.load_seconds, len(keys), self.backend.load, keys, buffers)
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
        return self._begin(self.timeouts.load_seconds, len(keys), self.backend.load_listed, keys, sizes, room)

    def begin_store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> Call[list[bool]] | None:
        """Begin to store objects; None where the backend is left alone."""
        call = self._begin(self.timeouts.store_seconds, len(keys), self.backend.store, keys, buffers)
        if call is not None:
            self._storing[call] = keys
            call.when_ended(partial(self._store_ended, call, list(map(len, buffers))))
        return call

    def _store_ended(self, call: Call[list[bool]], sizes: Sequence[int]) -> None:
        keys, stored = self._storing.pop(call), call.returned()
        if isinstance(stored, list):
            self.stored_bytes += sum(compress(sizes, stored))
            for chunk_hash in {key.chunk_hash for key in _those_found(keys, stored)}:
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

    def _begin(
        self, timeout_seconds: float, answers: int | None, verb: Callable[..., Awaitable[T]], *arguments: Any
    ) -> Call[T] | None:
        if not self.breaker.begin(self._loop.time()):
            return None
        name = getattr(verb, "__name__", "call").lstrip("_")
        return Call(self, name, self._start(verb, *arguments), timeout_seconds, answers)

    def _start(self, verb: Callable[..., Awaitable[T]], *arguments: Any) -> "asyncio.Task[T]":
        """A task of its own, owned here until it ends."""
        task = self._loop.create_task(_call(verb, arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def lookup_nowait(self, layout: ModelLayout, chunk_hashes: Sequence[bytes], mask: int) -> list[bool] | None:
        """For each chunk, whether all objects of a mask are present, and then pinned; None: `lookup` must be asked."""
        if self.breaker.state is not _CLOSED or self.backend.shared:  # what others may have changed has to be asked
            return None
        try:
            found = self.backend.lookup_nowait(chunk_hashes, layout.objects.members[mask])
        except (Exception, asyncio.CancelledError):
            log.exception("backend %s could not say at once what it holds", self.name)
            return None
        if found is None:
            return None
        if isinstance(found, list) and len(found) == len(chunk_hashes):
            self.answered_at_once += 1
            self.uses += _count(found) * mask.bit_count()
            return found
        log.error("backend %s did not answer at once with a list of %d", self.name, len(chunk_hashes))
        if isinstance(found, list):
            there = [(chunk_hash, mask) for chunk_hash, is_there in zip(chunk_hashes, found, strict=False) if is_there]
            self._tell(self.backend.unpin, layout.objects.keys(there))
        return None

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool] | None:
        """For each key, whether its object is present, and then pinned.

        None where the backend failed, stayed silent or is left alone: it pins nothing then, or gives it back.
        """
        call = self._begin(self.timeouts.lookup_seconds, len(keys), self.backend.lookup, keys)
        if call is None:
            return None
        with self.kept():
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
                self._tell(self.backend.unpin, _those_found(keys, found))

        call.when_ended(answered)

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        """Remove objects, and say how many were there. Raises BackendError."""
        deleted = await self._carried_out(self.backend.delete, keys)
        if not isinstance(deleted, int):
            raise BackendError(f"{self.name} did not say how much it deleted")
        for chunk_hash in dict.fromkeys([key.chunk_hash for key in keys]):
            self._ledger.left(self.name, chunk_hash, Removal.DELETED)
        return deleted

    async def next_keys(self, listing: Listing, count: int) -> list[tuple[ObjectKey, int]]:
        """The next objects of all that the backend holds, and their sizes in bytes; fewer than `count` at the end.

        Raises BackendError.

        Each step has the time of a store: a backend that goes on may take as long as it needs for millions.
        """
        return await self._carried_out(_next_keys, self.backend, listing, count)

    async def close_listing(self, listing: Listing) -> None:
        """End a listing, which may have been left in the middle."""
        close = getattr(listing[0], "aclose", None) if listing else None
        if close is not None:
            closing = self._start(close)
            await asyncio.wait((closing,), timeout=self.timeouts.store_seconds)
            if not closing.cancel() and not closing.cancelled():
                closing.exception()  # looked at: a listing that cannot be closed does no harm

    async def _carried_out(self, verb: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        call = self._begin(self.timeouts.store_seconds, None, verb, *arguments)
        if call is None:
            raise BackendError(f"{self.name} is left alone after failures")
        try:
            return await call.result()
        finally:
            call.cancel()

    def doubt(self, keys: Iterable[ObjectKey]) -> None:
        """Take note of objects that could not be read."""
        if len(self.doubtful) > _MAX_DOUBTFUL:
            self.doubtful.clear()  # it costs no more than that they are not replaced
        self.doubtful.update(keys)

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """Give back one pin of each key. What the backend raises is logged."""
        self._tell(self.backend.unpin, keys)
        self._no_longer_used(len(keys))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Have the backend stay open within the block."""
        self.uses += 1
        try:
            yield
        finally:
            self._no_longer_used(1)

    def _no_longer_used(self, uses: int) -> None:
        self.uses -= uses
        if self._unused is not None and self.uses <= 0:
            self._unused.set()

    async def wait_until_unused(self) -> None:
        """Wait until nobody uses the backend: it has an end where nobody begins to, since every call has."""
        while self.uses > 0:
            self._unused = asyncio.Event()
            await self._unused.wait()

    @contextmanager
    def in_use(self, chunk_hashes: Sequence[bytes]) -> Iterator[None]:
        """Chunks in front of what is looked up or stored: they stay meanwhile, and were used as recently.

        They come in the order of their prefix. What the backend raises is logged.
        """
        self._tell(self.backend.pin_prefix, chunk_hashes)
        try:
            yield
        finally:
            self._tell(self.backend.unpin_prefix, chunk_hashes)

    def touch_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        """Say that these chunks were used just now, in the order of their prefix."""
        with self.in_use(chunk_hashes):
            pass

    def _tell(self, verb: Callable[[Sequence[T]], None], what: Sequence[T]) -> None:
        if not what:
            return
        try:
            verb(what)
        except (Exception, asyncio.CancelledError):
            log.exception("backend %s could not %s", self.name, getattr(verb, "__name__", verb))

    def unpin_found(self, keys: Sequence[ObjectKey], found: Sequence[bool]) -> None:
        """Give back the pins of those keys that were found. There may be fewer or more answers than keys."""
        self.unpin(_those_found(keys, found))

    def usage(self) -> BackendUsage | None:
        """What the backend holds, as far as it knows; None if it cannot say."""
        try:
            return self.backend.usage()
        except (Exception, asyncio.CancelledError):
            log.exception("backend %s could not say what it holds", self.name)
            return None

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
            log.warning("backend %s: %d calls have not ended at close", self.name, len(stuck))
        for task in tasks - stuck:
            if not task.cancelled():
                task.exception()  # looked at: nobody else does

    def __repr__(self) -> str:
        return f"<Guard of {self.backend!r}, {self.breaker.state.value}, {len(self._tasks)} calls out>"

    # What calls say of the backend.

    def succeeded(self) -> None:
        """Count a call that succeeded."""
        if self.breaker.state is not _CLOSED:
            log.info("backend %s is back", self.name)
        self.breaker.succeeded()

    def failed(self, why: str) -> None:
        """Count a call that failed, or did not end in time; `why` is logged."""
        before = self.breaker.state
        self.breaker.failed(self._loop.time())
        left_alone = before is _CLOSED and self.breaker.state is _OPEN
        log.warning("backend %s: %s%s", self.name, why, "; it is left alone for a while" if left_alone else "")

    def abandoned(self) -> None:
        """Count a call that was given up by its caller, and says nothing."""
        self.breaker.abandoned(self._loop.time())


def _brought_nothing(result: Any) -> bool:
    """Whether it is the answer of a load of which every object failed."""
    return isinstance(result, list) and bool(result) and all(outcome is LoadOutcome.FAILED for outcome in result)


def _count(found: Sequence[bool]) -> int:
    """How many answers say that an object is there."""
    return len(list(filter(None, found)))


def _those_found(keys: Sequence[ObjectKey], found: Sequence[bool]) -> list[ObjectKey]:
    return [key for key, there in zip(keys, found, strict=False) if there]


async def _next_keys(backend: Backend, listing: Listing, count: int) -> list[tuple[ObjectKey, int]]:
    """The next objects of a listing, which is begun with the first."""
    if not listing:
        listing.append(aiter(backend.keys()))
    objects: list[tuple[ObjectKey, int]] = []
    async for key, size_bytes in listing[0]:
        objects.append((key, size_bytes))
        if len(objects) == count:
            break
    return objects


async def _call(verb: Callable[..., Awaitable[T]], arguments: tuple[Any, ...]) -> T:
    """Call and await a backend in one coroutine, so that whatever it raises, and when, is raised in the call's task."""
    return await verb(*arguments)
