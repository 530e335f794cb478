"""What is wrong with a server, if something is, in words for an operator."""

from itertools import islice

from msgspec import Struct

from async_cache.core import Core
from async_cache.l2.guard.breaker import BreakerState
from async_cache.metrics.watch import Watch
from async_cache.read.request import Request

MAX_LAG_SECONDS = 1.0
_LATE_SECONDS = 5.0  # beyond a deadline: what is late by less may only be slow
_LOOKED_AT = 10_000  # requests, the oldest first


class Problem(Struct, frozen=True):
    """Something that an operator should look at. `what` is one of task, sweeper, quarantine, breaker and lag."""

    what: str
    detail: str


def problems(watch: Watch) -> list[Problem]:
    """What is wrong now; nothing with a server that is well."""
    core, found = watch.core, []
    late = _most_overdue(core, watch.clock())
    if late is not None:
        request, seconds = late
        detail = f"request {shown_id(request.request_id)!r} is {request.state.value} {seconds:.0f} s after its deadline"
        found.append(Problem("task", detail))
    if core.sweeping.done():
        found.append(Problem("sweeper", "what nobody comes back for is not given back any more"))
    if core.l1.quarantined_bytes:
        detail = f"{core.l1.quarantined_bytes} bytes of L1 are set aside: I/O that should have ended may touch them"
        found.append(Problem("quarantine", detail))
    for guard in core.guards.current:
        if guard.breaker.state is not BreakerState.CLOSED:
            found.append(Problem("breaker", f"backend {guard.name} is left alone: {guard.breaker.state.value}"))
    if watch.worst_lag_seconds > MAX_LAG_SECONDS:
        found.append(Problem("lag", f"the event loop was held for {watch.worst_lag_seconds:.1f} s"))
    return found


def shown_id(request_id: str) -> str:
    """A request id as its client knows it: what keeps those of tenants apart stands before it."""
    return request_id.rpartition("\0")[2]


def _most_overdue(core: Core, now: float) -> tuple[Request, float] | None:
    """The request that is pending for the longest time after its deadline, if one is; and how long."""
    if not core.requests.pending:
        return None
    longest = _longest_seconds(core)
    overdue = [
        (seconds, request)
        for request in islice(core.requests, _LOOKED_AT)
        if request.pending and (seconds := now - _deadline(request, longest)) > _LATE_SECONDS
    ]
    if not overdue:
        return None
    seconds, request = max(overdue, key=lambda pair: pair[0])
    return request, seconds


def _deadline(request: Request, longest_seconds: float) -> float:
    return request.due if request.due is not None else request.began + longest_seconds


def _longest_seconds(core: Core) -> float:
    """What a request without a deadline may take: one lookup, and a load from each holder, one after the other."""
    timeouts = [guard.timeouts for guard in core.guards.current]
    lookups = max((timeout.lookup_seconds for timeout in timeouts), default=0.0)
    return 2 * lookups + sum(timeout.load_seconds for timeout in timeouts)
