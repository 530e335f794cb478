"""What is counted, as Prometheus reads it: families of metrics, each made when it is asked for."""

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from async_cache.core import Core
from async_cache.l2.guard.breaker import BreakerState
from async_cache.metrics.histogram import Histogram
from async_cache.metrics.traffic import REASONS, Traffic
from async_cache.metrics.watch import Watch
from async_cache.values import Shortfall

_HELD_SECONDS = 0.001  # then the loop gets its turn
_process = ProcessCollector(registry=None)
Samples = Mapping[Any, float]
"""Values, each by a tuple of the values of its labels."""


class _One(Collector):
    """A family that stands alone."""

    def __init__(self, family: Metric):
        self._family = family

    def collect(self) -> Iterable[Metric]:
        yield self._family


async def exposition(watch: Watch, more: Iterable[Metric] = ()) -> bytes:
    """All families in Prometheus' text format, and some more. The loop is held for a few milliseconds at most."""
    loop = asyncio.get_running_loop()
    parts, began = [], loop.time()
    for family in (*_together(watch), *more):
        parts.append(generate_latest(_One(family)))
        if loop.time() - began > _HELD_SECONDS:
            await asyncio.sleep(0)
            began = loop.time()
    return b"".join(parts)


def _together(watch: Watch) -> Iterator[Metric]:
    """All families, of one moment."""
    yield from _requests(watch.core, watch.traffic)
    yield from _memory(watch.core, watch)
    yield from _moving(watch.core)
    yield from _backends(watch.core)
    yield histogram("loop_lag_seconds", "How late the event loop was to look at the clock, twice a second", watch.lag)
    yield gauge("tasks", "Tasks of the event loop", {(): len(asyncio.all_tasks())})
    yield from _process.collect()


def _requests(core: Core, traffic: Traffic) -> Iterator[Metric]:
    by_names = dict(traffic.by_names)
    labels = ("tenant", "model")
    yield counter("requests", "Requests that have loaded", {n: t.requests for n, t in by_names.items()}, labels)
    yield counter(
        "prefix_cache_queries",
        "Tokens of whole chunks that were asked for",
        {n: t.asked for n, t in by_names.items()},
        labels,
    )
    hits: dict[tuple[str, ...], float] = {(*names, "l1"): tokens.l1_hits for names, tokens in by_names.items()}
    hits |= {(*names, "l2"): tokens.l2_hits for names, tokens in by_names.items()}
    yield counter("prefix_cache_hits", "Tokens of those that were promised, by tier", hits, (*labels, "tier"))
    yield histogram("lookup_seconds", "From a request to its promise", traffic.lookup)
    yield histogram("load_seconds", "From a request to the end of its load, where there was one", traffic.load)
    yield histogram("gap_seconds", "From the promise to the end of the load: what asking twice wins", traffic.gap)
    missed = {(reason,): traffic.missed.get(reason, 0) for reason in REASONS}
    yield counter("misses", "Requests by why their first missing chunk was missing", missed, ("reason",))
    yield counter("promises_kept", "Requests that got all that they were promised", {(): traffic.kept})
    yield counter("promises_broken", "Requests that got less than promised", _reasons(traffic.broken), ("reason",))
    yield counter("promises_trimmed", "Requests promised less than exists", _reasons(traffic.trimmed), ("reason",))
    requests = core.requests
    states = {("pending",): requests.pending, ("unclaimed",): requests.unclaimed}
    states |= {("in_use",): len(requests) - sum(states.values())}
    yield gauge("requests_held", "Requests that are not over, by their state", states, ("state",))
    swept = {
        ("result",): requests.swept_results,
        ("lease",): requests.swept_leases,
        ("reservation",): core.writing.swept,
    }
    yield counter("swept", "What nobody came back for in time", swept, ("kind",))


def _memory(core: Core, watch: Watch) -> Iterator[Metric]:
    l1, capacity = core.l1, core.arena.size_bytes
    other = l1.used_bytes - l1.leased_bytes - l1.reserved_bytes - l1.quarantined_bytes
    used = {
        ("leased",): l1.leased_bytes,
        ("idle",): other,
        ("reserved",): l1.reserved_bytes,
        ("quarantined",): l1.quarantined_bytes,
        ("free",): capacity - l1.used_bytes,
    }
    yield gauge("l1_bytes", "Memory of L1 by what it holds; all states together are its capacity", used, ("state",))
    yield gauge("l1_capacity_bytes", "Memory of L1", {(): capacity})
    yield gauge("l1_chunks", "Chunks that can be found in L1", {(): len(l1.index)})
    yield gauge("leases", "Pairs of a request and a chunk that it keeps in L1", {(): l1.leases})
    left = {(removal.value,): count for removal, count in l1.left.items()}
    yield counter("l1_removed_chunks", "Chunks that left L1, by the reason", left, ("removal",))
    stays = watch.residence
    yield histogram("chunk_lifetime_seconds", "How long chunks of a sample were in L1", stays.lifetime)
    yield histogram("chunk_idle_before_removal_seconds", "How long they had not been asked for then", stays.idle)
    yield histogram("chunk_reuse_gap_seconds", "Between two requests for a chunk of the sample", stays.reuse_gap)


