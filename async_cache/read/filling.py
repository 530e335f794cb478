"""Chunks that writers have announced, by making room for them, and that a lookup may wait for."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress

from async_cache.aio.slices import InTurns

_LOOKED_AT_ONCE = 4096  # chunks, in less than a millisecond


class Filling:
    """Chunks for which writers have room that is neither committed nor given back, and how many rooms."""

    def __init__(self) -> None:
        self._rooms: Counter[bytes] = Counter()
        self._ends: dict[bytes, asyncio.Event] = {}  # of those that somebody waits for

    def __contains__(self, chunk_hash: object) -> bool:
        return chunk_hash in self._rooms

    def begun(self, chunk_hashes: Iterable[bytes]) -> None:
        """Writers have one room more of each of these chunks."""
        self._rooms.update(chunk_hashes)

    def ended(self, chunk_hash: bytes) -> None:
        """One room less is to be filled of a chunk: who waits for the last one is woken."""
        left = self._rooms.pop(chunk_hash, 0) - 1
        if left > 0:
            self._rooms[chunk_hash] = left
        elif (end := self._ends.pop(chunk_hash, None)) is not None:
            end.set()

    def any_of(self, chunk_hashes: Sequence[bytes]) -> bool:
        """Whether some of these chunks are announced."""
        return bool(self._rooms) and not self._rooms.keys().isdisjoint(chunk_hashes)

    async def none_of(self, chunk_hashes: Sequence[bytes], until: float) -> None:
        """Wait until none of these chunks is announced any more, but no longer than until then by the loop's clock."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                while self.any_of(chunk_hashes):  # others may be announced while it waits
                    async for some in InTurns(chunk_hashes, _LOOKED_AT_ONCE):
                        for chunk_hash in some:
                            while chunk_hash in self._rooms:
                                await self._ends.setdefault(chunk_hash, asyncio.Event()).wait()
