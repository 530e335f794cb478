"""`async-cache replay`: what would have been found of a trace, under which policy and with how much memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from async_cache.cli.terminal import console, show_bytes
from async_cache.config import parse_bytes, prefixed
from async_cache.errors import ConfigError
from async_cache.replay.plot import plot
from async_cache.replay.sweep import FORESIGHT, Point, sweep
from async_cache.replay.trace import read_trace
from async_cache.retention.policies import NAMES

KV_BYTES_PER_TOKEN = 327680  # of Llama 3.1 70B in bf16: 80 layers, keys and values, 8 heads of 128, 2 bytes


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="JSON lines, also with gzip; see docs/eviction.md.")],
    capacity: Annotated[
        str, typer.Option(metavar="SIZES", help="How much memory, such as 64GiB,256GiB.")
    ] = "64GiB,256GiB,1TiB,4TiB",
    policy: Annotated[
        str, typer.Option(metavar="NAMES", help=f"Which policies, of {', '.join(NAMES)} and {FORESIGHT}.")
    ] = f"fifo,lru,prefix,{FORESIGHT}",
    bytes_per_token: Annotated[
        str, typer.Option(metavar="SIZE", help="KV of one token: 320KiB is that of Llama 3.1 70B in bf16.")
    ] = f"{KV_BYTES_PER_TOKEN}",
    measured: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="The share of the requests, the last ones, that counts.")
    ] = 0.5,
    outputs: Annotated[bool, typer.Option(help="Tell the policies how much each request put out.")] = True,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw hit rate against capacity, as SVG, PNG or PDF.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Replay recorded requests through the index and the policies of L1, without a server and without bytes."""
    with prefixed("--capacity"):
        capacities = sorted({parse_bytes(size) for size in capacity.split(",")})
    with prefixed("--bytes-per-token"):
        each = parse_bytes(bytes_per_token)
        if not each:
            raise ConfigError("must be more than 0")
    policies = list(dict.fromkeys(policy.split(",")))
    if unknown := [name for name in policies if name not in (*NAMES, FORESIGHT)]:
        raise ConfigError(f"--policy: there is no policy {unknown[0]!r}: take one of {', '.join((*NAMES, FORESIGHT))}")
    requests = read_trace(trace)
    if capacities[0] < each * requests.chunk_tokens:
        raise ConfigError(f"--capacity: a chunk takes {show_bytes(each * requests.chunk_tokens)}")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        bar = progress.add_task("replaying", total=len(policies) * len(capacities) * len(requests.requests))
        points = list(
            sweep(
                requests,
                policies,
                capacities,
                each,
                measured_share=measured,
                outputs=outputs,
                on_request=lambda: progress.advance(bar),
            )
        )
    if as_json:
        console.print_json(msgspec.json.encode([_fields(point) for point in points]).decode())
    else:
        console.print(_table(points, capacities))
    if plot_file is not None:
        try:
            plot(points, plot_file, trace.name)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"--plot: {error}") from error


def _fields(point: Point) -> dict[str, str | int | float | bool]:
    found = point.found
    return {
        "policy": point.policy,
        "capacity_bytes": point.capacity_bytes,
        "hit_rate": found.hit_rate,
        "hit_tokens": found.hit_tokens,
        "asked_tokens": found.asked_tokens,
        "full": found.full,
    }


def _table(points: Sequence[Point], capacities: Sequence[int]) -> Table:
    table = Table(title="Hits, % of the tokens asked for", title_justify="left")
    table.add_column("policy")
    for capacity_bytes in capacities:
        table.add_column(show_bytes(capacity_bytes), justify="right")
    for name in dict.fromkeys(point.policy for point in points):
        own = [point.found for point in points if point.policy == name]
        table.add_row(name, *[f"{100 * found.hit_rate:.1f}" + ("" if found.full else "*") for found in own])
    if not all(point.found.full for point in points):
        table.caption = "* never full before the requests that count"
    return table
