"""A prompt that is kept, the note of that, and the tiers that keep it."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated

from msgspec import Meta, Struct

from async_cache.l2.guard import Guard
from async_cache.prompt.layout import ModelLayout
from async_cache.retention.allowance import Allowance
from async_cache.values import Clipped

_MOST_REMOVED = 65_536  # chunks; of more it is not remembered which


class Retention(Struct, eq=False):
    """A prompt that is kept. `held`: of each tier the chunks that it keeps, from the head on.

    `chunk_bytes`: what a chunk takes of each.
    """

    name: str
    owner: str
    model: str
    revision: str
    adapter: str
    chunk_tokens: int
    chunks: int
    clipped: Clipped | None
    expires_at: float  # by the loop's clock
    held: "dict[Tier, list[bytes]]"
    chunk_bytes: "dict[Tier, int]"

    @property
    def hashes(self) -> Sequence[bytes]:
        """The hashes of its chunks: what no tier keeps is not among them."""
        return max(self.held.values(), key=len, default=[])


class Note(Struct, frozen=True, array_like=True):
    """What a backend is told of a retention, to be kept over restarts. Times are those of the wall."""

    version: Annotated[int, Meta(ge=1, le=1)]
    owner: str
    model: str
    revision: str
    adapter: str
    chunk_tokens: Annotated[int, Meta(ge=1)]
    chunk_bytes: Annotated[int, Meta(ge=1)]
    chunks: Annotated[int, Meta(ge=0)]
    clipped: Clipped | None
    noted_at: float
    lives_seconds: Annotated[float, Meta(ge=0)]
    hashes: bytes


class Removed:
    """Chunks that were removed: no more than some are told from all."""

    def __init__(self) -> None:
        self._hashes: set[bytes] = set()
        self._all = False

    def add(self, hashes: Sequence[bytes] | None) -> None:
        """These were removed, or all if None."""
        self._hashes.update(hashes or ())
        if hashes is None or len(self._hashes) > _MOST_REMOVED:
            self._all = True
            self._hashes.clear()

    def has_any_of(self, hashes: Sequence[bytes]) -> bool:
        """Whether one of these was removed."""
        return self._all or not self._hashes.isdisjoint(hashes)


class Tier:
    """L1, or one backend: what is kept there, and how that is done."""

    def __init__(
        self,
        allowance: Allowance,
        keep: Callable[[Sequence[bytes]], None],
        let_go: Callable[[Sequence[bytes]], None],
        guard: Guard | None = None,
    ):
        self.allowance, self.keep, self.let_go = allowance, keep, let_go
        self.guard = guard
        self.noting = asyncio.Lock()
        self.unheard: Removed | None = Removed() if guard is not None else None
        """What was removed while its notes are not known, which may tell of it."""

    def chunk_bytes(self, layout: ModelLayout) -> int:
        """What a chunk takes here."""
        return sum(layout.objects.room_bytes) if self.guard is None else self.guard.room_bytes(layout.objects)
