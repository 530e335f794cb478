"""Spans of OpenTelemetry for the phases of prefetches: made when one has loaded, from when it began.

`async_cache.load` is a prefetch from its call to `load_done`, in the context that was given or that called it. In it
are `async_cache.lookup`, to `lookup_done`, and `async_cache.gap`, from there on: the count is known, the bytes travel.
"""

import asyncio
import time
from typing import Any
from weakref import WeakKeyDictionary

from async_cache.errors import ConfigError
from async_cache.handles.prefetch import Prefetch
from async_cache.observe import Observer
from async_cache.read.request import Request
from async_cache.values import LoadResult, LookupHits


class Tracing(Observer):
    """Makes spans with the tracer that the process has set up. Raises ConfigError without the extra `otel`."""

    def __init__(self) -> None:
        try:
            from opentelemetry import propagate, trace
        except ImportError as error:
            raise ConfigError(f"traces: {error.name} is not installed: pip install 'async-kv-cache[otel]'") from error
        self._trace: Any = trace
        self._propagate: Any = propagate
        self._tracer = trace.get_tracer("async_cache")
        self._promised: WeakKeyDictionary[Request, tuple[float, LookupHits]] = WeakKeyDictionary()
        self._clock = asyncio.get_running_loop().time

    def here(self) -> str | None:
        """The `traceparent` of the span that is current where this is called; None if there is none."""
        carrier: dict[str, str] = {}
        self._propagate.inject(carrier)
        return carrier.get("traceparent")

    def promised(self, prefetch: Prefetch, hits: LookupHits) -> None:
        """Note when a lookup was done."""
        request = prefetch.promised
        if isinstance(request, Request):
            self._promised[request] = self._clock(), hits

    def loaded(self, prefetch: Prefetch, result: LoadResult) -> None:
        """Make the spans."""
        request = prefetch.promised
        promised = self._promised.pop(request, None) if isinstance(request, Request) else None
        if promised is None or not isinstance(request, Request):
            return
        promised_at, hits = promised
        now, offset = self._clock(), time.time_ns() - int(self._clock() * 1e9)
        began, found, ended = (offset + int(moment * 1e9) for moment in (request.began, promised_at, now))
        carrier = {"traceparent": request.traceparent} if request.traceparent is not None else {}
        parent = self._propagate.extract(carrier)
        load = self._span("load", parent, began, _of_result(request, result))
        within = self._trace.set_span_in_context(load)
        self._span("lookup", within, began, _of_hits(hits)).end(found)
        self._span("gap", within, found, {}).end(ended)
        load.end(ended)

    def _span(self, phase: str, parent: Any, began: int, attributes: dict[str, Any]) -> Any:
        attributes = {f"async_cache.{name}": value for name, value in attributes.items() if value is not None}
        return self._tracer.start_span(f"async_cache.{phase}", context=parent, start_time=began, attributes=attributes)


def _of_hits(hits: LookupHits) -> dict[str, Any]:
    missed = hits.missed
    return {
        "found_chunks": hits.found_chunks,
        "promised_chunks": hits.chunks,
        "load_bytes": hits.load_bytes,
        "shortfall": hits.shortfall,
        "missed": missed.state.value if missed is not None else None,
        "removal": missed.removal.value if missed is not None and missed.removal is not None else None,
        "diverges": missed.diverges if missed is not None else None,
    }


def _of_result(request: Request, result: LoadResult) -> dict[str, Any]:
    return {
        "request_id": request.request_id.rpartition("\0")[2],  # without the tenant and namespace of a server
        "model": request.prompt.layout.model,
        "prompt_tokens": request.prompt.tokens,
        "tokens": result.tokens,
        "l1_chunks": result.l1_chunks,
        "l2_chunks": result.l2_chunks,
        "shortfall": result.shortfall,
    }
