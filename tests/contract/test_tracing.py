"""Spans of a prefetch: the phases, the parent, and none where they are not asked for."""

import asyncio
import builtins

import pytest
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from async_cache import ConfigError
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import GatedBackend

from .support import LAYOUT, advance, fill, make_prompt, make_tokens, open_cache, seed, settle

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECOND = 10**9


@pytest.fixture(scope="module")
def exporter():
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def finished(exporter):
    """The spans that have ended since the test began, by their names."""
    exporter.clear()

    def finished():
        spans = exporter.get_finished_spans()
        return {span.name.removeprefix("async_cache."): span for span in spans}

    return finished


async def test_the_phases_of_a_prefetch_are_spans_within_what_was_given(finished):
    prompt = make_prompt(3)
    inner = MemoryBackend()
    await seed(inner, prompt)
    gate = GatedBackend(inner, "lookup", "load")
    async with open_cache(gate, traces="otel") as cache:
        prefetch = cache.prefetch(LAYOUT.prompt(make_tokens(4)), request_id="mine", traceparent=PARENT)
        await gate.reached("lookup")
        await advance(0.5)
        gate.release("lookup")
        await prefetch.lookup_done
        await gate.reached("load")
        await advance(3)
        gate.release("load")
        await prefetch.load_done
        await settle()
    spans = finished()
    assert set(spans) == {"load", "lookup", "gap"}
    load, lookup, gap = (spans[name] for name in ("load", "lookup", "gap"))
    assert trace.format_trace_id(load.context.trace_id) == PARENT.split("-")[1]
    assert trace.format_span_id(load.parent.span_id) == PARENT.split("-")[2]
    assert lookup.parent.span_id == gap.parent.span_id == load.context.span_id
    assert load.start_time == lookup.start_time and lookup.end_time == gap.start_time and gap.end_time == load.end_time
    assert (lookup.end_time - lookup.start_time) / SECOND == pytest.approx(0.5, abs=0.1)
    assert (gap.end_time - gap.start_time) / SECOND == pytest.approx(3, abs=0.1)
    assert dict(load.attributes) == {
        "async_cache.request_id": "mine",
        "async_cache.model": "model",
        "async_cache.prompt_tokens": 16,
        "async_cache.tokens": 12,
        "async_cache.l1_chunks": 0,
        "async_cache.l2_chunks": 3,
    }
    assert dict(lookup.attributes) == {
        "async_cache.found_chunks": 3,
        "async_cache.promised_chunks": 3,
        "async_cache.load_bytes": 48,
        "async_cache.missed": "unknown",
        "async_cache.diverges": False,
    }


async def test_what_ends_early_has_its_spans_too(finished):
    gate = GatedBackend(MemoryBackend(), "lookup")
    async with open_cache(gate, traces="otel") as cache:
        prefetch = cache.prefetch(make_prompt(1))
        await gate.reached("lookup")
        prefetch.cancel()
        assert (await prefetch.load_done).chunks == 0
        await settle()
        assert finished()["load"].attributes["async_cache.shortfall"] == "cancelled"
        assert finished()["load"].parent is None
        gate.release("lookup")


@pytest.mark.embedded
async def test_the_parent_is_the_span_of_the_caller(finished):
    prompt = make_prompt(1)
    tracer = trace.get_tracer("test")
    async with open_cache(traces="otel") as cache:
        await fill(cache, prompt)
        with tracer.start_as_current_span("request") as caller:
            prefetch = cache.prefetch(prompt)
        await prefetch.load_done
        await settle()
        assert finished()["load"].parent.span_id == caller.get_span_context().span_id
        assert not cache.core.tracing._promised


async def test_without_the_setting_there_is_no_span(finished):
    prompt = make_prompt(1)
    async with open_cache() as cache:
        await fill(cache, prompt)
        await cache.prefetch(prompt, traceparent=PARENT).load_done
        await settle()
    assert finished() == {}


@pytest.mark.parametrize("parent", ["", "00", PARENT.upper(), PARENT + "-0", PARENT.replace("-", "_"), 5, b"x" * 55])
async def test_what_is_no_parent_is_refused(parent):
    async with open_cache() as cache:
        with pytest.raises((ValueError, TypeError), match="traceparent"):
            cache.prefetch(make_prompt(1), traceparent=parent)


@pytest.mark.embedded
async def test_without_the_extra_it_says_what_to_install(monkeypatch):
    def refuse(name, *args, **kwargs):
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *args, **kwargs)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"traces: opentelemetry is not installed: pip install .*otel"):
        async with open_cache(traces="otel"):
            pass
    await asyncio.sleep(0)


def test_a_traceparent_of_the_library_is_taken():
    carrier = {}
    with trace.get_tracer("test").start_as_current_span("request"):
        propagate.inject(carrier)
    assert len(carrier.get("traceparent", PARENT)) == len(PARENT)