def _moving(core: Core) -> Iterator[Metric]:
    yield counter("loaded_objects", "Objects that were asked of backends", {(): core.loader.loads})
    yield counter("shared_objects", "Objects that were not, as another request did", {(): core.loader.shared_loads})
    yield gauge("writeback_pending_chunks", "Chunks that wait to be written", {(): core.writeback.pending})
    yield counter("writeback_dropped_chunks", "Chunks that a backend did not get", {(): core.writeback.dropped})


def _backends(core: Core) -> Iterator[Metric]:
    guards = {guard.name: guard for guard in core.guards}
    label = ("backend",)
    breakers: dict[tuple[str, ...], float] = {
        (name, state.value): guard.breaker.state is state for name, guard in guards.items() for state in BreakerState
    }
    yield gauge("backend_breaker", "1 for the state that a backend's breaker is in", breakers, (*label, "state"))
    calls: dict[tuple[str, ...], float] = {
        (name, *kind): count for name, guard in guards.items() for kind, count in guard.calls.items()
    }
    calls |= {(name, "lookup", "at_once"): guard.answered_at_once for name, guard in guards.items()}
    yield counter("backend_calls", "Calls to a backend, by how they ended", calls, (*label, "verb", "outcome"))
    of = {(name,): guard for name, guard in guards.items()}
    loaded = {names: guard.meter.loaded_bytes for names, guard in of.items()}
    yield counter("backend_loaded_bytes", "Bytes that were loaded from a backend", loaded, label)
    stored = {names: guard.stored_bytes for names, guard in of.items()}
    yield counter("backend_stored_bytes", "Bytes that were stored in a backend", stored, label)
    queues = {name: queue for name, guard in guards.items() if (queue := core.writeback.queue(guard)) is not None}
    refused: dict[tuple[str, ...], float] = {
        (name, why): queue.refused[why] for name, queue in queues.items() for why in queue.REFUSALS
    }
    yield counter("backend_refused_chunks", "Chunks that a backend did not admit, and why", refused, (*label, "why"))
    budgets = {names: guard.budget.left_bytes for names, guard in of.items() if guard.budget is not None}
    yield gauge("backend_write_budget_bytes", "Bytes that may be written now, where they have a bound", budgets, label)
    queued = {names: guard.meter.queued_bytes for names, guard in of.items()}
    yield gauge("backend_queued_bytes", "Bytes that are to be loaded from a backend", queued, label)
    pins = {names: guard.uses for names, guard in of.items()}
    yield gauge("backend_pins", "Objects that promises keep in a backend, and what else keeps it open", pins, label)
    usages = {names: usage for names, guard in of.items() if (usage := guard.usage()) is not None}
    used = {names: usage.used_bytes for names, usage in usages.items()}
    yield gauge("backend_used_bytes", "Bytes that a backend holds", used, label)
    bounds = {names: usage.capacity_bytes for names, usage in usages.items() if usage.capacity_bytes is not None}
    yield gauge("backend_capacity_bytes", "What it may hold, where it has a bound", bounds, label)
    yield gauge("backend_objects", "Objects that it holds", {n: usage.objects for n, usage in usages.items()}, label)


def _reasons(counts: Mapping[str, int]) -> Samples:
    """By all reasons that there are: a rate needs what was 0 before."""
    return {(reason.value,): counts.get(reason.value, 0) for reason in Shortfall}


def counter(name: str, text: str, samples: Samples, labels: tuple[str, ...] = ()) -> Metric:
    """A family of what only grows; Prometheus' own `_total` is added to the name."""
    family = CounterMetricFamily(f"async_cache_{name}", text, labels=labels)
    for values, value in samples.items():
        family.add_metric(values, value)
    return family


def gauge(name: str, text: str, samples: Samples, labels: tuple[str, ...] = ()) -> Metric:
    """A family of what goes up and down."""
    family = GaugeMetricFamily(f"async_cache_{name}", text, labels=labels)
    for values, value in samples.items():
        family.add_metric(values, value)
    return family


def histogram(name: str, text: str, of: Histogram) -> Metric:
    """A family of one histogram."""
    family = HistogramMetricFamily(f"async_cache_{name}", text)
    bounds = [*(f"{bound:g}" for bound in of.bounds), "+Inf"]
    family.add_metric((), list(zip(bounds, accumulate(of.counts), strict=True)), of.total)
    return family
