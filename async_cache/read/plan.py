"""Which prefixes can be promised: what exists of them, what must be loaded, and the room for that.

A request asks for one prompt, or for several: of each of them a prefix is promised. What needs room gets it in the
order of the prompts.
"""

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from itertools import accumulate, chain, compress, groupby, islice, repeat
from operator import and_, invert, not_

from async_cache.aio.slices import Wait, turn
from async_cache.config import CacheConfig
from async_cache.l1.entry import Entry, Reservation
from async_cache.l1.store import L1Store
from async_cache.prompt import coverage
from async_cache.prompt.layout import ModelLayout
from async_cache.prompt.parts import Parts, Run
from async_cache.read.load import ChunkLoad
from async_cache.read.loads import Loader
from async_cache.read.lookup import Found
from async_cache.read.request import Request

_BLOCKS_AT_ONCE = 2048  # reserved in a step of the loop, in a few milliseconds: so many that are free, ...
_EVICTED_AT_ONCE = 1024  # ... and so many where others are evicted for them
_PLANNED_AT_ONCE = 8192  # chunks, in a millisecond or two
_COMPARED_AT_A_TIME = 1024  # chunks


class Plan:
    """What can be promised: so many chunks of each prompt, and the objects needed, by chunk.

    `to_load` are those of them, by chunk, that are to be loaded and have no room yet.
    """

    __slots__ = ("found", "lengths", "needed", "runs", "served", "to_load")

    def __init__(self, layout: ModelLayout, exists: Sequence[int], runs: Sequence[Run]):
        self.runs = runs
        self.served = [coverage.lengths(layout, coverage.run_of(run, exists)) for run in runs]
        self.found = [served[-1] for served in self.served]  # chunks of the longest prefixes that exist
        self.lengths: Sequence[int] = ()
        self.needed: Sequence[int] = ()
        self.to_load: dict[int, int] = {}

    @property
    def length(self) -> int:
        """The number of chunks that are promised."""
        return sum(self.lengths)

    @property
    def kept(self) -> Sequence[int]:
        """By chunk, whether it is promised."""
        return coverage.covered(self.runs, self.lengths)

    def unneeded(self, entries: Sequence[Entry | None]) -> Iterable[Entry | None]:
        """Those of chunks that are not promised."""
        if len(self.runs) == 1:
            return entries[self.lengths[0] :]
        kept = self.kept
        return chain(compress(entries, map(not_, kept)), entries[len(kept) :])

    def before(self, number: int, at_most: Sequence[int]) -> list[int]:
        """The lengths if nothing from this chunk on is promised, and no more than so much."""
        limits = [min(coverage.before(run, number), most) for run, most in zip(self.runs, at_most, strict=True)]
        return list(map(coverage.largest, self.served, limits))

    def without(self, number: int) -> list[int]:
        """The lengths if this chunk is not promised, nor what lies behind it in a prompt."""
        limits = [
            run.index(number) if number in run[:length] else length
            for run, length in zip(self.runs, self.lengths, strict=True)
        ]
        return list(map(coverage.largest, self.served, limits))

    def promise(self, request: Request, lengths: Sequence[int], here: Sequence[int]) -> None:
        """Promise so many chunks, of which these objects are in L1 or on their way there."""
        self.lengths = lengths
        self.needed = needed = coverage.needed_of(request.prompt.layout, self.runs, lengths)
        self.to_load = _lacking(needed, here, request.local_mask)


def _lacking(needed: Sequence[int], here: Sequence[int], local: int) -> dict[int, int]:
    """The objects to be loaded that are not here, by chunk: most often none is, or all of many chunks in a row are."""
    if needed.count(local) == len(needed) and not any(here):
        return dict.fromkeys(range(len(needed)), local)
    lacking: dict[int, int] = {}
    for begin in range(0, len(needed), _COMPARED_AT_A_TIME):
        need, have = needed[begin : begin + _COMPARED_AT_A_TIME], here[begin : begin + _COMPARED_AT_A_TIME]
        if need != have:
            masks = map(and_, map(and_, need, repeat(local)), map(invert, have))
            lacking |= {number: mask for number, mask in enumerate(masks, begin) if mask}
    return lacking


