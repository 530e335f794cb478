"""What the page and `async-cache top` show, as one value."""

import os
from collections import Counter
from itertools import islice

from msgspec import Struct

from async_cache import __version__
from async_cache.core import Core
from async_cache.metrics.histogram import Histogram
from async_cache.metrics.traffic import Traffic
from async_cache.metrics.watch import Sample, Watch
from async_cache.read.request import Request
from async_cache.server.http.health import Problem, problems, shown_id
from async_cache.server.server import Server
from async_cache.values import BackendStatus, CacheStats, Hold, LimitUse

_PENDING, _RECENT, _ROWS = 40, 40, 12  # shown at most
_LOOKED_AT = 4096  # requests


class Tokens(Struct, frozen=True):
    """Tokens of a tenant and model: asked for, and promised by tier."""

    tenant: str
    model: str
    requests: int
    asked: int
    l1_hits: int
    l2_hits: int


class Flight(Struct, frozen=True):
    """A request on its way, or one that was: how long ago it began, and when its futures resolved after that."""

    request_id: str
    tenant: str
    model: str
    ago_seconds: float
    lookup_seconds: float | None
    seconds: float | None
    asked_chunks: int
    l1_chunks: int
    l2_chunks: int
    shortfall: str | None = None


class Times(Struct, frozen=True):
    """A histogram: its bounds, the values between them, and what a half and 99 of 100 are below."""

    bounds: list[float]
    counts: list[int]
    median: float | None
    p99: float | None


class BackendView(Struct, frozen=True):
    """A backend, and what was asked of it since the beginning."""

    status: BackendStatus
    calls: dict[str, dict[str, int]]
    loaded_bytes: int
    stored_bytes: int
    queued_bytes: int


class Tenanted(Struct, frozen=True):
    """A tenant that has had a connection: how often it was over a limit, and what it has of each."""

    tenant: str
    refused: int
    limits: dict[str, LimitUse]


class QuotaUse(Struct, frozen=True):
    """What a salt has of a tier (`backend` None: L1), of one model or of all (None), and may have at most."""

    salt: str
    model: str | None
    backend: str | None
    used_bytes: int
    most_bytes: int


class RecordingUse(Struct, frozen=True):
    """Where requests are recorded to, how many were, and how many were not since the disk did not take them."""

    file: str
    recorded: int
    dropped: int
    used_bytes: int


class Status(Struct, frozen=True):
    """All of it, at one moment."""

    version: str
    process: int
    uptime_seconds: float
    problems: list[Problem]
    worst_lag_seconds: float
    connections: int
    hold: Hold | None
    longest_hold: Hold | None
    tenants: list[Tenanted]
    stats: CacheStats
    pending: int
    unclaimed: int
    tokens: list[Tokens]
    lookup: Times
    load: Times
    gap: Times
    kept: int
    broken: dict[str, int]
    missed: dict[str, int]
    trimmed: dict[str, int]
    removed: dict[str, int]
    quotas: list[QuotaUse]
    flights: list[Flight]
    recent: list[Flight]
    backends: list[BackendView]
    history: list[Sample]
    recording: RecordingUse | None = None


def status(watch: Watch, server: Server) -> Status:
    """What there is to be seen of a cache now, and of the server that serves it."""
    probe = server.probe
    core, traffic, now = watch.core, watch.traffic, watch.clock()
    rows = [Tokens(*names, t.requests, t.asked, t.l1_hits, t.l2_hits) for names, t in traffic.by_names.items()]
    rows.sort(key=lambda row: -row.asked)
    return Status(
        version=__version__,
        process=os.getpid(),
        uptime_seconds=now - watch.began,
        problems=problems(watch),
        worst_lag_seconds=watch.worst_lag_seconds,
        connections=server.connections,
        hold=probe.recent if probe is not None else None,
        longest_hold=probe.longest if probe is not None else None,
        tenants=[Tenanted(account.name, account.refused, account.told()) for account in server.accounts],
        stats=core.stats(),
        pending=core.requests.pending,
        unclaimed=core.requests.unclaimed,
        tokens=rows[:_ROWS] + _rest(rows[_ROWS:]),
        lookup=_times(traffic.lookup),
        load=_times(traffic.load),
        gap=_times(traffic.gap),
        kept=traffic.kept,
        broken=dict(traffic.broken),
        missed=dict(traffic.missed),
        trimmed=dict(traffic.trimmed),
        removed={removal.value: count for removal, count in core.l1.left.items()},
        quotas=_quotas(core),
        flights=_flights(core, watch, now),
        recent=_recent(traffic, watch, now),
        backends=_backends(core),
        history=watch.history,
        recording=_recording(server),
    )


