"""How numbers and shares are drawn in a terminal."""

from collections.abc import Sequence

from rich.text import Text


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
