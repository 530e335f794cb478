"""Which prefix can be promised: what exists of it, what must be loaded, and the room for that."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, islice

from async_cache.config import CacheConfig
from async_cache.l1.entry import Entry, Reservation
from async_cache.l1.store import L1Store
from async_cache.prompt import coverage
from async_cache.prompt.layout import ModelLayout
from async_cache.read.load import ChunkLoad
from async_cache.read.loads import Loader
from async_cache.read.lookup import Found
from async_cache.read.request import Request

_BLOCKS_AT_ONCE = 2048  # reserved in a step of the loop, in a few milliseconds: so many that are free, ...
_EVICTED_AT_ONCE = 1024  # ... and so many where others are evicted for them


class Plan:
    """What can be promised of a prefix: the objects needed, by chunk.

    `to_load` are those of them, by chunk, that are to be loaded and have no room yet.
    """

    __slots__ = ("found", "needed", "served", "to_load")

    def __init__(self, layout: ModelLayout, exists: Sequence[int]):
        self.served = coverage.lengths(layout, exists)
        self.found = self.served[-1]  # chunks of the longest prefix that exists
        self.needed: Sequence[int] = ()
        self.to_load: dict[int, int] = {}

    @property
    def length(self) -> int:
        """The number of chunks that are promised."""
        return len(self.needed)

    def shorten(self, request: Request, length: int, here: Sequence[int]) -> None:
        """Promise so many chunks, of which these objects are in L1 or on their way there."""
        self.needed = coverage.needed(request.prompt.layout, length)
        local, triples = request.local_mask, enumerate(zip(self.needed, here, strict=False))
        self.to_load = {n: mask for n, (need, have) in triples if (mask := need & local & ~have)}


class Planner:
    """Makes the plan of a request in one step of the loop, and the room for it in one or more.

    Between these, others have their turn. So who reserves looks again at what is to be loaded: it may have come by now,
    be on its way, or be gone.
    """

    def __init__(self, l1: L1Store, loader: Loader, config: CacheConfig):
        self._l1 = l1
        self._loader = loader
        self.reconfigure(config)

    def reconfigure(self, config: CacheConfig) -> None:
        """Give loads in flight the share of L1 that the settings say."""
        self._share_bytes = int(self._l1.arena.size_bytes * config.prefetch_share)

    def plan(self, request: Request, found: Found) -> Plan:
        """Plan the longest prefix for which L1 can make room; releases the leases beyond it."""
        here = [entry.present if entry is not None else 0 for entry in request.entries]
        loads = self._loads(request, request.loads)
        for number, load in loads.items():
            here[number] |= load.wanted
        plan = Plan(request.prompt.layout, _united(here, found.masks()))
        for number, load in loads.items():
            here[number] = _spoken_for(load, here[number])
        plan.shorten(request, plan.found, here)
        if not self._fits(request, plan):
            self._shorten_to_fit(request, plan, here)
        request.release(self._l1, [1] * plan.length)  # not yet what only a shorter prefix needs
        return plan

    def reserve(self, request: Request, plan: Plan, numbers: Iterable[int]) -> dict[int, int]:
        """Reserve room for what is to be loaded of these chunks, and return that; the request has the rooms then.

        Where memory is fragmented, or others have taken it, the plan becomes shorter, and nothing is reserved.
        """
        layout, hashes = request.prompt.layout, request.hashes
        part = {number: plan.to_load[number] for number in numbers if number in plan.to_load}
        blocks = self._blocks(request, part)
        share = blocks[: self._count_within_share(layout, [rank for _, rank in blocks])]
        made = self._l1.reserve(layout, [(hashes[n], rank) for n, rank in share], request.prompt.salt)
        if len(made) < len(blocks):
            self._l1.discard(made)
            self.cut(request, plan, blocks[len(made)][0])
            return {}
        request.rooms = rooms = list(zip([n for n, _ in blocks], made, strict=True))
        if len(part) == len(plan.to_load):
            plan.to_load = {}
        else:
            for number in part:
                del plan.to_load[number]
        if _has_some(request):
            self._reserve_within(request, part, rooms)
        return part

    def next(self, request: Request, plan: Plan) -> list[int]:
        """The chunks that come next: of as many blocks as the loop has time for, those of a chunk together."""
        objects, to_load = request.prompt.layout.objects, plan.to_load
        room_bytes = max(1, sum(objects.room_bytes))
        chunks = _BLOCKS_AT_ONCE // len(objects.room_bytes)
        if len(to_load) > chunks or self._l1.free_bytes < room_bytes * len(to_load):
            chunks = min(chunks, max(_EVICTED_AT_ONCE // len(objects.room_bytes), self._l1.free_bytes // room_bytes))
        return list(islice(to_load, max(1, chunks)))

    def look_again(self, request: Request, found: Found, plan: Plan, numbers: Sequence[int]) -> None:
        """See what others have done since the last step to these chunks."""
        loads = self._loads(request, request.loads.intersection(numbers))
        for number in numbers:
            lacks = plan.needed[number] & request.local_mask & ~_here(request.entries[number], loads.get(number))
            if lacks & ~found.mask_of(number):
                self.cut(request, plan, number)
                plan.found = plan.length
                return
            if self._is_occupied(request.entries[number], lacks):
                self.cut(request, plan, number)
                return
            if lacks:
                plan.to_load[number] = lacks
            else:
                del plan.to_load[number]

    def _is_occupied(self, entry: Entry | None, mask: int) -> bool:
        """Whether an abandoned call may still write to where these objects of a chunk are to be loaded."""
        occupied = self._loader.occupied
        if entry is None or not occupied:
            return False
        return any((entry, rank) in occupied for rank in entry.layout.objects.ranks[mask])

    def cut(self, request: Request, plan: Plan, number: int) -> None:
        """Promise nothing from this chunk on."""
        loads = self._loads(request, request.loads)
        here = [_here(entry, loads.get(n)) for n, entry in enumerate(request.entries)]
        plan.shorten(request, coverage.largest(plan.served, number), here)
        request.release(self._l1, [1] * plan.length)

    def _loads(self, request: Request, numbers: Iterable[int]) -> dict[int, ChunkLoad]:
        table, hashes = self._loader.in_flight(), request.hashes
        return {number: table[hashes[number]] for number in numbers}

    # The room for it.

    def _blocks(self, request: Request, to_load: Mapping[int, int]) -> list[tuple[int, int]]:
        """The blocks that have no room yet, as (chunk, rank)."""
        ranks, entries = request.prompt.layout.objects.ranks, request.entries
        blocks = [(n, rank) for n, mask in to_load.items() for rank in ranks[mask]]
        if not _has_some(request):
            return blocks
        loads = self._loads(request, request.loads.intersection(to_load))
        return [(n, rank) for n, rank in blocks if not _ranks_with_room(entries[n], loads.get(n)) >> rank & 1]

    def _reserve_within(
        self, request: Request, to_load: Mapping[int, int], rooms: list[tuple[int, Reservation]]
    ) -> None:
        """Reserve what is lacking of a rank's block that is in L1 already."""
        entries = request.entries
        for number, entry in zip(to_load, map(entries.__getitem__, to_load), strict=True):
            if entry is not None:
                for rank in request.prompt.layout.objects.ranks[to_load[number]]:
                    if entry.ranks >> rank & 1:
                        rooms.append((number, self._l1.reserve_within(entry, rank)))

    def _fits(self, request: Request, plan: Plan) -> bool:
        """Whether L1 can make room for what is to be loaded, also by what the request leases and does not need.

        No room is there where something is to be loaded into a block to which an abandoned call may still write.
        """
        occupied = self._loader.occupied
        if not plan.to_load:
            return True
        if occupied and any(self._is_occupied(request.entries[n], mask) for n, mask in plan.to_load.items()):
            return False
        size = sum(self._room_bytes(request, plan.to_load))
        if size > self._left_of_share(size):
            return False
        return size <= self._l1.make_available(size) + sum(map(_spare_bytes, request.entries[plan.length :]))

    def _left_of_share(self, size_bytes: int) -> int:
        """What loads may have of L1 beside those that are on their way, of which as many are released as it takes."""
        while size_bytes > self._share_bytes - self._loader.reserved_bytes() and self._l1.catch_up():
            pass
        return self._share_bytes - self._loader.reserved_bytes()

    def _count_within_share(self, layout: ModelLayout, ranks: Sequence[int]) -> int:
        """How many blocks of these ranks, from the first one on, the share of loads allows now."""
        rooms = layout.objects.room_bytes
        most = len(ranks) * max(rooms)
        left = self._left_of_share(most)
        return len(ranks) if most <= left else bisect_right(list(accumulate(map(rooms.__getitem__, ranks))), left)

    def _room_bytes(self, request: Request, to_load: Mapping[int, int]) -> Iterable[int]:
        """By chunk, the room that it lacks."""
        objects, entries = request.prompt.layout.objects, request.entries
        if not _has_some(request):
            return map(objects.rooms.__getitem__, to_load.values())
        sizes, loads = objects.room_bytes, self._loads(request, request.loads.intersection(to_load))
        return [
            sum(sizes[r] for r in objects.ranks[mask] if not there >> r & 1)
            for n, mask in to_load.items()
            for there in (_ranks_with_room(entries[n], loads.get(n)),)
        ]

    def _shorten_to_fit(self, request: Request, plan: Plan, here: Sequence[int]) -> None:
        """Find the longest plan that fits: the shorter, the fewer its blocks, and the more of its leases may go."""
        layout, served = request.prompt.layout, plan.served
        if layout.objects.windows:  # a shorter prefix needs something else, and has to be planned

            def is_too_long(number: int) -> bool:
                plan.shorten(request, served[number], here)
                return not self._fits(request, plan)

            length = served[bisect_left(range(1, len(served)), True, key=is_too_long)]
        else:
            length = self._longest_that_fits(request, plan)
        plan.shorten(request, length, here)

    def _longest_that_fits(self, request: Request, plan: Plan) -> int:
        entries, to_load, occupied = request.entries, plan.to_load, self._loader.occupied
        numbers, rooms = list(to_load), [0, *accumulate(self._room_bytes(request, to_load))]
        spare = [0, *accumulate(map(_spare_bytes, reversed(entries)))]  # by how many of the last chunks are not needed
        available, share = self._l1.make_available(rooms[-1]), self._left_of_share(rooms[-1])

        def is_too_long(length: int) -> bool:
            room = rooms[bisect_left(numbers, length)]
            return room > 0 and room > min(share, available + spare[len(entries) - length])

        length = bisect_left(range(1, plan.length + 1), True, key=is_too_long)
        if occupied:
            in_vain = (n for n in numbers if self._is_occupied(entries[n], to_load[n]))
            length = min(length, next(in_vain, length))
        return length


def _has_some(request: Request) -> bool:
    """Whether a part of what is to be loaded may have room already."""
    return bool(request.loads) or any(request.entries)


def _here(entry: Entry | None, load: ChunkLoad | None) -> int:
    """The objects of a chunk that are in L1, or on their way there."""
    present = entry.present if entry is not None else 0
    return _spoken_for(load, present | load.wanted) if load is not None else present


def _spoken_for(load: ChunkLoad, here: int) -> int:
    """What can not be loaded of a chunk that is on its way: what starts again cannot take more with it."""
    return load.layout.objects.full_mask if load.abandoned else here


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


def _spare_bytes(entry: Entry | None) -> int:
    """What L1 could have of an entry that this request leases and does not need."""
    return entry.room_bytes if entry is not None and entry.leases == 1 and not entry.pins else 0
