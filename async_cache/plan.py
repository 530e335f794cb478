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
    rooms: dict[int, list[Reservation]]


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
        needed, to_load, blocks = self._lacks(request, hashes, length)
        if not self._fits(request, needed, blocks):
            length = self._largest_that_fits(request, hashes, served)
            needed, to_load, blocks = self._lacks(request, hashes, length)
        while True:
            release_unneeded(self._l1, request, [1] * length)  # not yet what only a shorter prefix needs
            made = self._l1.reserve(layout, [(hashes[number], rank) for number, rank in blocks])
            if len(made) == len(blocks):
                break
            for reservation in made:  # memory is fragmented
                self._l1.discard(reservation)
            length = coverage.largest(served, blocks[len(made)][0])
            needed, to_load, blocks = self._lacks(request, hashes, length)
        release_unneeded(self._l1, request, needed)
        rooms: dict[int, list[Reservation]] = {number: [] for number in to_load}
        for (number, _), reservation in zip(blocks, made, strict=True):
            rooms[number].append(reservation)
        if len(blocks) < sum(len(layout.ranks[mask]) for mask in to_load.values()):
            self._reserve_within(request, to_load, rooms)
        return Plan(length, served[-1], needed, to_load, rooms)

    def _reserve_within(self, request: Request, to_load: dict[int, int], rooms: dict[int, list[Reservation]]) -> None:
        """Where a rank's block is in L1 already, what it lacks goes there."""
        for number, mask in to_load.items():
            entry = request.entries[number]
            if entry is not None:
                within = [rank for rank in request.prompt.layout.ranks[mask] if entry.ranks >> rank & 1]
                rooms[number] += [self._l1.reserve_within(entry, rank) for rank in within]

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
        self, request: Request, hashes: Sequence[bytes], length: int
    ) -> tuple[Sequence[int], dict[int, int], list[tuple[int, int]]]:
        """What a prefix needs, by chunk; what of it is to be loaded; and the (chunk, rank) that have no room yet."""
        layout, local, loads = request.prompt.layout, request.local_mask, request.loads
        needed = coverage.needed(layout, length)
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
                mask &= 0 if load.abandoned else ~load.wanted  # what starts again can not take more with it
                roomy |= sum(1 << reservation.rank for reservation in load.reservations)
            if mask:
                to_load[number] = mask
                for rank in layout.ranks[mask]:
                    if not roomy >> rank & 1:
                        blocks.append((number, rank))
        return needed, to_load, blocks

    def _fits(self, request: Request, needed: Sequence[int], blocks: Sequence[tuple[int, int]]) -> bool:
        """Whether L1 can make room for blocks, also by what the request itself leases and does not need."""
        if not blocks:
            return True
        rooms = request.prompt.layout.room_bytes
        size = sum([rooms[rank] for _, rank in blocks])
        if size > self._share_bytes - self._loader.room_bytes:
            return False
        if size <= self._l1.available_bytes:
            return True
        spare = sum(
            entry.room_bytes
            for entry in request.entries[len(needed) :]
            if entry is not None and entry.leases == 1 and not entry.holds
        )
        return size <= self._l1.available_bytes + spare

    def _largest_that_fits(self, request: Request, hashes: Sequence[bytes], served: Sequence[int]) -> int:
        """By bisection: the shorter a prefix, the fewer its blocks, and the more of the request's leases may go."""

        def too_long(position: int) -> bool:
            needed, _, blocks = self._lacks(request, hashes, served[position])
            return not self._fits(request, needed, blocks)

        return served[bisect_left(range(1, len(served)), True, key=too_long)]


def release_unneeded(l1: L1Store, request: Request, needed: Sequence[int]) -> None:
    """Give back the leases of chunks of which nothing is needed: the tail first, so that it is evicted first."""
    entries = request.entries
    for number in range(len(entries) - 1, -1, -1):
        entry = entries[number]
        if entry is not None and not (number < len(needed) and needed[number]):
            entries[number] = None
            l1.release(entry)
