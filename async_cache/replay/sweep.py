"""A trace under many policies and capacities: what each would have found."""

from collections.abc import Callable, Iterable, Iterator

from msgspec import Struct

from async_cache.recording.trace import Trace
from async_cache.replay.foresight import PerfectForesight
from async_cache.replay.run import Clock, Found, replay
from async_cache.retention.policies import make_policy

FORESIGHT = "foresight"
"""The name of perfect foresight, beside those of the policies."""


class Point(Struct, frozen=True):
    """What one policy found with one capacity."""

    policy: str
    capacity_bytes: int
    found: Found


def sweep(
    trace: Trace,
    policies: Iterable[str],
    capacities: Iterable[int],
    bytes_per_token: int,
    *,
    measured_share: float = 0.5,
    outputs: bool = True,
    on_request: Callable[[], None] = lambda: None,
) -> Iterator[Point]:
    """Replay the trace anew for each policy and capacity; the last requests, of this share, are counted.

    Raises ConfigError for a policy that there is none of.
    """
    measured_from = round(len(trace.requests) * (1 - measured_share))
    for name in policies:
        for capacity_bytes in capacities:
            clock = Clock()
            policy = PerfectForesight(trace) if name == FORESIGHT else make_policy(name, clock)
            found = replay(
                trace,
                capacity_bytes,
                bytes_per_token,
                policy,
                clock,
                measured_from=measured_from,
                outputs=outputs,
                on_request=on_request,
            )
            yield Point(name, capacity_bytes, found)
