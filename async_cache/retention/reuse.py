"""How soon will a chunk be asked for again? Learned online, from what was asked for before.

Time since the last use is cut into bins, each longer than the one before. In each bin a chunk that was not asked for
until then has a probability to be asked for within it: its hazard. The hazard is a logistic model of the chunk's
traits (below), whose weights follow every bin that a chunk lived through unused, and every use, by AdaGrad (Duchi,
Hazan and Singer, 2011). It rises and falls with time, so what a chunk is worth is its Gittins index (Gittins, 1979):
the best ratio, over all horizons, of the probability of a use to the time for which memory must be held for it.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from math import exp, log2, sqrt

from msgspec import Struct

BINS = 32
BIN_ENDS = [1.5 * 2 ** (bin / 2) for bin in range(BINS)]
"""When each bin ends, in seconds since the last use."""
NO_GAP = 11
"""The trait of a chunk that was used once."""
UNTOLD = -1
"""The traits of an output of which nobody told how long it was."""

_GROUP_BITS = 2  # weights of a trait are shared by so many bins: 4
_GROUPS = BINS >> _GROUP_BITS
_BASE_LOGIT = -3.0
_MOST_LOGIT = 100.0
_STEP = 0.1
_FRESH_FOR = 1000  # lessons, or an eighth of all: then what a kind is worth is computed anew
_FRESH_BITS = 3
_MOST_KINDS = 2048
_MOST_TURNS = 15
_MOST_NUMBER = 1e12

_TOUCHES = (2, 3, 5, 9, 17, 65)
_VALUES = (7, 2, 4, 17, 17, 16, 12, 7 * 17, 7 * 17, 17 * 17)
_ROWS = list(range(sum(_VALUES)))  # one for each value of a trait; these numbers are shared by all kinds
_FIRST = [sum(_VALUES[:trait]) for trait in range(len(_VALUES))]
_WIDTHS = [end - begin for begin, end in zip([0.0, *BIN_ENDS], BIN_ENDS, strict=False)]


class Kind(Struct, gc=False, eq=False):
    """Chunks that have all traits in common, and what these are worth in each bin, as was computed last.

    `own` and `shared`: the rows of their traits, and of those that all chunks have that were used last by the same
    request. `since`: where the weights by the time since the end of the output begin, and those
    by that and the turn; UNTOLD where that is not known.
    """

    own: tuple[int, ...]
    shared: tuple[int, ...]
    since: int
    since_and_turn: int
    fresh_until: int = 0  # lessons
    worths: "array[float] | None" = None


def floats(arrays: "Sequence[array[float]]") -> bytes:
    """Numbers, four bytes each."""
    return b"".join([array("f", numbers).tobytes() for numbers in arrays])


def take_floats(arrays: "Sequence[array[float]]", content: bytes) -> None:
    """Set numbers to what `floats` has said of them. Raises ValueError, and sets none, where it says that of others."""
    numbers = array("f")
    numbers.frombytes(content)
    if len(numbers) != sum(map(len, arrays)) or not all(abs(number) < _MOST_NUMBER for number in numbers):
        raise ValueError("these are other numbers")
    at = 0
    for each in arrays:
        each[:] = array("d", numbers[at : at + len(each)])
        at += len(each)


class ReuseModel:
    """The weights, and what they say of each kind.

    For a value of a trait there is one weight for all bins, and one for each group of bins. Others belong to a bin,
    or to the bins since the end of the output.
    """

    def __init__(self) -> None:
        self._of_groups = [array("d", bytes(8 * len(_ROWS))) for _ in range(_GROUPS + 1)]  # the last one: for all bins
        self._of_bins = array("d", bytes(8 * BINS * (1 + 2 + 2 * 4)))
        self._squares = [array("d", [1.0]) * len(_ROWS) for _ in self._of_groups]  # summed, of gradients, for AdaGrad
        self._squares_of_bins = array("d", [1.0]) * len(self._of_bins)
        self.lessons = 0
        self._kinds: dict[int, Kind] = {}

    def kind(self, touches: int, tail: bool, cut: int, new: int, output: int, bins: int, turn: int, gap: int) -> Kind:
        """The kind of a chunk.

        `touches`: how many requests asked for it. `tail`: whether it is shorter than a chunk. `cut`: see `cut_of`.
        `new`: how many tokens of the last request that asked for it were new, see `octave_of`. `output`, `bins`: how
        many it put out, see `output_of`. `turn`: how many requests it went on from. `gap`: see `gap_of`.
        """
        touched, turn = bisect_right(_TOUCHES, touches), min(turn, _MOST_TURNS)
        code = ((((((touched << 1 | tail) << 2 | cut) * 17 + new) << 4 | turn) * 12 + gap) * 18 + output) * 34 + bins
        kind = self._kinds.get(code)
        if kind is None:
            if len(self._kinds) >= _MOST_KINDS:
                self._kinds.clear()
            kind = self._kinds[code] = _kind(touched, tail, cut, new, output, bins, turn, gap)
        return kind

    def learn(self, chunks: Sequence[tuple[Kind, float]], bin: int, used: bool) -> None:
        """Chunks that one request used last were used in a bin, or have come through it unused.

        `chunks`: of which kinds they are, each with the weight that it has as a lesson.
        """
        group, for_all, of_bins = self._of_groups[bin >> _GROUP_BITS], self._of_groups[_GROUPS], self._of_bins
        squares, squares_for_all = self._squares[bin >> _GROUP_BITS], self._squares[_GROUPS]
        request = chunks[0][0]
        shared = request.shared
        places = [bin] if request.since < 0 else [bin, request.since + bin, request.since_and_turn + bin]
        base = sum(map(of_bins.__getitem__, places), _BASE_LOGIT)
        base += sum(map(group.__getitem__, shared)) + sum(map(for_all.__getitem__, shared))
        slopes = summed = 0.0
        for kind, weight in chunks:
            own = kind.own
            logit = sum(map(group.__getitem__, own), base) + sum(map(for_all.__getitem__, own))
            slope = (1 / (1 + _odds(-logit)) - used) * weight
            square, step = slope * slope, _STEP * slope
            slopes += slope
            summed += square
            for row in own:
                squares[row] = total = squares[row] + square
                group[row] -= step / sqrt(total)
                squares_for_all[row] = total = squares_for_all[row] + square
                for_all[row] -= step / sqrt(total)
        step = _STEP * slopes
        for row in shared:
            squares[row] = total = squares[row] + summed
            group[row] -= step / sqrt(total)
            squares_for_all[row] = total = squares_for_all[row] + summed
            for_all[row] -= step / sqrt(total)
        for place in places:
            self._squares_of_bins[place] = total = self._squares_of_bins[place] + summed
            of_bins[place] -= step / sqrt(total)
        self.lessons += len(chunks)

    def learned(self) -> bytes:
        """All that it has learned."""
        return self.lessons.to_bytes(8, "little") + floats(self._arrays())

    def recall(self, learned: bytes) -> None:
        """Go on from what one has learned. Raises ValueError for anything else."""
        take_floats(self._arrays(), learned[8:])
        self.lessons = int.from_bytes(learned[:8], "little")
        self._kinds.clear()

    def _arrays(self) -> "list[array[float]]":
        return [*self._of_groups, *self._squares, self._of_bins, self._squares_of_bins]

    def worth(self, kind: Kind, bin: int) -> float:
        """What it is worth to keep a chunk of this kind in this bin: uses to be expected per second of memory."""
        worths = kind.worths
        if worths is None or self.lessons >= kind.fresh_until:
            kind.fresh_until = self.lessons + max(_FRESH_FOR, self.lessons >> _FRESH_BITS)
            worths = kind.worths = array("f", self._worths(kind))
        return worths[bin]

    def _worths(self, kind: Kind) -> list[float]:
        """The worth in each bin: the mean of the Gittins indices at its beginning and its end.

        With the chance to live unused until a time, and the memory spent until then, as the two coordinates of a
        point, the index is the steepest way down from one point to any later one: a side of their convex hull.
        """
        spent, unused = self._curve(kind)
        hull = [(spent[BINS], unused[BINS], 0.0)]  # each point with the steepness of the side behind it
        indices = [0.0] * BINS
        for bin in range(BINS - 1, -1, -1):
            x, y = spent[bin], unused[bin]
            behind_x, behind_y, steepest = hull[-1]
            steep = _slope(x, y, behind_x, behind_y)
            while steep <= steepest and len(hull) > 1:
                hull.pop()
                behind_x, behind_y, steepest = hull[-1]
                steep = _slope(x, y, behind_x, behind_y)
            hull.append((x, y, steep))
            indices[bin] = steep
        return [(now + then) / 2 for now, then in zip(indices, [*indices[1:], indices[-1]], strict=True)]

    def _curve(self, kind: Kind) -> tuple[list[float], list[float]]:
        """At each end of a bin, the memory spent until then, and the chance to be unused until then."""
        rows, of_bins, since, and_turn = kind.own + kind.shared, self._of_bins, kind.since, kind.since_and_turn
        *by_group, base = [sum(map(weights.__getitem__, rows)) for weights in self._of_groups]
        base += _BASE_LOGIT
        logits: Iterable[float] = of_bins[:BINS]
        if since >= 0:
            told = zip(logits, of_bins[since : since + BINS], of_bins[and_turn : and_turn + BINS], strict=True)
            logits = map(sum, told)
        time, left = 0.0, 1.0
        spent, unused = [time], [left]
        for bin, logit in enumerate(logits):
            after = left / (1 + _odds(base + by_group[bin >> _GROUP_BITS] + logit))
            time += (left + after) / 2 * _WIDTHS[bin]
            left = after
            spent.append(time)
            unused.append(left)
        return spent, unused


def _kind(touched: int, tail: bool, cut: int, new: int, output: int, bins: int, turn: int, gap: int) -> Kind:
    own = [(0, touched), (1, tail), (6, gap), (7, touched * 17 + new)]
    shared = [(2, cut), (3, new), (5, turn)]
    since = since_and_turn = UNTOLD
    if output >= 0:
        own.append((8, touched * 17 + output))
        shared += [(4, output), (9, new * 17 + output)]
        since = BINS + BINS - bins
        since_and_turn = since + 2 * BINS * (1 + min(turn, 3))
    return Kind(_rows(own), _rows(shared), since, since_and_turn)


def _rows(values: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    return tuple([_ROWS[_FIRST[trait] + value] for trait, value in values])


def _slope(x: float, y: float, behind_x: float, behind_y: float) -> float:
    """How steep it goes down to a later point; 0 where nothing is left, and no memory is spent any more."""
    return (y - behind_y) / (behind_x - x) if behind_x > x else 0.0


def _odds(logit: float) -> float:
    return exp(min(logit, _MOST_LOGIT))


def gap_of(seconds: float) -> int:
    """The time between the last two uses of a chunk, as its trait."""
    return min(int(log2(seconds / 4)) + 1, NO_GAP - 1) if seconds > 4 else 0


def cut_of(chunks: int) -> int:
    """So many chunks of a request were left over when a later one took another way; 0: that never happened."""
    return min(chunks, 1) + (chunks > 1) + (chunks > 4)


def octave_of(new_tokens: int, unit: int = 64) -> int:
    """A number of tokens, as a trait."""
    return min(int(log2(new_tokens / unit)) + 2, 16) if new_tokens >= unit else min(new_tokens, 1)


def output_of(tokens: int | None) -> tuple[int, int]:
    """How many tokens a request put out, as a trait, and how many bins it takes to read or to write these."""
    if tokens is None:
        return UNTOLD, UNTOLD
    return octave_of(tokens, 8), min(int(2 * log2(tokens + 1)), BINS)
