"""`async-cache replay`: what would have been found of a trace, under which policy and with how much memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from async_cache.cli.terminal import Json, TokenFile, Url, console, print_json, show_bytes
from async_cache.cli.timed import Way, replay_timed
from async_cache.config import parse_bytes, prefixed
from async_cache.errors import ConfigError
from async_cache.recording.trace import Trace, read_trace
from async_cache.replay.plot import plot_hits
from async_cache.replay.sweep import FORESIGHT, Point, sweep
from async_cache.retention.policies import NAMES

KV_BYTES_PER_TOKEN = 327680  # of Llama 3.1 70B in bf16: 80 layers, keys and values, 8 heads of 128, 2 bytes
MEASURED = 0.5
"""The share of the requests that counts by default: those before it fill what is empty."""

TraceFiles = Annotated[
    list[Path],
    typer.Argument(
        metavar="TRACE", help="JSON lines, also with gzip, or the files of a recording; see docs/traces.md."
    ),
]
Policies = Annotated[str, typer.Option(metavar="NAMES", help=f"Which policies, of {', '.join(NAMES)} and {FORESIGHT}.")]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw hits against capacity, as SVG, PNG or PDF.")
]


def replay(
    traces: TraceFiles,
    capacity: Annotated[
        str, typer.Option(metavar="SIZES", help="How much memory, such as 64GiB,256GiB.")
    ] = "64GiB,256GiB,1TiB,4TiB",
    policy: Policies = f"fifo,lru,prefix,{FORESIGHT}",
    bytes_per_token: Annotated[
        str, typer.Option(metavar="SIZE", help="KV of one token: 320KiB is that of Llama 3.1 70B in bf16.")
    ] = f"{KV_BYTES_PER_TOKEN}",
    measured: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="The share of the requests, the last ones, that counts.")
    ] = MEASURED,
    outputs: Annotated[bool, typer.Option(help="Tell the policies how much each request put out.")] = True,
    plot_file: PlotFile = None,
    json: Json = False,
    timed: Annotated[
        bool, typer.Option("--timed", help="Ask a server that runs, with real bytes, and take times.")
    ] = False,
    pace: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="With --timed: how many times as fast as the trace.")
    ] = 1.0,
    at_once: Annotated[int, typer.Option(min=1, max=4096, help="With --timed: requests at a time, at most.")] = 64,
    salt: Annotated[str, typer.Option(help="With --timed: of the prompts.")] = "",
    url: Url = "",
    token_file: TokenFile = None,
) -> None:
    """Replay recorded requests through the index and the policies of L1, without a server and without bytes.

    With --timed, against a server, which is asked for each prompt when its time has come, and given what it lacks. What
    it was given is removed in the end. Ctrl-C ends it earlier, with the times until then.
    """
    each = parse_bytes_per_token(bytes_per_token)
    if timed:
        replay_timed(
            traces,
            each,
            Way(pace, at_once, salt, outputs),
            url=url,
            token_file=token_file,
            plot_file=plot_file,
            json=json,
        )
        return
    policies = check_policies(policy)
    trace = read_trace(*traces)
    capacities = parse_capacities(capacity, each * trace.chunk_tokens)
    points = replayed(trace, policies, capacities, each, measured_share=measured, outputs=outputs)
    if json:
        print_json([_fields(point) for point in points])
    else:
        console.print(_table(points, capacities))
    if plot_file is not None:
        draw(points, plot_file, traces[0].name)


def parse_bytes_per_token(size: str) -> int:
    """The KV of a token. Raises ConfigError."""
    with prefixed("--bytes-per-token"):
        each = parse_bytes(size)
        if not each:
            raise ConfigError("must be more than 0")
    return each


def check_policies(names: str) -> list[str]:
    """The policies of a list. Raises ConfigError."""
    policies = list(dict.fromkeys(names.split(",")))
    if unknown := [name for name in policies if name not in (*NAMES, FORESIGHT)]:
        raise ConfigError(f"--policy: there is no policy {unknown[0]!r}: take one of {', '.join((*NAMES, FORESIGHT))}")
    return policies


def parse_capacities(sizes: str, chunk_bytes: int) -> list[int]:
    """The sizes of a list, the smallest first, each with room for a chunk. Raises ConfigError."""
    with prefixed("--capacity"):
        capacities = sorted({parse_bytes(size) for size in sizes.split(",")})
        if capacities[0] < chunk_bytes:
            raise ConfigError(f"a chunk takes {show_bytes(chunk_bytes)}")
    return capacities


def replayed(
    trace: Trace,
    policies: Sequence[str],
    capacities: Sequence[int],
    bytes_per_token: int,
    *,
    measured_share: float,
    outputs: bool,
) -> list[Point]:
    """What each policy finds with each capacity; a bar on the terminal says how far that is."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        bar = progress.add_task("replaying", total=len(policies) * len(capacities) * len(trace.requests))
        return list(
            sweep(
                trace,
                policies,
                capacities,
                bytes_per_token,
                measured_share=measured_share,
                outputs=outputs,
                on_request=lambda: progress.advance(bar),
            )
        )


def draw(points: Sequence[Point], path: Path, title: str) -> None:
    """Draw hits against capacity. Raises ConfigError."""
    try:
        plot_hits(points, path, title)
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
