"""Which prefix can be promised: what exists of it, what must be loaded, and the room for that."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from async_cache.config import CacheConfig
from async_cache.l1.entry import Entry, Reservation
from async_cache.l1.store import L1Store
from async_cache.l2.tombstones import Tombstones
from async_cache.prompt import coverage
from async_cache.read.loads import ChunkLoad, Loader
from async_cache.read.lookup import Found
from async_cache.read.request import Request


class Plan(NamedTuple):
    """A prefix that can be promised. Chunks are numbers, objects are masks."""

    length: int
    found: int  # the longest that exists
    needed: Sequence[int]
    to_load: dict[int, int]
    rooms: list[tuple[int, Reservation]]


class _Lacks(NamedTuple):
    """What a prefix of some length needs, and what of it is to be loaded."""

    needed: Sequence[int]
    to_load: dict[int, int]
    blocks: list[tuple[int, int]]  # the (chunk, rank) that have no room yet


class Planner:
    """Makes the plan of a request, and with it the room, in one step of the loop."""

    def __init__(self, l1: L1Store, loader: Loader, tombstones: Tombstones, config: CacheConfig):
        self._l1 = l1
        self._loader = loader
        self._tombstones = tombstones
        self._share_bytes = int(l1.arena.size_bytes * config.prefetch_share)

    def plan(self, request: Request, found: Found | None) -> Plan:
        """The longest prefix for which L1 can make room. Gives back the leases beyond it."""
        layout, hashes, entries = request.prompt.layout, request.hashes, request.entries
        table = self._loader.table
        loads = {number: table[hashes[number]] for number in request.loads}
        here = [entry.present if entry is not None else 0 for entry in entries]
        for number, load in loads.items():
            here[number] |= load.wanted
        served = coverage.lengths(layout, self._exists(here, hashes, found))
        for number, load in loads.items():
            if load.abandoned:  # what starts again can not take more with it
                here[number] = layout.objects.full_mask
        partly = bool(loads) or any(entries)

        def lacks(length: int) -> _Lacks:
            needed = coverage.needed(layout, length)
            local = request.local_mask
            to_load = {
                n: mask
                for n, (need, have) in enumerate(zip(needed, here, strict=False))
                if (mask := need & local & ~have)
            }
            blocks = [(n, rank) for n, mask in to_load.items() for rank in layout.objects.ranks[mask]]
            if partly:
                blocks = [(n, rank) for n, rank in blocks if not _ranks_with_room(entries[n], loads.get(n)) >> rank & 1]
            return _Lacks(needed, to_load, blocks)

        length = served[-1]
        lacking = lacks(length)
        if not self._fits(request, lacking):
            # By bisection: the shorter a prefix, the fewer its blocks, and the more of the request's leases may go.
            longer = range(1, len(served))
            length = served[bisect_left(longer, True, key=lambda i: not self._fits(request, lacks(served[i])))]
            lacking = lacks(length)
        while True:
            release_unneeded(self._l1, request, [1] * length)  # not yet what only a shorter prefix needs
            blocks = lacking.blocks
            made = self._l1.reserve(layout, [(hashes[number], rank) for number, rank in blocks])
            if len(made) == len(blocks):
                break
            self._l1.discard(made)  # memory is fragmented
            length = coverage.largest(served, blocks[len(made)][0])
            lacking = lacks(length)
        release_unneeded(self._l1, request, lacking.needed)
        rooms = list(zip([number for number, _ in blocks], made, strict=True))
        if partly:
            rooms += self._reserve_within(request, lacking.to_load)
        return Plan(length, served[-1], lacking.needed, lacking.to_load, rooms)

    def _reserve_within(self, request: Request, to_load: Mapping[int, int]) -> list[tuple[int, Reservation]]:
        """Where a rank's block is in L1 already, what it lacks goes there."""
        return [
            (number, self._l1.reserve_within(entry, rank))
            for number, mask in to_load.items()
            if (entry := request.entries[number]) is not None
            for rank in request.prompt.layout.objects.ranks[mask]
            if entry.ranks >> rank & 1
        ]

    def _exists(self, here: Sequence[int], hashes: Sequence[bytes], found: Found | None) -> Sequence[int]:
        """By chunk, the objects that are in L1, on their way there, or found in L2."""
        if found is None:
            return here
        exists, masks = list(here), found.masks()
        if self._tombstones:
            masks = {number: mask for number, mask in masks.items() if hashes[number] not in self._tombstones}
        for number, mask in masks.items():
            exists[number] |= mask
        return exists

    def _fits(self, request: Request, lacking: _Lacks) -> bool:
        """Whether L1 can make room for blocks, also by what the request itself leases and does not need.

        No room is there where something is to be loaded into a block to which an abandoned call may still write.
        """
        layout, occupied = request.prompt.layout, self._loader.occupied
        wanted = ((request.entries[n], r) for n, mask in lacking.to_load.items() for r in layout.objects.ranks[mask])
        if occupied and not occupied.isdisjoint(wanted):
            return False
        if not lacking.blocks:
            return True
        rooms = layout.objects.room_bytes
        size = sum([rooms[rank] for _, rank in lacking.blocks])
        if size > self._share_bytes - self._loader.room_bytes:
            return False
        if size <= self._l1.available_bytes:
            return True
        spare = sum(
            entry.room_bytes
            for entry in request.entries[len(lacking.needed) :]
            if entry is not None and entry.leases == 1 and not entry.holds
        )
        return size <= self._l1.available_bytes + spare


def _ranks_with_room(entry: Entry | None, load: ChunkLoad | None) -> int:
    """The ranks, by bit, that have a block for this chunk, resident or on its way."""
    ranks = entry.ranks if entry is not None else 0
    for reservation in load.reservations if load is not None else ():
        ranks |= 1 << reservation.rank
    return ranks


def release_unneeded(l1: L1Store, request: Request, needed: Sequence[int]) -> None:
    """Give back the leases of chunks of which nothing is needed: the tail first, so that it is evicted first."""
    entries = request.entries
    if not any(entries):
        return
    unneeded = [n for n, entry in enumerate(entries) if entry and not (n < len(needed) and needed[n])]
    l1.release(filter(None, [entries[n] for n in reversed(unneeded)]))
    for number in unneeded:
        entries[number] = None
