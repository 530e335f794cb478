"""Hit rate against capacity, by policy: the one place that imports matplotlib, and only when a plot is asked for."""

from collections.abc import Sequence
from pathlib import Path

from async_cache.replay.sweep import FORESIGHT, Point

_GIB = 2**30


def plot(points: Sequence[Point], path: Path, title: str) -> None:
    """Draw the points into a file, in the format that its name says: SVG, PNG or PDF.

    Raises ImportError, which names the extra to install, where there is no matplotlib; ValueError for another format.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("a plot needs matplotlib: pip install 'async-kv-cache[plot]'") from error
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
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
    axes.set_title(title, loc="left")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
