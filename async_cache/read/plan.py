"""Which prefix can be promised: what exists of it, what must be loaded, and the room for that."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from async_cache.config import CacheConfig
from async_cache.l1.entry import Entry, Reservation
from async_cache.l1.store import L1Store
from async_cache.prompt import coverage
from async_cache.read.load import ChunkLoad
from async_cache.read.loads import Loader
from async_cache.read.lookup import Found
from async_cache.read.request import Request


class Plan(NamedTuple):
    """What can be promised of a prefix: the objects needed, by chunk, and those of them that are to be loaded."""

    needed: Sequence[int]
    to_load: dict[int, int]
    found: int  # chunks of the longest prefix that exists

    @property
    def length(self) -> int:
        """The number of chunks that are promised."""
        return len(self.needed)


class _Lacks(NamedTuple):
    """What a prefix of some length needs, what of it is to be loaded, and the blocks that have no room yet."""

    needed: Sequence[int]
    to_load: dict[int, int]
    blocks: list[tuple[int, int]]  # (chunk, rank)


class Planner:
    """Makes the plan of a request, and with it the room, in one step of the loop."""

    def __init__(self, l1: L1Store, loader: Loader, config: CacheConfig):
        self._l1 = l1
        self._loader = loader
        self._share_bytes = int(l1.arena.size_bytes * config.prefetch_share)

    def plan(self, request: Request, found: Found) -> Plan:
        """Plan the longest prefix for which L1 can make room; the request has the rooms then.

        Releases the leases beyond that prefix.
        """
        layout, hashes, entries = request.prompt.layout, request.hashes, request.entries
        objects = layout.objects
        table = self._loader.in_flight()
        loads = {number: table[hashes[number]] for number in request.loads}
        here = [entry.present if entry is not None else 0 for entry in entries]
        for number, load in loads.items():
            here[number] |= load.wanted
        served = coverage.lengths(layout, _united(here, found.masks()))
        for number, load in loads.items():
            if load.abandoned:  # what starts again cannot take more with it
                here[number] = objects.full_mask
        partly = bool(loads) or any(entries)

        def lacks(length: int) -> _Lacks:
            needed = coverage.needed(layout, length)
            local = request.local_mask
            to_load = {
                n: mask
                for n, (need, have) in enumerate(zip(needed, here, strict=False))
                if (mask := need & local & ~have)
            }
            blocks = [(n, rank) for n, mask in to_load.items() for rank in objects.ranks[mask]]
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
            request.release(self._l1, [1] * length)  # not yet what only a shorter prefix needs
            blocks = lacking.blocks
            made = self._l1.reserve(layout, [(hashes[n], rank) for n, rank in blocks], request.prompt.salt)
            request.rooms = rooms = list(zip([n for n, _ in blocks], made, strict=False))
            if len(made) == len(blocks):
                break
            self._l1.discard(made)  # memory is fragmented
            length = coverage.largest(served, blocks[len(made)][0])
            lacking = lacks(length)
        request.release(self._l1, lacking.needed)
        if partly:
            self._reserve_within(request, lacking.to_load, rooms)
        return Plan(lacking.needed, lacking.to_load, served[-1])

    def _reserve_within(
        self, request: Request, to_load: Mapping[int, int], rooms: list[tuple[int, Reservation]]
    ) -> None:
        """Reserve what is lacking of a rank's block that is in L1 already."""
        for number, mask in to_load.items():
            entry = request.entries[number]
            for rank in request.prompt.layout.objects.ranks[mask]:
                if entry is not None and entry.ranks >> rank & 1:
                    rooms.append((number, self._l1.reserve_within(entry, rank)))

    def _fits(self, request: Request, lacking: _Lacks) -> bool:
        """Whether L1 can make room for blocks, also by what the request itself leases and does not need.

        No room is there where something is to be loaded into a block to which an abandoned call may still write.
        """
        objects, occupied = request.prompt.layout.objects, self._loader.occupied
        wanted = ((request.entries[n], r) for n, mask in lacking.to_load.items() for r in objects.ranks[mask])
        if occupied and not occupied.isdisjoint(wanted):
            return False
        if not lacking.blocks:
            return True
        rooms = objects.room_bytes
        size = sum([rooms[rank] for _, rank in lacking.blocks])
        if size > self._share_bytes - self._loader.reserved_bytes():
            return False
        if size <= self._l1.available_bytes:
            return True
        spare = sum(
            entry.room_bytes
            for entry in request.entries[len(lacking.needed) :]
            if entry is not None and entry.leases == 1 and not entry.pins
        )
        return size <= self._l1.available_bytes + spare


def _united(here: list[int], found: Mapping[int, int]) -> Sequence[int]:
    """By chunk, the objects that are in L1, on their way there, or found in L2."""
    if not found:
        return here
    exists = list(here)
    for number, mask in found.items():
        exists[number] |= mask
    return exists


def _ranks_with_room(entry: Entry | None, load: ChunkLoad | None) -> int:
    """The ranks, by bit, that have a block for this chunk, resident or on its way."""
    ranks = entry.ranks if entry is not None else 0
    for reservation in load.reservations if load is not None else ():
        ranks |= 1 << reservation.rank
    return ranks
