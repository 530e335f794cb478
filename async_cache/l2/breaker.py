"""A circuit breaker: leaves a failing backend alone for a while."""

from enum import Enum


class BreakerState(Enum):
    """CLOSED -> OPEN after failures in a row; OPEN -> HALF_OPEN for one trial; HALF_OPEN -> CLOSED | OPEN by it."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """Counts failures in a row: after `failures` of them no call is made for `reset_seconds`, and then one trial."""

    def __init__(self, failures: int, reset_seconds: float):
        self.state = BreakerState.CLOSED
        self.retry_at = 0.0
        """When the next trial may begin, by the loop's clock, unless it is CLOSED."""
        self._limit = failures
        self._reset_seconds = reset_seconds
        self._failures = 0

    def allows(self, now: float) -> bool:
        """Whether a call may be made now: while it is CLOSED, or as the trial that is due."""
        return self.state is BreakerState.CLOSED or now >= self.retry_at

    def begin(self, now: float) -> bool:
        """The same, and the call is about to be made: a trial has its turn, and no other until it is over.

        A trial of which nothing is heard within `reset_seconds` is followed by another one.
        """
        if not self.allows(now):
            return False
        if self.state is not BreakerState.CLOSED:
            self.state = BreakerState.HALF_OPEN
            self.retry_at = now + self._reset_seconds
        return True

    def succeeded(self) -> None:
        """A call succeeded: the backend is well."""
        self._failures = 0
        self.state = BreakerState.CLOSED

    def failed(self, now: float) -> None:
        """A call failed, or did not end in time."""
        self._failures += 1
        if self.state is BreakerState.HALF_OPEN or self._failures >= self._limit:
            self.state = BreakerState.OPEN
            self.retry_at = now + self._reset_seconds

    def abandoned(self, now: float) -> None:
        """A call was given up by its caller, and says nothing: the next one may be the trial."""
        if self.state is BreakerState.HALF_OPEN:
            self.state = BreakerState.OPEN
            self.retry_at = now
