"""Draws docs/benchmarks.svg, the README's chart, from the first table of docs/benchmarks.md.

python benchmarks/chart.py [FILE]
"""

import math
import re
import sys
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

DOCS = Path(__file__).parents[1] / "docs"
TITLE = "How many times better than LMCache 0.5.6, on a logarithmic scale"

WIDTH, TOP, ROW, BAR, FOOT = 800, 48, 28, 16, 30
LEFT, RIGHT = 350, 630  # where 0.5 and 64 times are
OURS, PEER = WIDTH - 80, WIDTH - 12  # where the two columns of figures end
TICKS = (0.5, 1, 2, 4, 8, 16, 32, 64)
BETTER, WORSE = "#4c78a8", "#f2913d"


class Row(NamedTuple):
    """One line of the table: what was measured, as text, and how many times better ours is."""

    what: str
    ours: str
    peer: str
    times: str


def read(document: str) -> list[Row]:
    """The rows of the first table."""
    table = re.search(r"^\| \| ours \| LMCache \| times better \|\n\|[-|]+\n((?:\|.*\n)+)", document, re.MULTILINE)
    if table is None:
        raise SystemExit("docs/benchmarks.md does not have the table")
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in table[1].splitlines()]


def place(times: float) -> float:
    """Where a ratio stands, on a scale on which each tick is twice the one before."""
    share = math.log(times / TICKS[0]) / math.log(TICKS[-1] / TICKS[0])
    return round(LEFT + share * (RIGHT - LEFT), 1)


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    extra = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


def draw(rows: list[Row]) -> str:
    """The chart as SVG."""
    bottom = TOP + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + FOOT}" role="img">',
        f"<title>{TITLE}</title>",
        "<style>text{font:13px sans-serif;fill:#24292f}.title{font-weight:bold}.small{font-size:11px;fill:#6a737d}"
        ".end{font-weight:bold}</style>",
        f'<rect width="{WIDTH}" height="{bottom + FOOT}" fill="#ffffff"/>',
        text(12, 22, TITLE, kind="title"),
        text(OURS, 22, "ours", "end", "small"),
        text(PEER, 22, "LMCache", "end", "small"),
    ]
    for tick in TICKS:
        color = "#24292f" if tick == 1 else "#e4e6e9"
        parts.append(f'<path d="M{place(tick)} {TOP - 8}V{bottom}" stroke="{color}"/>')
        parts.append(text(place(tick), bottom + 18, f"{tick:g}", "middle", "small"))
    for number, row in enumerate(rows):
        y, times = TOP + ROW * number, float(row.times)
        begin, end = sorted((place(1), place(times)))
        color = BETTER if times >= 1 else WORSE
        parts += [
            text(LEFT - 12, y + 13, row.what, "end"),
            f'<rect x="{begin}" y="{y}" width="{end - begin:.1f}" height="{BAR}" fill="{color}"/>',
            text(end + 6, y + 13, row.times, kind="end"),
            text(OURS, y + 13, row.ours, "end", "small"),
            text(PEER, y + 13, row.peer, "end", "small"),
        ]
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    into = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "benchmarks.svg"
    into.write_text(draw(read((DOCS / "benchmarks.md").read_text())))


if __name__ == "__main__":
    main()
