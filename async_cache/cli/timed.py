"""`async-cache replay --timed`: how long a server takes for the requests of a trace."""

import asyncio
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from async_cache.cli.drawing import percent, seconds
from async_cache.cli.terminal import connected, console, print_json, table
from async_cache.errors import ConfigError, ConnectionLostError
from async_cache.recording.trace import Trace, read_trace
from async_cache.replay.plot import plot_times
from async_cache.replay.timed import Timed, TimedReplay

_INTERRUPTED = 130
_PARTS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Way(NamedTuple):
    """How fast, how many at a time, for whom, and whether the server is told how much each request put out."""

    pace: float
    at_once: int
    salt: str
    outputs: bool


def replay_timed(
    traces: Sequence[Path],
    bytes_per_token: int,
    way: Way,
    *,
    url: str,
    token_file: Path | None,
    plot_file: Path | None,
    json: bool,
) -> None:
    """Replay against a server, and show the times. Raises ConfigError, ConnectionLostError."""
    trace = read_trace(*traces)
    timed, is_whole = uvloop.run(_replay(trace, bytes_per_token, way, url, token_file))
    if not timed.lookup:
        raise ConfigError("no request was done")
    if json:
        print_json(_numbers(timed) | {"whole": is_whole})
    else:
        _print(timed)
    if plot_file is not None:
        try:
            plot_times({name: times for name, times in _times(timed).items() if times}, plot_file, traces[0].name)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"--plot: {error}") from error
    if not is_whole:
        raise typer.Exit(_INTERRUPTED)


async def _replay(trace: Trace, each: int, way: Way, url: str, token_file: Path | None) -> tuple[Timed, bool]:
    """What was measured, and whether that is of all requests, or of those until Ctrl-C."""
    terminal = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        bar = progress.add_task("replaying", total=len(trace.requests))
        async with connected(url, token_file) as client:
            replay = TimedReplay(
                client,
                trace,
                each,
                pace=way.pace,
                most_at_once=way.at_once,
                salt=way.salt,
                outputs=way.outputs,
                on_request=lambda: progress.advance(bar),
            )
            running = asyncio.create_task(replay.run())
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, running.cancel)
            try:
                await running
            except asyncio.CancelledError:
                return replay.timed, False
            except ConnectionLostError as error:
                done, of = len(replay.timed.lookup), len(trace.requests)
                raise ConnectionLostError(f"the server is gone, after {done:,} of {of:,} requests: {error}") from error
            finally:
                with suppress(ValueError):
                    asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    return replay.timed, True


def _times(timed: Timed) -> dict[str, Sequence[float]]:
    return {"hits known": timed.lookup, "loaded": timed.load, "stored": timed.store, "begun late": timed.behind}


def _numbers(timed: Timed) -> dict[str, Any]:
    names = {"lookup_seconds": timed.lookup, "load_seconds": timed.load, "store_seconds": timed.store}
    times = {name: _quantiles(of) | {"count": len(of)} for name, of in (names | {"late_seconds": timed.behind}).items()}
    counts = "asked_tokens", "l1_tokens", "l2_tokens", "broken", "damaged", "not_stored", "failed", "error"
    return times | {name: getattr(timed, name) for name in counts} | {"requests": len(timed.lookup)}


def _quantiles(times: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(times)
    return {
        name: ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else None
        for name, part in _PARTS.items()
    }


def _print(timed: Timed) -> None:
    l1, l2 = (percent(part, timed.asked_tokens) for part in (timed.l1_tokens, timed.l2_tokens))
    console.print(f"{len(timed.lookup):,} requests: found {l1} of the tokens in memory, {l2} in storage")
    rows = table("", "count", *_PARTS)
    for name, times in _times(timed).items():
        rows.add_row(name, f"{len(times):,}", *(seconds(value) for value in _quantiles(times).values()))
    console.print(rows)
    for count, told in (
        (timed.broken, "requests got less than they were promised"),
        (timed.not_stored, "requests could not be stored as a whole"),
        (timed.damaged, "chunks were not what was stored"),
        (timed.failed, f"requests failed: {timed.error}"),
    ):
        if count:
            console.print(f"{count:,} {told}")
