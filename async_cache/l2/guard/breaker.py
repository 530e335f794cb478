"""A circuit breaker: leaves a failing backend alone for a while."""

from enum import Enum


class BreakerState(Enum):
    """Whether calls are made.

    CLOSED -> OPEN             after failures in a row
    OPEN -> HALF_OPEN          when a trial begins
    HALF_OPEN -> CLOSED        the trial succeeded
    HALF_OPEN -> OPEN          it failed, or was given up
    OPEN -> CLOSED             a call that had begun before succeeded, of the kind that failed
    """

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


_CLOSED, _OPEN, _HALF_OPEN = BreakerState  # each access to a member by its enum is a call, in Python 3.11


class Breaker:
    """Counts failures in a row: after `failures` of them no call is made for `reset_seconds`, and then one trial."""

    def __init__(self, failures: int, reset_seconds: float):
        self.state = _CLOSED
        self.retry_at = 0.0
        """When the next trial may begin, by the loop's clock, unless it is CLOSED."""
        self.reset_seconds = reset_seconds
        self.limit = failures
        """Failures in a row after which it opens."""
        self._failures = 0

    def allows(self, now: float) -> bool:
        """Whether a call may be made now: while it is CLOSED, or as the trial that is due."""
        return self.state is _CLOSED or now >= self.retry_at

    def begin(self, now: float) -> bool:
        """Whether a call may be made now; the caller makes it then. No other is made during a trial.

        A trial of which nothing is heard within `reset_seconds` is followed by another one.
        """
        if not self.allows(now):
            return False
        if self.state is not _CLOSED:
            self.state = _HALF_OPEN
            self.retry_at = now + self.reset_seconds
        return True

    def succeeded(self) -> None:
        """Count a call that succeeded: the backend is well."""
        self._failures = 0
        self.state = _CLOSED

    def succeeded_beside(self, failures: int, *, is_trial: bool) -> None:
        """Count a call that succeeded, while those of another kind fail, so many in a row by now.

        A trial shows that the backend answers: others are tried then, and the next failure of that kind opens it again.
        """
        self._failures = failures
        if is_trial or failures < self.limit:
            self.state = _CLOSED

    def failed(self, now: float) -> None:
        """Count a call that failed, or did not end in time."""
        self._failures += 1
        if self._failures >= self.limit:  # and so they remain until a success: a trial that fails opens it again
            self.state = _OPEN
            self.retry_at = now + self.reset_seconds

    def abandoned(self, now: float) -> None:
        """Count a call that was given up by its caller: it says nothing, and the next one may be the trial."""
        if self.state is _HALF_OPEN:
            self.state = _OPEN
            self.retry_at = now

    def __repr__(self) -> str:
        return f"<Breaker {self.state.value}, {self._failures} failures in a row of {self.limit}>"
