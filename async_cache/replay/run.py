"""One trace, one policy, one capacity: the real index of L1, without bytes."""

from collections import deque
from collections.abc import Callable
from typing import cast

from msgspec import Struct

from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.memory.arena import Arena
from async_cache.prompt.layout import ModelLayout
from async_cache.prompt.objects import PAGE_BYTES, ObjectGroup
from async_cache.recording.trace import Trace, TracedHint
from async_cache.retention.policy import EvictionPolicy


class Found(Struct, frozen=True):
    """What was found in the part of a trace that counts. `full`: the capacity was used up before that part began."""

    asked_tokens: int
    hit_tokens: int
    full: bool

    @property
    def hit_rate(self) -> float:
        """Hits in tokens, by all that were asked for."""
        return self.hit_tokens / self.asked_tokens if self.asked_tokens else 0.0


class Clock:
    """Time as it passes in a trace, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class _Room(Struct):
    """Memory as far as L1 needs it to decide: how much there is."""

    size_bytes: int
    view: memoryview = memoryview(b"")


def replay(
    trace: Trace,
    capacity_bytes: int,
    bytes_per_token: int,
    policy: EvictionPolicy[Entry],
    clock: Clock,
    *,
    measured_from: int = 0,
    outputs: bool = True,
    on_request: Callable[[], None] = lambda: None,
) -> Found:
    """Ask for every prompt and store what was not found, as an engine would; count from so many requests on.

    `outputs`: whether the policy is told how much each request put out.
    """
    layouts = {n: _layout(n, bytes_per_token) for n in {request.chunk_tokens for request in trace.requests}}
    size = capacity_bytes // PAGE_BYTES * PAGE_BYTES
    l1 = L1Store(cast(Arena, _Room(size)), policy, on_evict_unwritten=lambda entry: None)
    hints = deque(trace.hints)
    asked = hits = 0
    full = False
    for number, request in enumerate(trace.requests):
        on_request()
        while hints and hints[0].at_seconds < request.at_seconds:
            _tell(policy, clock, hints.popleft(), outputs=outputs)
        clock.seconds = request.at_seconds
        path, chunk_tokens, layout = request.path, request.chunk_tokens, layouts[request.chunk_tokens]
        chunk_bytes = bytes_per_token * chunk_tokens
        present = layout.objects.rank_masks[0]
        found: list[Entry] = []
        for chunk_hash in path:
            entry = l1.find(chunk_hash)
            if entry is None:
                break
            found.append(entry)
        if number >= measured_from:
            asked += request.tokens
            hits += min(len(found) * chunk_tokens, request.tokens)
        l1.lease(found)
        policy.asked(path, request.tokens, chunk_tokens, request.output_tokens if outputs else None)
        stored: list[Entry] = []  # pinned, as they are until they are written back
        for place in range(len(found), len(path)):
            if (behind := l1.find(path[place])) is not None:  # only what came before it had left
                l1.pin(behind)
                stored.append(behind)
                continue
            if l1.used_bytes + chunk_bytes > size:
                full = full or number < measured_from
                if not policy.admits(path[place]):
                    break
            reserved = l1.reserve(layout, [(path[place], 0)])
            if not reserved:
                break
            entry = l1.commit(reserved[0], present, after=path[place - 1] if place else None)
            l1.pin(entry)
            stored.append(entry)
        for entry in stored:
            l1.unpin(entry)
        l1.release(reversed(found))
    l1.close()
    return Found(asked, hits, full)


def _layout(chunk_tokens: int, bytes_per_token: int) -> ModelLayout:
    group = ObjectGroup((bytes_per_token * chunk_tokens,), "uint8")
    return ModelLayout("trace", (group,), chunk_tokens=chunk_tokens)


def _tell(policy: EvictionPolicy[Entry], clock: Clock, traced: TracedHint, *, outputs: bool) -> None:
    clock.seconds, hint = traced.at_seconds, traced.hint
    policy.hint(traced.path, hint.output_tokens if outputs else None, hint.returns, hint.within_seconds)
