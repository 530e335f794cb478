"""One backend as the cache sees it: every call has an end, failures open a breaker, throughput is measured."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from typing import Any, TypeVar

from async_cache.errors import BackendError
from async_cache.l2.backend import Backend
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import ModelLayout
from async_cache.values import BackendUsage

T = TypeVar("T")

log = logging.getLogger(__name__)

_DECAY = 0.8  # weight of what was measured before, at each new measurement
_FORGET = 1.1  # by which the fastest call grows with each: a backend may become slower


class CallTimeoutError(BackendError):
    """The call goes on, cancelled but not ended: `call` still owns its buffers."""

    def __init__(self, message: str, call: "asyncio.Task[Any]"):
        super().__init__(message)
        self.call = call


class BreakerState(Enum):
    """CLOSED -> OPEN after failures in a row; OPEN -> HALF_OPEN for one trial; HALF_OPEN -> CLOSED | OPEN by it."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """Leaves a failing backend alone for a while."""

    def __init__(self, failures: int, reset_seconds: float):
        self.state = BreakerState.CLOSED
        self.retry_at = 0.0
        self._limit = failures
        self._reset_seconds = reset_seconds
        self._failures = 0

    def allow(self, now: float) -> bool:
        """Whether a call may be made; one that may must end in `succeeded`, `failed` or `abandoned`."""
        if self.state is BreakerState.OPEN and now >= self.retry_at:
            self.state = BreakerState.HALF_OPEN
            return True
        return self.state is BreakerState.CLOSED

    def succeeded(self) -> None:
        """The backend is well."""
        self._failures = 0
        self.state = BreakerState.CLOSED

    def failed(self, now: float) -> None:
        """One more failure."""
        self._failures += 1
        if self.state is BreakerState.HALF_OPEN or self._failures >= self._limit:
            self.state = BreakerState.OPEN
            self.retry_at = now + self._reset_seconds

    def abandoned(self) -> None:
        """The call was given up, and says nothing: the next one tries."""
        if self.state is BreakerState.HALF_OPEN:
            self.state = BreakerState.OPEN


class Guard:
    """A backend with its breaker, the calls that are out, and what is known of its speed."""

    def __init__(self, backend: Backend, breaker: Breaker):
        self.backend = backend
        self.breaker = breaker
        self.queued_bytes = 0  # loads that were asked for and have not ended
        self._calls: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()
        self._bytes = self._seconds = 0.0
        self._measured_at = 0.0
        self._fastest_call_seconds: float | None = None  # of late: no load takes less
        self._idle = asyncio.Event()
        self._idle.set()

    # Calls.

    def start(self, verb: Callable[..., Awaitable[T]], *arguments: Any) -> "asyncio.Task[T]":
        """A call in a task of its own, owned here until it ends. It must be waited for with `finish`."""
        call = self._loop.create_task(_call(verb, arguments))
        self._calls.add(call)
        call.add_done_callback(self._ended)
        return call

    async def finish(self, call: "asyncio.Task[T]", timeout_seconds: float, answers: int | None = None) -> T:
        """The result of a call, of so many answers. Raises BackendError for a failure, CallTimeoutError for silence."""
        try:
            await asyncio.wait((call,), timeout=timeout_seconds)
        except asyncio.CancelledError:
            self.breaker.abandoned()
            raise
        if not call.done():
            call.cancel()
            self._failed(f"did not answer within {timeout_seconds} s")
            raise CallTimeoutError(f"{self.backend.name} did not answer within {timeout_seconds} s", call)
        if call.cancelled():
            self.breaker.abandoned()
            raise BackendError(f"the call to {self.backend.name} was cancelled")
        error = call.exception()
        if error is None and answers is not None:
            result = call.result()
            if not isinstance(result, list) or len(result) != answers:
                error = BackendError(f"it did not answer {answers} questions with a list of as many answers")
        if error is not None:
            self._failed(repr(error))
            raise BackendError(f"{self.backend.name} failed: {error}") from error
        if self.breaker.state is not BreakerState.CLOSED:
            log.info("backend %s is back", self.backend.name)
        self.breaker.succeeded()
        return call.result()

    def allows(self) -> bool:
        """Whether the breaker lets a call through; if so, `finish` must follow."""
        return self.breaker.allow(self._loop.time())

    def lookup_nowait(self, layout: ModelLayout, chunk_hashes: Sequence[bytes], mask: int) -> list[bool] | None:
        """For each chunk, whether all objects of a mask are there, and pinned; None if the backend must be asked."""
        if self.breaker.state is not BreakerState.CLOSED:
            return None
        try:
            found = self.backend.lookup_nowait(chunk_hashes, layout.objects.members[mask])
        except (Exception, asyncio.CancelledError):
            log.exception("backend %s could not say at once what it holds", self.backend.name)
            return None
        if found is None or (isinstance(found, list) and len(found) == len(chunk_hashes)):
            return found
        log.error("backend %s did not answer at once with a list of %d", self.backend.name, len(chunk_hashes))
        if isinstance(found, list):
            there = [(chunk_hash, mask) for chunk_hash, is_there in zip(chunk_hashes, found, strict=False) if is_there]
            self.unpin(layout.objects.keys(there))
        return None

    async def lookup(self, keys: Sequence[ObjectKey], timeout_seconds: float) -> list[bool] | None:
        """Which objects are there, and pinned; None if the backend failed, stayed silent, or is left alone."""
        if not self.allows():
            return None
        call = self.start(self.backend.lookup, keys)
        try:
            return await self.finish(call, timeout_seconds, len(keys))
        except BackendError:
            self._unpin_late(call, keys)
            return None
        except asyncio.CancelledError:
            call.cancel()
            self._unpin_late(call, keys)
            raise

    async def delete(self, keys: Sequence[ObjectKey], timeout_seconds: float) -> int:
        """Remove objects. Raises BackendError."""
        if not self.allows():
            raise BackendError(f"{self.backend.name} is left alone after failures")
        call = self.start(self.backend.delete, keys)
        try:
            deleted = await self.finish(call, timeout_seconds)
        finally:
            call.cancel()
        if not isinstance(deleted, int):
            raise BackendError(f"{self.backend.name} did not say how much it deleted")
        return deleted

    async def keys(self, timeout_seconds: float) -> list[ObjectKey]:
        """Every object that it holds. Raises BackendError."""
        if not self.allows():
            raise BackendError(f"{self.backend.name} is left alone after failures")
        call = self.start(_list_keys, self.backend)
        try:
            return await self.finish(call, timeout_seconds)
        finally:
            call.cancel()

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """Give back a pin of each key."""
        if not keys:
            return
        try:
            self.backend.unpin(keys)
        except (Exception, asyncio.CancelledError):
            log.exception("backend %s could not unpin", self.backend.name)

    def unpin_found(self, keys: Sequence[ObjectKey], found: Sequence[bool]) -> None:
        """Give back the pins of those that were found."""
        self.unpin([key for key, there in zip(keys, found, strict=False) if there])

    def _unpin_late(self, call: "asyncio.Task[list[bool]]", keys: Sequence[ObjectKey]) -> None:
        def answered(call: "asyncio.Task[list[bool]]") -> None:
            if not call.cancelled() and call.exception() is None and isinstance(call.result(), list):
                self.unpin_found(keys, call.result())

        call.add_done_callback(answered)

    def _failed(self, why: str) -> None:
        before = self.breaker.state
        self.breaker.failed(self._loop.time())
        left_alone = before is BreakerState.CLOSED and self.breaker.state is BreakerState.OPEN
        log.warning("backend %s: %s%s", self.backend.name, why, "; it is left alone for a while" if left_alone else "")

    def _ended(self, call: "asyncio.Task[Any]") -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # looked at, also where nobody waits any more

    async def close(self, timeout_seconds: float) -> None:
        """Cancel the calls that are out, and wait for them and for the backend, but not for ever."""
        calls = set(self._calls)
        for call in calls:
            call.cancel()
        calls.add(self.start(self.backend.close))
        _, stuck = await asyncio.wait(calls, timeout=timeout_seconds)
        for call in stuck:
            call.cancel()
        if stuck:
            log.warning("backend %s: %d calls have not ended at close", self.backend.name, len(stuck))

    def usage(self) -> BackendUsage | None:
        """What it holds, as far as it knows; None if it can not say."""
        try:
            return self.backend.usage()
        except (Exception, asyncio.CancelledError):
            log.exception("backend %s could not say what it holds", self.backend.name)
            return None

    # Loads, and how fast they are.

    def load_queued(self, size_bytes: int) -> None:
        """So many more bytes are to be loaded."""
        if not self.queued_bytes:
            self._measured_at = self._loop.time()
            self._idle.clear()
        self.queued_bytes += size_bytes

    def load_ended(self, size_bytes: int, loaded: bool, call_seconds: float = 0.0) -> None:
        """So many bytes are no longer to be loaded; if they were, it took the time since the last that were.

        `call_seconds`: what its call took: where many are out at a time, all together may take no longer than one.
        """
        now = self._loop.time()
        self.queued_bytes -= size_bytes
        if loaded:
            fastest = self._fastest_call_seconds
            self._fastest_call_seconds = min(call_seconds, fastest * _FORGET) if fastest is not None else call_seconds
            self._bytes = self._bytes * _DECAY + size_bytes
            self._seconds = self._seconds * _DECAY + now - self._measured_at
        self._measured_at = now
        if not self.queued_bytes:
            self._idle.set()

    def expected_load_seconds(self, size_bytes: int) -> float | None:
        """How long it should take until so many more bytes are loaded; None before the first measurement."""
        if not self._bytes:
            return None
        return max((self.queued_bytes + size_bytes) * self._seconds / self._bytes, self._fastest_call_seconds or 0.0)

    async def wait_for_loads(self, timeout_seconds: float) -> None:
        """Until no load is queued or under way, or the time is over."""
        if self.queued_bytes:
            waiter = self._loop.create_task(self._idle.wait())
            try:
                await asyncio.wait((waiter,), timeout=timeout_seconds)
            finally:
                waiter.cancel()


async def _list_keys(backend: Backend) -> list[ObjectKey]:
    return [key async for key, _ in backend.keys()]


async def _call(verb: Callable[..., Awaitable[T]], arguments: tuple[Any, ...]) -> T:
    """So that whatever a backend raises, and when, is raised in the call's own task."""
    return await verb(*arguments)
