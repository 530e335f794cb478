"""The real index of L1 in virtual time, against an independent simulator and by what must always hold."""

import os
from functools import cache
from pathlib import Path

import pytest
from kvcache_sim.plan import build_execution_plan
from kvcache_sim.policies import simulate_policy
from kvcache_sim.trace import parse_trace_file

from async_cache.recording.trace import Trace, read_trace
from async_cache.replay.sweep import sweep

TRACES = Path(__file__).parents[2] / "benchmarks" / "traces"
GIB = 2**30
BYTES_PER_TOKEN = 320 * 1024  # Llama 3.1 70B in bf16
SIZES = 64, 256, 915, 4096
POINTS = 0.5
"""How far two simulators may be apart, in percent of the tokens."""

LRU = {"conversation": (4.5, 5.2, 13.7, 33.0), "synthetic": (5.3, 19.6, 45.3, 82.6)}
"""What the simulator finds; `test_lru_and_fifo_...` runs it on the shorter trace."""
FORESIGHT = {"conversation": (12.7, 24.5, 37.6, 39.8), "synthetic": (23.7, 45.6, 72.0, 86.3)}
SHARE = {"conversation": (25, 30, 27, 25), "synthetic": (5, 3, 15, 80)}
"""What `prefix` reaches of the gap between them at least, in percent, whatever the seed."""


@cache
def trace_of(name: str) -> Trace:
    return read_trace(TRACES / f"mooncake_{name}_trace.jsonl.gz")


def hit_rates(name: str, policy: str, sizes: tuple[int, ...] = SIZES) -> list[float]:
    points = sweep(trace_of(name), [policy], [size * GIB for size in sizes], BYTES_PER_TOKEN)
    return [100 * point.found.hit_rate for point in points]


@pytest.mark.parametrize("policy", ["lru", "fifo"])
def test_lru_and_fifo_find_what_an_independent_simulator_says(policy: str) -> None:
    trace = parse_trace_file(TRACES / "mooncake_synthetic_trace.jsonl.gz", block_size=512)
    plan = build_execution_plan(trace)
    theirs = [100 * simulate_policy(plan, policy, size * GIB // (512 * BYTES_PER_TOKEN)).hitRate for size in SIZES]
    assert hit_rates("synthetic", policy) == pytest.approx(theirs, abs=POINTS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", LRU)
def test_lru_and_perfect_foresight_find_what_is_known_of_them(name: str) -> None:
    assert hit_rates(name, "lru") == pytest.approx(LRU[name], abs=0.06)
    assert hit_rates(name, "foresight") == pytest.approx(FORESIGHT[name], abs=0.06)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["synthetic", *["conversation"] * bool(os.environ.get("SOAK"))])
def test_prefix_closes_its_part_of_the_gap_between_them(name: str) -> None:
    found = hit_rates(name, "prefix")
    shares = [
        100 * (hits - least) / (most - least)
        for hits, least, most in zip(found, LRU[name], FORESIGHT[name], strict=True)
    ]
    assert all(share >= wanted for share, wanted in zip(shares, SHARE[name], strict=True)), shares


@pytest.mark.parametrize("policy", ["lru", "fifo", "s3fifo", "arc", "tinylfu", "prefix", "foresight"])
def test_with_room_for_all_every_policy_finds_all_that_came_before(policy: str) -> None:
    trace = trace_of("synthetic")
    short = Trace(trace.requests[:300])
    (point,) = sweep(short, [policy], [10**16], BYTES_PER_TOKEN, measured_share=1.0)
    seen: set[bytes] = set()
    hits = 0
    for request in short.requests:
        known = next((n for n, chunk in enumerate(request.path) if chunk not in seen), len(request.path))
        hits += min(known * request.chunk_tokens, request.tokens)
        seen.update(request.path)
    assert point.found.hit_tokens == hits
    assert not point.found.full
