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
from math import log2

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Floats = NDArray[np.float64]

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
_LESSON_POWER = 0.3  # of the number of chunks is the weight of a lesson: they are not independent
_LEARNED_AT_ONCE = 256  # lessons
_JUDGED_AT_ONCE = 12  # kinds: more take memory that the system gives and takes back each time, which is slow
_NEW_AT_ONCE = 4 * _JUDGED_AT_ONCE  # that are judged with others before somebody asks for them
_FRESH_FOR = 1000  # lessons, or an eighth of all: then what a kind is worth is computed anew
_FRESH_BITS = 3
_MOST_KINDS = 2048
_MOST_TURNS = 15
_MOST_NUMBER = 1e12

_TOUCHES = (2, 3, 5, 9, 17, 65)
_VALUES = (7, 2, 4, 17, 17, 16, 12, 7 * 17, 7 * 17, 17 * 17)
_TRAITS = len(_VALUES)
_FIRST = [sum(_VALUES[:trait]) for trait in range(_TRAITS)]
_ROWS = sum(_VALUES) + 1  # one for each value of a trait, and the last for one that nobody told
_FOR_ALL = np.int16(_GROUPS * _ROWS)  # here the weights for all bins begin,
_OF_BINS = (_GROUPS + 1) * _ROWS  # and here those of one bin, and of the bins since the end of the output
_WEIGHTS = _OF_BINS + BINS * (1 + 2 + 2 * 4 + 1)
_NOTHING = _WEIGHTS - BINS
_UNTOLD = [*range(_ROWS - 1, _OF_BINS, _ROWS), *range(_NOTHING, _WEIGHTS)]  # weights that stay 0
_EACH_BIN = np.arange(BINS)
_WIDTHS = np.diff([0.0, *BIN_ENDS])

_LEAST_SECONDS = 1e-9
_STEPS = 16  # ranks for a doubling of what it is worth
_LEAST, _MOST = -48, 16  # powers of two
RANKS = (_MOST - _LEAST) * _STEPS
"""As many ranks are below all others, for what is of sessions that have ended."""


class Kind(Struct, gc=False, eq=False):
    """Chunks that have all traits in common, and what these are worth in each bin, as was computed last.

    `rows`: of their traits, and where the weights by the time since the end of the output begin, and those by that and
    the turn. `ranks`: see `rank_of`.
    """

    rows: bytes
    ranks: "array[int] | None" = None
    fresh_until: int = 0  # lessons


