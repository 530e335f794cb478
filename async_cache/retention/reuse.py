"""How soon will a chunk be asked for again? Learned online, from what was asked for before.

Time since the last use is cut into bins, each longer than the one before. In each bin a chunk that was not asked for
until then has a probability to be asked for within it: its hazard. The hazard is a logistic model of the chunk's
traits (below), whose weights follow every bin that a chunk lived through unused, and every use, by AdaGrad (Duchi,
Hazan and Singer, 2011). It rises and falls with time, so what a chunk is worth is its Gittins index (Gittins, 1979):
the best ratio, over all horizons, of the probability of a use to the time for which memory must be held for it.
"""

import itertools
from array import array
from bisect import bisect_right
from math import exp, log2, sqrt
from typing import NamedTuple

BINS = 32
BIN_ENDS = [1.5 * 2 ** (bin / 2) for bin in range(BINS)]
"""When each bin ends, in seconds since the last use."""

_GROUP_BITS = 2  # weights of a trait are shared by so many bins: 4
_ROW = (BINS >> _GROUP_BITS) + 1  # those of one value of a trait: one for each group of bins, and one for all
_BASE_LOGIT = -3.0
_STEP = 0.1
_DECAY = 1e-4
_FRESH_FOR = 5000  # lessons: then what a trait is worth is computed anew
_MOST_KNOWN = 8192  # kinds whose worth is kept
NO_GAP = 11

_MOST_TURNS = 15

_TOUCHES = (2, 3, 5, 9, 17, 65)
_VALUES = (7, 2, 4, 17, 17, 16, 12, 7 * 17, 7 * 17, 17 * 17)
_FIRST = [BINS + sum(_VALUES[:trait]) * _ROW for trait in range(len(_VALUES) + 1)]
_SINCE_OUTPUT = _FIRST[-1]  # by bins since the end of the output, from -BINS on
_SINCE_OUTPUT_AND_TURN = _SINCE_OUTPUT + 2 * BINS
_WEIGHTS = _SINCE_OUTPUT_AND_TURN + 2 * BINS * 4
_WIDTHS = [end - begin for begin, end in zip([0.0, *BIN_ENDS], BIN_ENDS, strict=False)]


class Kind(NamedTuple):
    """Chunks that have all traits in common: where the weights of these begin, and of the time since the output."""

    rows: tuple[int, ...]
    since_output: int = -1
    since_output_and_turn: int = -1


UNKNOWN = Kind(())


def kind_of(
    touches: int, tail: bool, cut: int, new_tokens: int, output_tokens: int | None, turn: int, gap: int
) -> Kind:
    """The kind of a chunk.

    `touches`: how many requests asked for it. `tail`: whether it is shorter than a chunk. `cut`: see `cut_of`.
    `new_tokens` and `output_tokens`: of the last request that asked for it; None: not known. `turn`: how many requests
    it went on from. `gap`: see `gap_of`.
    """
    touched = bisect_right(_TOUCHES, touches)
    new = _octave(new_tokens, 64)
    values = [
        (0, touched),
        (1, tail),
        (2, cut),
        (3, new),
        (5, min(turn, _MOST_TURNS)),
        (6, gap),
        (7, touched * 17 + new),
    ]
    if output_tokens is None:
        return Kind(tuple([_FIRST[trait] + value * _ROW for trait, value in values]))
    output = _octave(output_tokens, 8)
    values += [(4, output), (8, touched * 17 + output), (9, new * 17 + output)]
    bins = min(int(2 * log2(output_tokens + 1)), BINS)
    return Kind(
        tuple([_FIRST[trait] + value * _ROW for trait, value in values]),
        _SINCE_OUTPUT + BINS - bins,
        _SINCE_OUTPUT_AND_TURN + BINS - bins + 2 * BINS * min(turn, 3),
    )


def gap_of(seconds: float | None) -> int:
    """The time between the last two uses of a chunk, or None, as a value of its trait."""
    if seconds is None:
        return NO_GAP
    return min(int(log2(seconds / 4)) + 1, NO_GAP - 1) if seconds > 4 else 0


