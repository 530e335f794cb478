"""Which prefix can be promised: what exists of it, what must be loaded, and the room for that."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from async_cache import coverage
from async_cache.config import CacheConfig
from async_cache.l1.entry import Reservation
from async_cache.l1.store import L1Store
from async_cache.loads import Loader
from async_cache.lookup import Found
from async_cache.removal import Hidden
from async_cache.request import Request


class Plan(NamedTuple):
    """A prefix that can be promised. Chunks are keys of the mappings, objects are masks."""

    length: int
    found: int  # the longest that exists
    needed: Sequence[int]
    to_load: dict[int, int]
    reservations: dict[int, list[Reservation]]


class Planner:
    """Makes the plan of a request, and with it the room, in one step of the loop."""

    def __init__(self, l1: L1Store, loader: Loader, hidden: Hidden, config: CacheConfig):
        self._l1 = l1
        self._loader = loader
        self._hidden = hidden
        self._share_bytes = int(l1.arena.size_bytes * config.prefetch_share)

    def plan(self, request: Request, found: Found | None) -> Plan:
        """The longest prefix for which L1 can make room. Gives back the leases beyond it."""
        layout, hashes = request.prompt.layout, request.hashes
        served = coverage.lengths(layout, self._exists(request, hashes, found))
        length = served[-1]
        if not self._fits(request, hashes, length):
            # The shorter the prefix, the fewer its blocks, and the more of the request's own leases may go.
            lengths = range(1, len(served))
            length = served[bisect_left(lengths, True, key=lambda i: not self._fits(request, hashes, served[i]))]
        while True:
            needed = coverage.needed(layout, length)
            to_load, blocks = self._lacks(request, hashes, needed)
            release_unneeded(self._l1, request, needed)
            made = self._l1.reserve(layout, [(hashes[number], rank) for number, rank in blocks])
            if len(made) == len(blocks):
                break
            for reservation in made:  # memory is fragmented
                self._l1.discard(reservation)
            length = coverage.largest(served, blocks[len(made)][0])
        reservations: dict[int, list[Reservation]] = {}
        for (number, _), reservation in zip(blocks, made, strict=True):
            reservations.setdefault(number, []).append(reservation)
        for number, mask in to_load.items():
            entry = request.entries[number]
            if entry is not None:
                within = [rank for rank in layout.ranks(mask) if entry.ranks >> rank & 1]
                reservations.setdefault(number, []).extend(self._l1.reserve_within(entry, rank) for rank in within)
        return Plan(length, served[-1], needed, to_load, reservations)

    def _exists(self, request: Request, hashes: Sequence[bytes], found: Found | None) -> list[int]:
        """By chunk, the objects that are in L1, on their way there, or found in L2."""
        exists = [entry.present if entry is not None else 0 for entry in request.entries]
        for number in request.loads:
            exists[number] |= self._loader.table[hashes[number]].wanted
        for number, mask in found.masks().items() if found is not None else ():
            if hashes[number] not in self._hidden:
                exists[number] |= mask
        return exists

    def _lacks(
        self, request: Request, hashes: Sequence[bytes], needed: Sequence[int]
    ) -> tuple[dict[int, int], list[tuple[int, int]]]:
        """The objects to load for a prefix, by chunk, and the (chunk, rank) that have no room yet."""
        layout, local, loads = request.prompt.layout, request.local_mask, request.loads
        to_load: dict[int, int] = {}
        blocks = []
        for number, (mask, entry) in enumerate(zip(needed, request.entries, strict=False)):
            mask &= local
            roomy = 0
            if entry is not None:
                mask &= ~entry.present
                roomy = entry.ranks
            if mask and number in loads:
                load = self._loader.table[hashes[number]]
                mask &= ~load.wanted
                roomy |= sum(1 << reservation.rank for reservation in load.reservations)
            if mask:
                to_load[number] = mask
                for rank in layout.ranks(mask):
                    if not roomy >> rank & 1:
                        blocks.append((number, rank))
        return to_load, blocks

    def _fits(self, request: Request, hashes: Sequence[bytes], length: int) -> bool:
        """Whether L1 can make room for what a prefix lacks, also by what the request itself leases beyond it."""
        rooms = request.prompt.layout.room_bytes
        needed = coverage.needed(request.prompt.layout, length)
        _, blocks = self._lacks(request, hashes, needed)
        size = sum([rooms[rank] for _, rank in blocks])
        if size <= self._l1.available_bytes or not size:
            return size <= max(0, self._share_bytes - self._loader.room_bytes)
        spare = sum(
            entry.room_bytes
            for number, entry in enumerate(request.entries)
            if entry is not None and entry.leases == 1 and not entry.holds and not (number < length and needed[number])
        )
        return size <= min(self._l1.available_bytes + spare, self._share_bytes - self._loader.room_bytes)


def release_unneeded(l1: L1Store, request: Request, needed: Sequence[int]) -> None:
    """Give back the leases of chunks of which nothing is needed: the tail first, so that it is evicted first."""
    entries = request.entries
    for number in range(len(entries) - 1, -1, -1):
        entry = entries[number]
        if entry is not None and not (number < len(needed) and needed[number]):
            entries[number] = None
            l1.release(entry)
