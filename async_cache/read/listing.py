"""What is cached, for those who look: the roots that chunks have, and the chunks of a tier, in pages."""

from collections import Counter
from collections.abc import AsyncIterator, Callable
from heapq import nsmallest
from operator import attrgetter

from async_cache.aio.slices import InTurns, turn
from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.l2.guard import Guard
from async_cache.l2.guard import Listing as Objects
from async_cache.l2.guard.guards import Guards
from async_cache.ledger.roots import Root, Roots
from async_cache.prompt.layout import ModelLayout
from async_cache.values import ListedChunk

_AT_ONCE = 2048  # entries, in a millisecond or two
_OBJECTS_AT_ONCE = 2048  # of a backend, the same
_HASH = attrgetter("chunk_hash")


class Listing:
    """Lists what a tier has, a slice at a time, so that it holds up nobody. Chunks may come and go meanwhile."""

    def __init__(self, l1: L1Store, guards: Guards, roots: Roots):
        self._l1 = l1
        self._guards = guards
        self._roots = roots

    async def roots(self, may_see: Callable[[str], bool]) -> list[tuple[Root, int]]:
        """The roots of prompts of these salts that were stored or loaded of late, and the chunks in memory of each.

        Chunks are told apart by their layout and salt: those of several adapters are counted with each.
        """
        count: Counter[tuple[ModelLayout, str]] = Counter()
        await turn()  # also the first slice: many may ask at once
        async for part in self._entries():
            count.update([(entry.layout, entry.owner) for entry in part])

        def chunks_of(root: Root) -> int:
            same = [n for (it, salt), n in count.items() if salt == root.salt and it.same_bytes(root.layout)]
            return sum(same)

        return [(root, chunks_of(root)) for root in self._roots if may_see(root.salt)]

    async def chunks(
        self, may_see: Callable[[str], bool], model: str | None, salt: str | None, after: bytes, limit: int
    ) -> list[ListedChunk]:
        """The next chunks of L1 by their hashes, of a model and salt, or any; fewer than `limit` at the end."""
        found: list[Entry] = []
        await turn()
        async for part in self._entries():
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

    async def stored(self, backend: str, after: bytes, limit: int) -> list[ListedChunk]:
        """The next chunks of a backend by their hashes, with what it keeps of each; fewer than `limit` at the end.

        A backend knows no more of a chunk than its hash: model and salt are those of L1, and empty where it lacks it.
        All of the backend is looked at for each page. Raises ConfigError for a name that there is not, and BackendError
        for a backend that cannot list what it has.
        """
        sizes: dict[bytes, int] = {}
        async for chunk_hash, size_bytes in _objects(self._guards.find(backend)):
            if chunk_hash > after:
                sizes[chunk_hash] = sizes.get(chunk_hash, 0) + size_bytes
                if len(sizes) >= limit + _OBJECTS_AT_ONCE:  # those that are left out are left out for good
                    sizes = {chunk_hash: sizes[chunk_hash] for chunk_hash in nsmallest(limit, sizes)}
        return [self._stored_chunk(chunk_hash, sizes[chunk_hash]) for chunk_hash in nsmallest(limit, sizes)]

    def _stored_chunk(self, chunk_hash: bytes, size_bytes: int) -> ListedChunk:
        entry = self._l1.find(chunk_hash)
        model, salt = (entry.layout.model, entry.owner) if entry is not None else ("", "")
        return ListedChunk(chunk_hash, model, salt, size_bytes, leases=0, unwritten=0)

    def _entries(self) -> InTurns[Entry]:
        return InTurns(list(self._l1.index.values()), _AT_ONCE)


async def _objects(guard: Guard) -> AsyncIterator[tuple[bytes, int]]:
    """The chunk and the size of each object that a backend has."""
    listing: Objects = []
    with guard.kept():
        try:
            while objects := await guard.next_keys(listing, _OBJECTS_AT_ONCE):
                for key, size_bytes in objects:
                    yield key.chunk_hash, size_bytes
        finally:
            await guard.close_listing(listing)
