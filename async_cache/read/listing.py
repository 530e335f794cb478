"""What is in memory, for those who look: the roots that chunks have, and the chunks, in pages."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from heapq import nsmallest
from operator import attrgetter

from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.ledger.roots import Root, Roots
from async_cache.prompt.layout import ModelLayout
from async_cache.values import ListedChunk

_AT_ONCE = 10_000  # entries, in a millisecond or two
_HASH = attrgetter("chunk_hash")


class Listing:
    """Lists what L1 has, a slice at a time, so that it holds up nobody. Chunks may come and go meanwhile."""

    def __init__(self, l1: L1Store, roots: Roots):
        self._l1 = l1
        self._roots = roots

    async def roots(self, may_see: Callable[[str], bool]) -> list[tuple[Root, int]]:
        """The roots of prompts of these salts that were stored or loaded of late, and the chunks in memory of each.

        Chunks are told apart by their layout and salt: those of several adapters are counted with each.
        """
        count: Counter[tuple[ModelLayout, str]] = Counter()
        async for part in self._slices():
            count.update([(entry.layout, entry.owner) for entry in part])

        def chunks_of(root: Root) -> int:
            same = [n for (it, salt), n in count.items() if salt == root.salt and it.same_bytes(root.layout)]
            return sum(same)

        return [(root, chunks_of(root)) for root in self._roots if may_see(root.salt)]

    async def chunks(
        self, may_see: Callable[[str], bool], model: str | None, salt: str | None, after: bytes, limit: int
    ) -> list[ListedChunk]:
        """The next chunks by their hashes, of a model and salt, or any; fewer than `limit` at the end."""
        found: list[Entry] = []
        async for part in self._slices():
            more = [
                entry
                for entry in part
                if entry.chunk_hash > after
                and (salt is None or entry.owner == salt)
                and (model is None or entry.layout.model == model)
                and may_see(entry.owner)
            ]
            found = nsmallest(limit, found + more, key=_HASH)
        return [
            ListedChunk(it.chunk_hash, it.layout.model, it.owner, it.room_bytes, it.leases, it.unwritten)
            for it in found
        ]

    async def _slices(self) -> AsyncIterator[list[Entry]]:
        entries = list(self._l1.index.values())
        for begin in range(0, len(entries), _AT_ONCE):
            yield entries[begin : begin + _AT_ONCE]
            await asyncio.sleep(0)
