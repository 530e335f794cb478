"""`async-cache size`: how much memory a model and its requests want, and what that would find."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from async_cache.cli.drawing import percent
from async_cache.cli.replay import (
    MEASURED,
    PlotFile,
    Policies,
    TraceFiles,
    check_policies,
    draw,
    parse_capacities,
    replayed,
)
from async_cache.cli.terminal import Json, console, print_json, show_bytes
from async_cache.recording.trace import read_trace
from async_cache.replay.model import KVModel, read_model
from async_cache.replay.sizing import Demand, capacities, capacity_for, demand
from async_cache.replay.sweep import Point

_TIERS = {"L1": 0.5, "L2": 0.9}
"""By tier, the part of what can be found at all that it is sized for, by itself or with those before it."""


def size(
    model: Annotated[Path, typer.Argument(metavar="MODEL_CONFIG", help="config.json of a model, or its directory.")],
    traces: TraceFiles,
    capacity: Annotated[
        str, typer.Option(metavar="SIZES", help="What to replay, such as 64GiB,1TiB; by default, powers of two.")
    ] = "",
    policy: Policies = "lru",
    kv_dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Of the KV, such as fp8, where it is not the model's.")
    ] = "",
    plot_file: PlotFile = None,
    json: Json = False,
) -> None:
    """Say what a token of a model takes, how large each tier should be for a trace, and what it would find.

    Tiers are sized by the first policy: L1 to find half of what can be found at all, and L2 nine tenths.
    """
    policies = check_policies(policy)
    shape = read_model(model, kv_dtype or None)
    trace = read_trace(*traces)
    of, each = demand(trace), shape.bytes_per_token
    sizes = parse_capacities(capacity, each * trace.chunk_tokens) if capacity else capacities(of, each)
    points = replayed(trace, policies, sizes, each, measured_share=MEASURED, outputs=True)
    own = [point for point in points if point.policy == policies[0]]
    tiers = {name: capacity_for(own, share * of.found.hit_rate) for name, share in _TIERS.items()}
    if json:
        print_json(_fields(shape, trace.chunk_tokens, of, points, tiers))
    else:
        _print(shape, trace.chunk_tokens, of, points, tiers)
    if plot_file is not None:
        draw(points, plot_file, f"{shape.name}, {traces[0].name}")


def _fields(
    shape: KVModel, chunk_tokens: int, of: Demand, points: Sequence[Point], tiers: dict[str, int | None]
) -> dict[str, Any]:
    return {
        "model": {name: getattr(shape, name) for name in shape.__struct_fields__},
        "bytes_per_token": shape.bytes_per_token,
        "chunk_tokens": chunk_tokens,
        "requests": of.requests,
        "seconds": of.seconds,
        "tokens": of.tokens,
        "longest_prompt_bytes": of.longest_tokens * shape.bytes_per_token,
        "distinct_bytes": of.distinct_tokens * shape.bytes_per_token,
        "most_hit_rate": of.found.hit_rate,
        "hit_rates": [
            {"policy": point.policy, "capacity_bytes": point.capacity_bytes, "hit_rate": point.found.hit_rate}
            for point in points
        ],
        "tiers": tiers,
    }


def _print(
    shape: KVModel, chunk_tokens: int, of: Demand, points: Sequence[Point], tiers: dict[str, int | None]
) -> None:
    each = shape.bytes_per_token
    kept = "latent vectors" if shape.latent else "keys and values"
    about = Table.grid(padding=(0, 2))
    about.add_row("model", f"{shape.name}: {shape.layers} layers with {kept}, {shape.numbers:,} {shape.dtype} each")
    about.add_row("a token", show_bytes(each))
    about.add_row(f"a chunk of {chunk_tokens}", show_bytes(each * chunk_tokens))
    if shape.window_layers:
        windowed = f"{shape.window_layers} layers need the last {shape.window_tokens:,} tokens only"
        loaded = show_bytes(shape.loaded_bytes(of.longest_tokens))
        about.add_row("windows", f"{windowed}: of the longest prompt, {loaded} are loaded")
    mean = of.tokens / of.requests
    about.add_row("requests", f"{of.requests:,} in {of.seconds / 60:,.0f} min, of {mean:,.0f} tokens in the mean")
    about.add_row("the longest prompt", f"{of.longest_tokens:,} tokens, {show_bytes(of.longest_tokens * each)}")
    computed = of.computed_tokens_per_second
    about.add_row("all that differs", f"{show_bytes(of.distinct_tokens * each)}, {show_bytes(int(computed * each))}/s")
    about.add_row("can be found at all", f"{100 * of.found.hit_rate:.1f} % of the tokens")
    console.print(about)
    console.print("\nHits, % of the tokens asked for")
    table = Table(box=None, pad_edge=False)
    table.add_column("capacity", justify="right")
    by_policy = {name: {p.capacity_bytes: p for p in points if p.policy == name} for name in _names(points)}
    for name in by_policy:
        table.add_column(name, justify="right")
    for capacity_bytes in sorted({point.capacity_bytes for point in points}):
        rates = [f"{100 * own[capacity_bytes].found.hit_rate:.1f}" for own in by_policy.values()]
        table.add_row(show_bytes(capacity_bytes), *rates)
    console.print(table)
    console.print("\nTiers")
    sized = Table.grid(padding=(0, 2))
    for name, tier_bytes in tiers.items():
        share = f"for {percent(_TIERS[name], 1)} of what can be found"
        sized.add_row(name, show_bytes(tier_bytes) if tier_bytes else "more than was replayed", share)
    console.print(sized)


def _names(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.policy for point in points))