class Planner:
    """Makes the plan of a request, and the room for it, each in one step of the loop, or in several.

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

    def plan(self, request: Request, found: Found) -> Generator[Wait, None, Plan]:
        """Plan the longest prefixes for which L1 can make room; releases the leases beyond them.

        Of very much, it is done in a few steps, with what to wait for before the next.
        """
        here = [entry.present if entry is not None else 0 for entry in request.entries]
        loads = self._loads(request, request.loads) if request.loads else {}
        for number, load in loads.items():
            here[number] |= load.wanted
        plan = Plan(request.prompt.layout, _united(here, found.masks()), request.runs)
        for number, load in loads.items():
            here[number] = _spoken_for(load, here[number])
        is_long = len(here) > _PLANNED_AT_ONCE
        if is_long:
            yield turn
        plan.promise(request, plan.found, here)
        if is_long:
            yield turn
        if not self._fits(request, plan):
            self._shorten_to_fit(request, plan, here)
        request.release(self._l1, plan.kept)  # not yet what only a shorter prefix needs
        return plan

    def reserve(self, request: Request, plan: Plan, numbers: Collection[int]) -> dict[int, int]:
        """Reserve room for what is to be loaded of these chunks, and return that; the request has the rooms then.

        Where memory is fragmented, or others have taken it, the plan becomes shorter, and nothing is reserved.
        """
        prompt, layout, to_load = request.prompt, request.prompt.layout, plan.to_load
        part = {number: to_load[number] for number in numbers if number in to_load}
        chunks, ranks = self._blocks(request, part)
        within = self._count_within_share(layout, ranks)
        blocks = list(islice(zip(map(request.hashes.__getitem__, chunks), ranks, strict=True), within))
        if isinstance(prompt, Parts):
            made = self._reserve_by_adapter(prompt, chunks, blocks)
        else:
            made = self._l1.reserve(layout, blocks, prompt.salt, prompt.adapter)
        if len(made) < len(chunks):
            self._l1.discard(made)
            here = self._here(request)
            plan.promise(request, plan.before(chunks[len(made)], plan.lengths), here)
            self._keep_behind(request, plan, here, sys.maxsize)
            request.release(self._l1, plan.kept)
            return {}
        request.rooms = rooms = list(zip(chunks, made, strict=True))
        if len(part) == len(to_load):
            plan.to_load = {}
        else:
            for number in part:
                del to_load[number]
        if _has_some(request):
            self._reserve_within(request, part, rooms)
        return part

    def _reserve_by_adapter(
        self, parts: Parts, chunks: Sequence[int], blocks: Sequence[tuple[bytes, int]]
    ) -> list[Reservation]:
        """Reserve room for blocks of prompts of which each has an adapter of its own; for the first ones at least."""
        made: list[Reservation] = []
        for adapter, alike in groupby(zip(chunks, blocks, strict=False), key=lambda block: parts.adapter_of(block[0])):
            wanted = [block for _, block in alike]
            some = self._l1.reserve(parts.layout, wanted, parts.salt, adapter)
            made += some
            if len(some) < len(wanted):
                break
        return made

    def next(self, request: Request, plan: Plan) -> list[int]:
        """The chunks that come next: of as many blocks as the loop has time for, those of a chunk together."""
        objects, to_load = request.prompt.layout.objects, plan.to_load
        room_bytes = max(1, sum(objects.room_bytes))
        chunks = _BLOCKS_AT_ONCE // len(objects.room_bytes)
        if len(to_load) > chunks or self._l1.rooms.free_bytes < room_bytes * len(to_load):
            chunks = min(
                chunks, max(_EVICTED_AT_ONCE // len(objects.room_bytes), self._l1.rooms.free_bytes // room_bytes)
            )
        return list(islice(to_load, max(1, chunks)))

    def look_again(self, request: Request, found: Found, plan: Plan, numbers: Sequence[int]) -> None:
        """See what others have done since the last step to these chunks."""
        loads = self._loads(request, request.loads.intersection(numbers))
        for number in numbers:
            lacks = plan.needed[number] & request.local_mask & ~_here(request.entries[number], loads.get(number))
            if lacks & ~found.mask_of(number):
                self._leave_out(request, plan, number)
                left = zip(plan.runs, plan.lengths, plan.found, strict=True)
                plan.found = [length if number in run else found for run, length, found in left]
                return
            if self._is_occupied(request.entries[number], lacks):
                self._leave_out(request, plan, number)
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

    def _leave_out(self, request: Request, plan: Plan, number: int) -> None:
        """Promise neither this chunk nor what lies behind it in a prompt."""
        plan.promise(request, plan.without(number), self._here(request))
        request.release(self._l1, plan.kept)

    def _here(self, request: Request) -> list[int]:
        loads = self._loads(request, request.loads)
        return [_here(entry, loads.get(n)) for n, entry in enumerate(request.entries)]

    def _loads(self, request: Request, numbers: Iterable[int]) -> dict[int, ChunkLoad]:
        table, hashes = self._loader.in_flight(), request.hashes
        return {number: table[hashes[number]] for number in numbers}

    # The room for it.

    def _blocks(self, request: Request, to_load: Mapping[int, int]) -> tuple[Sequence[int], Sequence[int]]:
        """The blocks that have no room yet: the chunk of each, and the rank."""
        objects, entries = request.prompt.layout.objects, request.entries
        if not _has_some(request):
            if len(objects.room_bytes) == 1:
                return list(to_load), [0] * len(to_load)
            blocks = [(n, rank) for n, mask in to_load.items() for rank in objects.ranks[mask]]
        else:
            loads = self._loads(request, request.loads.intersection(to_load))
            has_room = {n: _ranks_with_room(entries[n], loads.get(n)) for n in to_load}
            ranks = objects.ranks
            blocks = [(n, rank) for n, mask in to_load.items() for rank in ranks[mask] if not has_room[n] >> rank & 1]
        return [n for n, _ in blocks], [rank for _, rank in blocks]

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
        return size <= self._l1.rooms.make_available(size) + sum(map(_spare_bytes, plan.unneeded(request.entries)))

    def _left_of_share(self, size_bytes: int) -> int:
        """What loads may have of L1 beside those that are on their way, of which as many are released as it takes."""
        left = self._share_bytes - self._loader.reserved_bytes()
        while size_bytes > left and self._l1.rooms.catch_up():
            left = self._share_bytes - self._loader.reserved_bytes()
        return left

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
        """Find the longest plan that fits: the shorter, the fewer its blocks, and the more of its leases may go.

        What comes first has its room first, also that of leases behind it; of these, the rest stays.
        """
        if request.prompt.layout.objects.windows:  # a shorter prefix needs something else, and has to be planned

            def is_too_long(end: int) -> bool:
                plan.promise(request, plan.before(end, plan.found), here)
                return not self._fits(request, plan)

            end = bisect_left(range(1, len(plan.kept) + 1), True, key=is_too_long)
            plan.promise(request, plan.before(end, plan.found), here)
        else:
            end, left_bytes = self._last_that_fits(request, plan)
            plan.promise(request, plan.before(end, plan.found), here)
            self._keep_behind(request, plan, here, left_bytes)

    def _last_that_fits(self, request: Request, plan: Plan) -> tuple[int, int]:
        """Up to which chunk all has room that is to be loaded, and how much of the leases behind it is not needed."""
        entries, to_load, occupied = request.entries, plan.to_load, self._loader.occupied
        numbers, rooms = list(to_load), [0, *accumulate(self._room_bytes(request, to_load))]
        kept = plan.kept
        among = sum(map(_spare_bytes, compress(entries, map(not_, kept)))) if 0 in kept else 0  # in front, not needed
        behind = entries if not among else [e if n >= len(kept) or kept[n] else None for n, e in enumerate(entries)]
        spare = list(
            accumulate(map(_spare_bytes, reversed(behind)), initial=among)
        )  # by how many of the last chunks go
        available, share = self._l1.rooms.make_available(rooms[-1]), self._left_of_share(rooms[-1])

        def room_before(end: int) -> int:
            return rooms[bisect_left(numbers, end)]

        def is_too_long(end: int) -> bool:
            room = room_before(end)
            return room > 0 and room > min(share, available + spare[len(entries) - end])

        end = bisect_left(range(1, len(kept) + 1), True, key=is_too_long)
        if occupied:
            in_vain = (n for n in numbers if self._is_occupied(entries[n], to_load[n]))
            end = min(end, next(in_vain, end))
        return end, available + spare[len(entries) - end] - room_before(end)

    def _keep_behind(self, request: Request, plan: Plan, here: Sequence[int], left_bytes: int) -> None:
        """Promise also what needs no room, of the prompts behind the one that got no more, while that has its own."""
        if len(plan.runs) == 1 or request.prompt.layout.objects.windows:
            return
        lengths, full = list(plan.lengths), request.local_mask
        for part, (run, found) in enumerate(zip(plan.runs, plan.found, strict=True)):
            for number in run[lengths[part] : found]:
                left_bytes -= _spare_bytes(request.entries[number])
                if left_bytes < 0 or full & ~here[number]:
                    break
                lengths[part] += 1
            lengths[part] = coverage.largest(plan.served[part], lengths[part])
        plan.promise(request, lengths, here)


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
    if not any(here):
        if len(found) == len(here) and len(masks := set(found.values())) == 1:
            return [*masks] * len(here)
        return list(map(found.get, range(len(here)), repeat(0)))
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
