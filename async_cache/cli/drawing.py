"""How numbers and shares are drawn in a terminal."""

from collections.abc import Sequence
from math import log10

from rich.text import Text

from async_cache.server.http.status import Flight

_FIRST, _LAST = -6, 2  # powers of ten, of a second


def bar(parts: Sequence[tuple[float, str]], width: int) -> Text:
    """A bar of parts, each with its color, as long as its share; a part without one is left empty."""
    total = sum(size for size, _ in parts)
    drawn, text = 0, Text(no_wrap=True)
    behind = 0.0
    for size, color in parts:
        behind += size
        end = round(behind / total * width) if total else 0
        text.append(("━" if color else " ") * (end - drawn), color)
        drawn = end
    return text


def timeline(flight: Flight, width: int) -> Text:
    """A request from its beginning: until the hits are known (●), and until they are in memory (■), or still waits."""
    known, done, now = flight.lookup_seconds, flight.seconds, flight.ago_seconds
    line, styles = [" "] * width, [""] * width

    def draw(begin: int, end: int, sign: str, style: str) -> None:
        for at in range(begin, min(end, width)):
            line[at], styles[at] = sign, style

    if known is None:
        draw(0, _place(now, width), "╌", "blue")
    else:
        middle = _place(known, width)
        draw(0, middle, "━", "blue")
        if done is None:
            draw(middle, _place(now, width), "╌", "yellow")
        elif flight.l2_chunks or flight.shortfall:
            style = "red" if flight.shortfall else "yellow"
            end = _place(done, width)
            draw(middle, end, "━", style)
            draw(end, end + 1, "■", style)
        draw(middle, middle + 1, "●", "blue")
    return Text.assemble(*zip(line, styles, strict=True), no_wrap=True)


def _place(value: float, width: int) -> int:
    part = (log10(max(value, 10.0**_FIRST)) - _FIRST) / (_LAST - _FIRST)
    return min(width - 1, int(part * width))


def seconds(value: float | None) -> str:
    """A duration, in the unit that fits."""
    if value is None:
        return "-"
    for factor, unit, below in ((1e6, "µs", 0.000999), (1e3, "ms", 0.999), (1, "s", 120)):
        if value < below:
            return f"{value * factor:.3g} {unit}"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.0f} h"


def percent(part: float, whole: float) -> str:
    """A share."""
    return f"{part / whole:.0%}".replace("%", " %") if whole else "-"


def count(number: float) -> str:
    """A number, in thousands, millions and so on."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"
