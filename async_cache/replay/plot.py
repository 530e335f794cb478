"""Hits against capacity, and how long requests took: the one place that imports matplotlib, where a plot is wanted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from async_cache.replay.sweep import FORESIGHT, Point

_GIB = 2**30


def plot_hits(points: Sequence[Point], path: Path, title: str) -> None:
    """Draw the points into a file, in the format that its name says: SVG, PNG or PDF.

    Raises ImportError, which names the extra to install, where there is no matplotlib; ValueError for another format.
    """
    figure, axes = _axes(title)
    for name in dict.fromkeys(point.policy for point in points):
        own = sorted((p.capacity_bytes / _GIB, 100 * p.found.hit_rate) for p in points if p.policy == name)
        (line,) = axes.plot(*zip(*own, strict=True), marker="o", label=name)
        if name == FORESIGHT:
            line.set(color="0.55", linestyle="--")
    axes.set_xscale("log", base=2)
    ticks = sorted({point.capacity_bytes / _GIB for point in points})
    axes.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks])
    axes.set_xlabel("capacity in GiB")
    axes.set_ylabel("hits, % of the tokens asked for")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path)


def plot_times(times: Mapping[str, Sequence[float]], path: Path, title: str) -> None:
    """Draw which part of the requests took at most how many seconds, by what was waited for; raises as `plot_hits`."""
    figure, axes = _axes(title)
    for name, seconds in times.items():
        parts = [100 * (number + 1) / len(seconds) for number in range(len(seconds))]
        axes.step(sorted(seconds), parts, where="post", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("seconds")
    axes.set_ylabel("% of the requests")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False)
    figure.savefig(path)


def _axes(title: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("a plot needs matplotlib: pip install 'async-kv-cache[plot]'") from error
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