def _recording(server: Server) -> RecordingUse | None:
    recorder = server.recording.recorder
    if recorder is None:
        return None
    return RecordingUse(str(recorder.path), recorder.recorded, recorder.dropped, recorder.used_bytes)


def _rest(rows: list[Tokens]) -> list[Tokens]:
    """Those that are not shown one by one, together."""
    if not rows:
        return []
    sums = [sum(column) for column in zip(*((r.requests, r.asked, r.l1_hits, r.l2_hits) for r in rows), strict=True)]
    return [Tokens("(more)", "", *sums)]


def _times(of: Histogram) -> Times:
    return Times(list(of.bounds), list(of.counts), of.quantile(0.5), of.quantile(0.99))


def _flights(core: Core, watch: Watch, now: float) -> list[Flight]:
    """Requests that are pending, the oldest first."""
    pending = (request for request in islice(core.requests, _LOOKED_AT) if request.pending)
    return [_flight(request, watch, now) for request in islice(pending, _PENDING)]


def _flight(request: Request, watch: Watch, now: float) -> Flight:
    hits = request.hits.value
    return Flight(
        request_id=shown_id(request.request_id),
        tenant=watch.tenant_of(request.request_id),
        model=request.prompt.layout.model,
        ago_seconds=now - request.began,
        lookup_seconds=request.promised_at - request.began if hits is not None else None,
        seconds=None,
        asked_chunks=len(request.prompt) - request.start_chunk,
        l1_chunks=hits.l1_chunks if hits is not None else 0,
        l2_chunks=hits.l2_chunks if hits is not None else 0,
    )


def _recent(traffic: Traffic, watch: Watch, now: float) -> list[Flight]:
    """The last requests that have loaded, the last one first."""
    return [
        Flight(
            request_id=shown_id(it.result.request_id),
            tenant=watch.tenant_of(it.result.request_id),
            model=it.model,
            ago_seconds=now - it.began,
            lookup_seconds=it.promised_at - it.began,
            seconds=it.result.seconds,
            asked_chunks=it.asked_chunks,
            l1_chunks=it.hits.l1_chunks,
            l2_chunks=it.hits.l2_chunks,
            shortfall=it.result.shortfall.value if it.result.shortfall is not None else None,
        )
        for it in traffic.recent[:_RECENT]
    ]


def _quotas(core: Core) -> list[QuotaUse]:
    """Those that are used most first."""
    tiers = [(None, core.l1.bounds), *((guard.name, guard.bounds) for guard in core.guards)]
    rows = [QuotaUse(it.salt, it.model, name, it.used_bytes, it.most_bytes) for name, bounds in tiers for it in bounds]
    return sorted(rows, key=lambda row: -row.used_bytes / row.most_bytes)[:_PENDING]


def _backends(core: Core) -> list[BackendView]:
    by_name = {guard.name: guard for guard in core.guards}
    views = []
    for told in core.backends.statuses():
        guard = by_name[told.name]
        calls: dict[str, dict[str, int]] = {}
        for (verb, outcome), count in (guard.calls + Counter({("lookup", "at_once"): guard.answered_at_once})).items():
            calls.setdefault(verb, {})[outcome] = count
        moved = guard.meter.loaded_bytes, guard.stored_bytes, guard.meter.queued_bytes
        views.append(BackendView(told, calls, *moved))
    return views
