"""Advice: from which chunk on it is faster to compute than to load, and how fast an engine computes."""

from collections.abc import Callable, Sequence

MOST_QUEUED_SECONDS = 600.0
"""So far ahead the engines' work is believed in: those who ask may compute nothing at all."""

LEAST_TOKENS = 256
"""A step of fewer tokens says nothing of how fast prompts are computed."""
_UP, _DOWN = 0.25, 1 / 32


class Adviser:
    """Knows how fast the engines compute together, and how much of that they were told to do of late.

    `clock` tells the time in seconds. What is not cached has to be computed, and so has what was advised: both queue in
    front of what comes next, and are done at the engines' rate.
    """

    def __init__(self, tokens_per_second: float, clock: Callable[[], float]):
        self.tokens_per_second = tokens_per_second
        """0: that is not known."""
        self._clock = clock
        self._busy_until = 0.0

    def recompute_from(
        self,
        first: int,
        from_l2: Sequence[int],
        length: int,
        chunk_tokens: int,
        load_seconds: float | None,
        missing_tokens: int = 0,
    ) -> int | None:
        """The chunk from which on engines are expected to be done earlier if they compute it.

        Of `length` chunks from `first` on, those `from_l2` (counted from `first`, ascending) are to be loaded, which
        takes `load_seconds`. What is computed goes to the end, since each chunk needs all before it; and as loading and
        computing both take time in proportion, it is all that is to be loaded, or nothing. `missing_tokens` come behind
        them, and are computed in any case. None: load all, or nothing is known.
        """
        rate, advised = self.tokens_per_second, None
        tokens = (length - from_l2[0]) * chunk_tokens if from_l2 else 0
        if rate and tokens and load_seconds is not None and load_seconds > self._queued() + tokens / rate:
            advised = first + from_l2[0]
            missing_tokens += tokens
        self.computes(missing_tokens)
        return advised

    def computes(self, tokens: int) -> None:
        """So many tokens are to be computed in any case."""
        if self.tokens_per_second:
            seconds = min(self._queued() + tokens / self.tokens_per_second, MOST_QUEUED_SECONDS)
            self._busy_until = self._clock() + seconds

    def _queued(self) -> float:
        return max(self._busy_until - self._clock(), 0.0)


class Pace:
    """How fast an engine computes, measured from one of its steps to the next. `clock` tells the time in seconds."""

    def __init__(self, clock: Callable[[], float]):
        self.tokens_per_second = 0.0
        """0: that is not known yet."""
        self._clock = clock
        self._began, self._tokens = 0.0, 0

    def step(self, tokens: int) -> None:
        """A step begins that computes so many tokens: the one before has ended.

        Steps that only decode tell nothing. Where an engine had nothing to do in between, it seems to be slower than it
        is: that counts for little, and what is faster for more.
        """
        now = self._clock()
        if self._tokens >= LEAST_TOKENS and now > self._began:
            rate, known = self._tokens / (now - self._began), self.tokens_per_second
            self.tokens_per_second = rate if not known else known + (rate - known) * (_UP if rate > known else _DOWN)
        self._began, self._tokens = now, tokens