class ReuseModel:
    """The weights, and what they say of each kind.

    For a value of a trait there is one weight for all bins, and one for each group of bins. Others belong to a bin,
    or to the bins since the end of the output. Lessons wait until there are some hundreds, and are learned
    together; kinds are judged together, as far as that can wait.
    """

    def __init__(self) -> None:
        self._weights = np.zeros(_WEIGHTS)
        self._squares = np.ones(_WEIGHTS)  # summed, of gradients, for AdaGrad
        self._waiting = _Lessons()
        self.lessons = 0
        self._kinds: dict[int, Kind] = {}
        self._new: list[Kind] = []  # those that were not judged yet

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
                self._new.clear()
            kind = self._kinds[code] = _kind(touched, tail, cut, new, output, bins, turn, gap)
            self._new.append(kind)
        return kind

    def learn(self, chunks: Sequence[tuple[Kind, int]], bin: int, *, used: bool) -> None:
        """Chunks, so many of each kind, were used in a bin, or have come through it unused."""
        waiting = self._waiting
        waiting.rows += b"".join([kind.rows for kind, _ in chunks])
        waiting.chunks += [count for _, count in chunks]
        waiting.bins += bytes([bin]) * len(chunks)
        waiting.used += bytes([used]) * len(chunks)
        self.lessons += len(chunks)
        if len(waiting.bins) >= _LEARNED_AT_ONCE:
            self._learn_all()

    def _learn_all(self) -> None:
        """Learn from the lessons that wait: one step of AdaGrad."""
        waiting, self._waiting = self._waiting, _Lessons()
        bins = np.frombuffer(waiting.bins, np.uint8)[:, None]
        at = np.frombuffer(waiting.rows, np.int16).reshape(-1, _TRAITS + 2)
        rows = at[:, :_TRAITS]
        groups = rows + (bins >> _GROUP_BITS) * np.int16(_ROWS)
        places = np.hstack([groups, rows + _FOR_ALL, at[:, _TRAITS:] + bins, np.int16(_OF_BINS) + bins])
        logits = self._weights[places].sum(1) + _BASE_LOGIT
        chances = 1 / (1 + _odds(-logits))
        slopes = (chances - np.frombuffer(waiting.used, np.uint8)) * np.array(waiting.chunks) ** _LESSON_POWER
        flat, count = places.ravel(), places.shape[1]
        self._squares += np.bincount(flat, np.repeat(slopes * slopes, count), _WEIGHTS)
        self._weights -= _STEP * np.bincount(flat, np.repeat(slopes, count), _WEIGHTS) / np.sqrt(self._squares)
        self._weights[_UNTOLD] = 0.0

    def learned(self) -> bytes:
        """All that it has learned."""
        if self._waiting.bins:
            self._learn_all()
        numbers = np.concatenate([self._weights, self._squares]).astype(np.float32)
        return self.lessons.to_bytes(8, "little") + numbers.tobytes()

    def recall(self, learned: bytes) -> None:
        """Go on from what one has learned. Raises ValueError for anything else."""
        numbers = np.frombuffer(learned[8:], np.float32) if len(learned) % 4 == 0 else np.zeros(0)
        if len(numbers) != 2 * _WEIGHTS or not (np.abs(numbers) < _MOST_NUMBER).all():
            raise ValueError("these are other numbers")
        weights, squares = np.split(numbers.astype(np.float64), 2)
        self._weights, self._squares = weights, np.maximum(squares, 1.0)
        self._weights[_UNTOLD] = 0.0
        self.lessons = int.from_bytes(learned[:8], "little")
        self._kinds.clear()

    def rank(self, kind: Kind, bin: int) -> int:
        """The rank of what chunks of a kind are worth in a bin: uses to be expected per second of memory."""
        if self.lessons >= kind.fresh_until:
            self.judge([kind])
        assert kind.ranks is not None
        return kind.ranks[bin]

    def judge(self, kinds: Iterable[Kind]) -> None:
        """Find out what new kinds are worth, and anew what those of these are that were judged long ago."""
        new, self._new = self._new[-_NEW_AT_ONCE:], []
        stale = list({id(kind): kind for kind in (*kinds, *new) if self.lessons >= kind.fresh_until}.values())
        for first in range(0, len(stale), _JUDGED_AT_ONCE):
            self._judge(stale[first : first + _JUDGED_AT_ONCE])

    def _judge(self, kinds: Sequence[Kind]) -> None:
        """The rank in each bin is that of the mean of the Gittins indices at its beginning and its end.

        With the chance to live unused until a time, and the memory spent until then, as the two coordinates of a
        point, the index is the steepest way down from one point to any later one.
        """
        spent, unused = self._curves(b"".join([kind.rows for kind in kinds]))
        used = np.maximum(unused[:, :-1, None] - unused[:, None, 1:], 0)  # 0 for what is not later
        index = (used / np.maximum(spent[:, None, 1:] - spent[:, :-1, None], _LEAST_SECONDS)).max(2)
        index[:, :-1] += index[:, 1:]
        index[:, -1] *= 2
        octaves = np.log2(np.maximum(index, 2.0**_LEAST)) - 1 - _LEAST
        ranks = (RANKS + np.clip(_STEPS * octaves, 0, RANKS - 1)).astype(np.int16)
        fresh_until = self.lessons + max(_FRESH_FOR, self.lessons >> _FRESH_BITS)
        for kind, of in zip(kinds, ranks, strict=True):
            kind.ranks, kind.fresh_until = array("h", of.tobytes()), fresh_until

    def _curves(self, rows: bytes) -> tuple[Floats, Floats]:
        """At each end of a bin, the memory spent until then, and the chance to be unused until then; of each kind."""
        at = np.frombuffer(rows, np.int16).reshape(-1, _TRAITS + 2)
        by_row = self._weights[:_OF_BINS].reshape(_GROUPS + 1, _ROWS)[:, at[:, :_TRAITS]].sum(2)
        logits = np.repeat(by_row[:_GROUPS] + by_row[_GROUPS], 1 << _GROUP_BITS, 0).T + _BASE_LOGIT
        logits += self._weights[at[:, _TRAITS:, None] + _EACH_BIN].sum(1)
        logits += self._weights[_OF_BINS + _EACH_BIN]
        unused = np.ones((len(at), BINS + 1))
        np.cumprod(1 / (1 + _odds(logits)), 1, out=unused[:, 1:])
        spent = np.zeros_like(unused)
        np.cumsum((unused[:, :-1] + unused[:, 1:]) / 2 * _WIDTHS, 1, out=spent[:, 1:])
        return spent, unused


class _Lessons:
    """Lessons that wait to be learned together. Of each: rows, chunks, a bin, and whether they were used then."""

    def __init__(self) -> None:
        self.rows, self.bins, self.used = bytearray(), bytearray(), bytearray()
        self.chunks: list[int] = []


def _kind(touched: int, tail: bool, cut: int, new: int, output: int, bins: int, turn: int, gap: int) -> Kind:
    values = [touched, tail, cut, new, output, turn, gap, touched * 17 + new, touched * 17 + output, new * 17 + output]
    rows = [first + value for first, value in zip(_FIRST, values, strict=True)]
    since = since_and_turn = _NOTHING
    if output >= 0:
        since = _OF_BINS + BINS + BINS - bins
        since_and_turn = since + 2 * BINS * (1 + min(turn, 3))
    else:
        for trait in (4, 8, 9):
            rows[trait] = _ROWS - 1
    return Kind(array("h", [*rows, since, since_and_turn]).tobytes())


def _odds(logits: Floats) -> Floats:
    odds: Floats = np.exp(np.minimum(logits, _MOST_LOGIT))
    return odds


def rank_of(worth: float) -> int:
    """The rank of what is worth so many uses per second."""
    return RANKS + (min(max(int(_STEPS * (log2(worth) - _LEAST)), 0), RANKS - 1) if worth > 0 else 0)


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
