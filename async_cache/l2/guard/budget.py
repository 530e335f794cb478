"""How much may be written to a backend in a day, whose memory wears out by that: nobody spends all of it.

A bucket that fills at a steady rate: an eighth of the day's bytes fits in, and the rest comes over the day, so that no
24 hours have more than the day's bytes. The less is left, the more has to speak for a chunk.
"""

from collections.abc import Callable
from math import isfinite

import msgspec
from msgspec import Struct

DAY_SECONDS = 86_400.0
SAVED_UP = 1 / 8
"""The part of a day's bytes that may be spent at once."""
_HOUR_SECONDS = 3600.0  # after which what an owner has spent counts half
_DECAYED_AFTER_SECONDS = 60.0
_MOST_OWNERS = 4096
_NOTED = 1 / 16  # of what may be spent at once: so much is forgotten at most when a process is killed


class Note(Struct, frozen=True, array_like=True):
    """What is left, as of a time of the wall."""

    left_bytes: float
    noted_at: float


class WriteBudget:
    """What is left of the bytes a day. `clock` tells the time in seconds.

    Until half of what can be saved up is spent, everything is admitted. Then it takes a chunk that was asked for twice,
    of an owner that has spent no more of late than an equal part: whoever stores much leaves the others theirs.
    """

    def __init__(self, day_bytes: int, clock: Callable[[], float]):
        self.day_bytes = day_bytes
        self._clock = clock
        self._most = day_bytes * SAVED_UP
        self._rate = day_bytes * (1 - SAVED_UP) / DAY_SECONDS
        self._left = self._most
        self._filled_at = self._decayed_at = clock()
        self._promised = 0
        self.written = self.noted = 0  # bytes, and those of them that a note counts that is kept
        self.is_recalled = False
        """Whether it is known what was left before: until then no note says what is left."""
        self._spent: dict[str, float] = {}  # by owner, of late

    @property
    def left_bytes(self) -> int:
        """What may be written now, beside what is promised; less than none where more was written than promised."""
        now = self._clock()
        self._left = min(self._left + (now - self._filled_at) * self._rate, self._most)
        self._filled_at = now
        return int(self._left) - self._promised

    def admits(self, owner: str, size_bytes: int, asked: int) -> bool:
        """Whether so much may be written of a chunk of an owner that was asked for so often."""
        left = self.left_bytes - size_bytes
        if left < 0:
            return False
        return left >= self._most / 2 or (asked > 1 and self._has_spent_little(owner))

    def _has_spent_little(self, owner: str) -> bool:
        self._decay()
        return self._spent.get(owner, 0.0) * len({*self._spent, owner}) <= sum(self._spent.values())

    def promise(self, owner: str, size_bytes: int) -> None:
        """So much is to be written for an owner."""
        self._promised += size_bytes
        self._decay()
        self._spent[owner] = self._spent.get(owner, 0.0) + size_bytes

    def release(self, size_bytes: int) -> None:
        """What was promised is written, or will not be."""
        self._promised -= size_bytes

    def wrote(self, size_bytes: int) -> None:
        """So much was written."""
        self._left -= size_bytes
        self.written += size_bytes

    def _decay(self) -> None:
        elapsed = self._clock() - self._decayed_at
        if elapsed > _DECAYED_AFTER_SECONDS or len(self._spent) > _MOST_OWNERS:
            factor = 0.5 ** (elapsed / _HOUR_SECONDS)
            by_size = sorted(self._spent.items(), key=lambda item: -item[1])[: _MOST_OWNERS // 2]
            self._spent = {owner: spent * factor for owner, spent in by_size if spent * factor >= 1}
            self._decayed_at = self._clock()

    # Over restarts.

    def is_to_be_noted(self, *, idle: bool) -> bool:
        """Whether so much was written since the last note that a new one should be kept; `idle`: nothing follows."""
        since = self.written - self.noted
        return since > 0 if idle else since >= self._most * _NOTED

    def note(self, wall: float) -> bytes:
        """What a backend keeps over a restart, as of a time of the wall."""
        return msgspec.msgpack.encode(Note(self.left_bytes + self._promised, wall))

    def recall(self, note: bytes | None, wall: float) -> None:
        """Go on from a note, if there is one; what cannot be read, or be so, is none."""
        self.is_recalled = True
        if note is None:
            return
        try:
            told = msgspec.msgpack.decode(note, type=Note)
        except msgspec.DecodeError:
            return
        filled = told.left_bytes + max(wall - told.noted_at, 0.0) * self._rate
        if isfinite(filled):
            self._left = max(min(filled, self._most), -self.day_bytes) - self.written
            self._filled_at = self._clock()