def cut_of(chunks: int) -> int:
    """So many chunks of a request were left over when a later one took another way; 0: that never happened."""
    return min(chunks, 1) + (chunks > 1) + (chunks > 4)


def _octave(tokens: int, unit: int) -> int:
    return min(int(log2(tokens / unit)) + 2, 16) if tokens >= unit else min(tokens, 1)


class ReuseModel:
    """The weights, and what they say of each kind."""

    def __init__(self) -> None:
        self._weights = [0.0] * _WEIGHTS
        self._squares = [1.0] * _WEIGHTS  # of all gradients, for AdaGrad
        self.lessons = 0
        self._known: dict[Kind, tuple[int, array[float]]] = {}

    def learn(self, kind: Kind, bin: int, used: bool, weight: float) -> None:
        """Chunks of a kind were used in a bin, or have come through it unused."""
        group, weights, squares = bin >> _GROUP_BITS, self._weights, self._squares
        places = [bin]
        for row in kind.rows:
            places += (row + _ROW - 1, row + group)
        if kind.since_output >= 0:
            places += (kind.since_output + bin, kind.since_output_and_turn + bin)
        logit = _BASE_LOGIT
        for place in places:
            logit += weights[place]
        slope = (1 / (1 + exp(-logit)) - used) * weight
        for place in places:
            value = weights[place]
            gradient = slope + _DECAY * value
            squares[place] = square = squares[place] + gradient * gradient
            weights[place] = value - _STEP * gradient / sqrt(square)
        self.lessons += 1

    def worth(self, kind: Kind, bin: int) -> float:
        """What it is worth to keep a chunk of this kind in this bin: uses to be expected per second of memory."""
        known = self._known.get(kind)
        if known is None or self.lessons - known[0] >= _FRESH_FOR:
            if known is None and len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[kind] = self.lessons, array("d", self._worths(kind))
        return known[1][bin]

    def _worths(self, kind: Kind) -> list[float]:
        """The worth in each bin: the mean of the Gittins indices at its beginning and its end.

        With the chance to live unused until a time, and the memory spent until then, as the two coordinates of a
        point, the index is the steepest way down from one point to any later one: a side of their convex hull.
        """
        indices = [0.0] * (BINS + 1)
        hull: list[tuple[float, float]] = []
        for bin, (spent, unused) in reversed(list(enumerate(self._curve(kind)))):
            while len(hull) > 1 and _slope(spent, unused, *hull[-1]) <= _slope(spent, unused, *hull[-2]):
                hull.pop()
            if hull:
                indices[bin] = _slope(spent, unused, *hull[-1])
            hull.append((spent, unused))
        indices[BINS] = indices[BINS - 1]
        return [(now + then) / 2 for now, then in itertools.pairwise(indices)]

    def _curve(self, kind: Kind) -> list[tuple[float, float]]:
        """At each end of a bin, the memory spent until then, and the chance to be unused until then."""
        weights = self._weights
        base = _BASE_LOGIT + sum([weights[row + _ROW - 1] for row in kind.rows])
        by_group = [base + sum([weights[row + group] for row in kind.rows]) for group in range(BINS >> _GROUP_BITS)]
        since = kind.since_output
        logits = [by_group[bin >> _GROUP_BITS] + weights[bin] for bin in range(BINS)]
        if since >= 0:
            and_turn = kind.since_output_and_turn
            logits = [
                logit + a + b
                for logit, a, b in zip(
                    logits, weights[since : since + BINS], weights[and_turn : and_turn + BINS], strict=True
                )
            ]
        spent, unused = 0.0, 1.0
        curve = [(spent, unused)]
        for width, logit in zip(_WIDTHS, logits, strict=True):
            after = unused - unused / (1 + exp(-logit))
            spent += (unused + after) / 2 * width
            unused = after
            curve.append((spent, unused))
        return curve


def _slope(spent: float, unused: float, spent_then: float, unused_then: float) -> float:
    return (unused - unused_then) / (spent_then - spent) if spent_then > spent else 0.0
