"""One call to a backend: it has an end, and its outcome is counted once."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from async_cache.aio.ending import until_done
from async_cache.errors import BackendError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.guard.breaker import Breaker, BreakerState
from async_cache.l2.guard.failures import Failures
from async_cache.prompt.keys import ObjectKey

T = TypeVar("T")

_HALF_OPEN = BreakerState.HALF_OPEN  # each access to a member by its enum is a call, in Python 3.11


class CallTimeoutError(BackendError):
    """A call took too long. It was cancelled, but may not have ended: until then it owns its buffers."""


class Judge(Protocol):
    """Who counts the outcomes of calls, and concludes from them how the backend is."""

    breaker: Breaker
    calls: Counter[tuple[str, str]]
    """How many calls there were, by what was asked and how it ended: succeeded, failed, abandoned."""
    failing: defaultdict[str, Failures]
    """Failures in a row, by what was asked."""

    @property
    def name(self) -> str:
        """The name of the backend."""

    def succeeded(self, verb: str, *, is_trial: bool) -> None:
        """Conclude from a call that succeeded."""

    def failed(self, why: str) -> None:
        """Conclude from a call that failed, or did not end in time."""

    def abandoned(self) -> None:
        """Conclude from a call that was given up by its caller."""


class Call(Generic[T]):
    """One call to a backend, in a task of its own, which owns its buffers until it has ended, whoever gives it up.

    Its outcome is counted once, by whichever comes first: its end, its timeout, or that it is cancelled.
    """

    __slots__ = ("_answers", "_counted", "_guard", "_is_trial", "_keys", "_task", "_timeout_seconds", "_verb")

    def __init__(
        self,
        guard: "Judge",
        verb: str,
        task: "asyncio.Task[T]",
        timeout_seconds: float,
        keys: Sequence[ObjectKey],
        *,
        answers: bool,
    ):
        self._guard = guard
        self._verb = verb
        self._task = task
        self._timeout_seconds = timeout_seconds
        self._keys = keys  # of the objects that it is about
        self._answers = answers  # whether there is to be one for each of them
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
            self._count("abandoned")
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
        await until_done(task.get_loop(), task, timeout_seconds=self._timeout_seconds)
        if not task.done():
            why = f"did not answer within {self._timeout_seconds} s"
            self._count("failed", why)
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
        if error is None and self._answers:
            result: Any = self._task.result()
            if not isinstance(result, list) or len(result) != len(self._keys):
                return BackendError(f"it did not answer {len(self._keys)} questions with a list of as many answers")
        return error

    def _ended(self, task: "asyncio.Task[T]") -> None:
        if task.cancelled():
            self._count("abandoned")
        elif (error := self._error()) is not None:
            self._count("failed", repr(error), suspects=self._keys)
        elif _brought_nothing(task.result()):
            self._count("failed", "nothing that was asked for could be read", suspects=self._keys)
        else:
            self._count("succeeded")

    def _count(self, outcome: str, why: str = "", *, suspects: Sequence[ObjectKey] = ()) -> None:
        """Count its outcome, once. While another call is the trial, a failure of one from before says nothing."""
        if self._counted:
            return
        self._counted = True
        guard, verb = self._guard, self._verb
        guard.calls[verb, outcome] += 1
        if outcome == "succeeded":
            guard.succeeded(verb, is_trial=self._is_trial)
        elif not self._is_trial and guard.breaker.state is _HALF_OPEN:
            return
        elif outcome == "abandoned":
            guard.abandoned()
        else:
            guard.failing[verb].add(suspects, guard.breaker.limit)
            guard.failed(why)


def _brought_nothing(result: Any) -> bool:
    """Whether it is the answer of a load of which every object failed."""
    return isinstance(result, list) and bool(result) and all(outcome is LoadOutcome.FAILED for outcome in result)
