"""What observers are told of chunks that come to a backend, or leave with it, without a request: by hash only."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Collection, Iterable
from itertools import islice

from async_cache.errors import BackendError
from async_cache.l1.store import L1Store
from async_cache.l2.guard import Guard, Listing
from async_cache.l2.guard.breaker import BreakerState
from async_cache.l2.guard.guards import held_by
from async_cache.ledger.ledger import Ledger
from async_cache.ledger.roots import Roots
from async_cache.observe import ObservedChunk, Observers, notify
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import ModelLayout
from async_cache.values import Removal

log = logging.getLogger(__name__)

_LEAVING_AT_ONCE = 256  # objects, in a millisecond or so
_MOST_LAYOUTS = 8  # that a chunk may have which L1 has not

_TOLD = 4096  # chunks: a listing has the objects of one near each other
Which = tuple[int, int]
"""The rank and group of an object."""
Objects = frozenset[Which]


class Moves:
    """Tells observers which chunks were copied to a backend, and which have left with one.

    A backend knows objects, and not which of them make a chunk: that is known from L1, or from the layouts of the
    prompts that were stored or loaded of late. Where it is not, nothing is told of what comes.
    """

    def __init__(self, l1: L1Store, roots: Roots, ledger: Ledger, observers: Observers):
        self._l1 = l1
        self._roots = roots
        self._ledger = ledger
        self._observers = observers

    def copying(self, source: Guard) -> "Arrivals":
        """Who is to hear of what is copied from a backend."""
        return Arrivals(source, self._l1, self._roots, self._observers)

    async def leave(self, guard: Guard, timeout_seconds: float) -> None:
        """Say of all that a backend has that it is lost, unless it fails, or listing it takes too long."""
        if guard.breaker.state is not BreakerState.CLOSED:
            return
        listing: Listing = []
        try:
            async with asyncio.timeout(timeout_seconds):
                while objects := await guard.next_keys(listing, _LEAVING_AT_ONCE):
                    for chunk_hash in dict.fromkeys(key.chunk_hash for key, _ in objects):
                        self._ledger.left(guard.name, chunk_hash, Removal.LOST)
        except (BackendError, TimeoutError) as error:
            log.info("backend %s: not all that leaves with it is told: %s", guard.name, error, extra=guard.about)
        finally:
            await guard.close_listing(listing)


class Arrivals:
    """Tells of each chunk that is copied to a backend once, when all of it is there."""

    def __init__(self, source: Guard, l1: L1Store, roots: Roots, observers: Observers):
        self._source = source
        self._l1 = l1
        self._roots = roots
        self._observers = observers
        self._told: dict[tuple[Guard, bytes], None] = {}
        """Chunks of several objects of late: the last of these may have come together."""

    async def __call__(self, guard: Guard, chunk_hashes: Collection[bytes]) -> None:
        """Look which of these chunks, of which objects were stored in a backend, are whole there."""
        if not self._observers.stored:
            return
        newest = {_objects(root.layout): root.layout for root in islice(self._roots, _MOST_LAYOUTS)}
        layouts = {chunk_hash: self._layouts(chunk_hash) or newest for chunk_hash in chunk_hashes}
        keys = [ObjectKey(h, *which) for h, known in layouts.items() for which in frozenset[Which]().union(*known)]
        here = _by_chunk(await held_by([guard], keys))
        exist = _by_chunk(await held_by([guard, self._source], keys))
        for chunk_hash, known in layouts.items():
            has = here[chunk_hash]
            if has == exist[chunk_hash] and has in known and self._is_new(guard, chunk_hash, has):
                notify(self._observers.stored, guard.name, self._observed(chunk_hash, known[has]))

    def _layouts(self, chunk_hash: bytes) -> dict[Objects, ModelLayout]:
        """The layout of a chunk in L1, by the objects that it has then."""
        entry = self._l1.find(chunk_hash)
        return {_objects(entry.layout): entry.layout} if entry is not None else {}

    def _is_new(self, guard: Guard, chunk_hash: bytes, has: Objects) -> bool:
        if len(has) > 1:
            if (guard, chunk_hash) in self._told:
                return False
            self._told[guard, chunk_hash] = None
            if len(self._told) > _TOLD:
                del self._told[next(iter(self._told))]
        return True

    def _observed(self, chunk_hash: bytes, layout: ModelLayout) -> ObservedChunk:
        entry = self._l1.find(chunk_hash)
        if entry is not None:
            return entry.observed()
        tokens, objects = layout.chunk_tokens, layout.objects.full_mask
        return ObservedChunk(chunk_hash, None, objects, room_bytes=0, is_whole=True, tokens=tokens, parent=None)


def _objects(layout: ModelLayout) -> Objects:
    objects = layout.objects
    return frozenset(objects.members[objects.full_mask])


def _by_chunk(held: Iterable[ObjectKey]) -> defaultdict[bytes, Objects]:
    """By chunk, which of its objects are held."""
    found: defaultdict[bytes, set[Which]] = defaultdict(set)
    for chunk_hash, rank, group in held:
        found[chunk_hash].add((rank, group))
    return defaultdict(frozenset, {chunk_hash: frozenset(which) for chunk_hash, which in found.items()})
