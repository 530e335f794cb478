"""The memory of L1: what is reserved of it, and who leaves for what has to come."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized

from async_cache.aio.backlog import Backlog
from async_cache.l1.entry import Entry, Reservation, ReservationState
from async_cache.l1.shares import Shares
from async_cache.l1.victims import Victims
from async_cache.memory.extents import Extents
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.retention.quotas import Bounds, Quota
from async_cache.values import Removal

_RESERVED, _QUARANTINED, _DONE = ReservationState  # by name each would cost a tenth of a microsecond
_ADOPTED_AT_ONCE = 1024  # entries that turn out to be within a quota, in a millisecond or two


class Rooms:
    """Rooms for blocks, each free, reserved, quarantined, or with an entry; what is evictable is among the latter.

    What a room takes is evicted in the order of `shares` and within `bounds`: `evict` takes an entry out of `index`,
    and adds what memory it leaves to a list.
    """

    def __init__(
        self,
        size_bytes: int,
        index: Mapping[bytes, Entry],
        shares: Shares,
        bounds: Bounds,
        evict: Callable[[Entry, list[tuple[int, int]], Removal], None],
    ):
        self._size_bytes = size_bytes
        self._index = index
        self._shares = shares
        self._bounds = bounds
        self._evict = evict
        self._extents = Extents(size_bytes)
        self.free_all = self._extents.free_all
        """Give back the memory at each (offset, bytes)."""
        self.victims = Victims(shares, self._extents, index, lambda: self.evictable_bytes > 0)
        self.detached: set[Entry] = set()
        """Entries that have left the index, and have their memory until nobody uses it."""
        self.backlogs: list[Backlog] = []
        """All that gives back room soon."""
        self.waiting: list[Sized] = []
        """What waits in each of these: `any` says whether there is something, in no time."""
        self._adopting = Backlog(_ADOPTED_AT_ONCE)
        self.evictable_bytes = self.reserved_bytes = self.quarantined_bytes = 0

    @property
    def used_bytes(self) -> int:
        """The bytes that are not free: resident, reserved or quarantined."""
        return self._size_bytes - self._extents.free_bytes

    @property
    def free_bytes(self) -> int:
        """The bytes that are free."""
        return self._extents.free_bytes

    @property
    def available_bytes(self) -> int:
        """The bytes that are free or may be evicted."""
        return self._extents.free_bytes + self.evictable_bytes

    # Whose they are.

    def bound(self, quotas: Sequence[Quota]) -> None:
        """Keep owners within other quotas from now on. What is there counts for them in the loop's next turns."""
        self._bounds.change(quotas)
        self._adopting.do(self._count_for_quotas, list(self._index.values()) if self._bounds else ())

    def _count_for_quotas(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if not entry.detached:
                self._bounds.adopt(entry.chunk_hash, entry.owner, entry.layout.model)

    def over_quota(self, prompt: Prompt, rank: int) -> str | None:
        """Why the owner of a prompt gets no block more of a rank, where that is a quota."""
        size, model = prompt.layout.objects.room_bytes[rank], prompt.layout.model
        for bound in self._bounds.of(prompt.salt, model):
            if bound.used_bytes + size > bound.most_bytes:
                whose = f"the salt {bound.salt!r}" + (f" and the model {bound.model!r}" if bound.model else "")
                return f"quotas: {bound.used_bytes} of {bound.most_bytes} bytes of L1 are used by {whose}"
        return None

    # What is given back soon.

    def make_available(self, size_bytes: int) -> int:
        """The bytes that are free or may be evicted: with what is released soon, as far as it takes to have so many."""
        available = self.available_bytes
        while size_bytes > available and self.catch_up():
            available = self.available_bytes
        return available

    def given(self) -> list[int]:
        """How much was to give back room soon, so far: see `has_done`."""
        return [backlog.given for backlog in self.backlogs]

    def has_done(self, given: Sequence[int]) -> bool:
        """Whether all has given back its room that was to do so when `given` was this."""
        return all(map(Backlog.has_done, self.backlogs, given))

    def add_backlog(self, backlog: Backlog) -> None:
        """Know one more that gives back room soon: whoever holds some, and lets go of it in turns, adds his own."""
        self.backlogs.append(backlog)
        self.waiting.append(backlog.waiting)

    async def caught_up(self) -> None:
        """Return when all has given back its room that is to do so now."""
        for backlog in self.backlogs:
            await backlog.done()

    def catch_up(self) -> bool:
        """Do some of what is to give back room soon; False if there is nothing of that."""
        for backlog in self.backlogs:
            if backlog:
                backlog.do_some()
                return True
        return False

    # Reserved, until the end.

    def reserve(
        self, layout: ModelLayout, blocks: Sequence[tuple[bytes, int]], owner: str = "", adapter: str = ""
    ) -> list[Reservation]:
        """Reserve room for each (chunk hash, rank), evicting what it takes; for the first ones, if all do not fit."""
        made: list[Reservation] = []
        begin = 0
        rooms, is_bounded = layout.objects.room_bytes, bool(self._bounds)
        while begin < len(blocks):
            size, end = rooms[blocks[begin][1]], begin + 1
            if len(rooms) == 1:
                end = len(blocks)
            while end < len(blocks) and rooms[blocks[end][1]] == size:
                end += 1
            wanted = self._count_within_quota(layout, size, end - begin, owner) if is_bounded else end - begin
            offsets = self._allocate(size, wanted, owner)
            self._bounds.add(owner, layout.model, size * len(offsets))
            made += [
                Reservation(chunk_hash, layout, rank, offset, size, owner, adapter=adapter)
                for (chunk_hash, rank), offset in zip(blocks[begin:end], offsets, strict=False)
            ]
            self.reserved_bytes += size * len(offsets)
            if len(offsets) < end - begin:
                break
            begin = end
        return made

    def quarantine(self, reservation: Reservation) -> None:
        """Set a room aside until it is discarded: somebody may still touch it."""
        if reservation.state is _RESERVED:
            reservation.state = _QUARANTINED
            self.reserved_bytes -= reservation.size_bytes
            self.quarantined_bytes += reservation.size_bytes

    def end(self, reservation: Reservation) -> int:
        """Reserve a room no more; its bytes, which quotas still count."""
        size = reservation.size_bytes
        if reservation.state is _QUARANTINED:
            self.quarantined_bytes -= size
        else:
            self.reserved_bytes -= size
        reservation.state = _DONE
        return size

    # Resident, until nobody uses it.

    def free(self, entry: Entry) -> None:
        """Give back the memory of an entry that has left the index, and that nobody uses any more."""
        self.detached.discard(entry)
        self._shares.of(entry.owner).used_bytes -= entry.room_bytes
        self._bounds.add(entry.owner, entry.layout.model, -entry.room_bytes)
        self._extents.free_all(entry.blocks())

    def free_block(self, entry: Entry, rank: int) -> None:
        """Give back the block of a rank of an entry that nobody uses: another one replaces it."""
        offset, size = entry.offset(rank), entry.layout.objects.room_bytes[rank]
        if (entry_at := self.victims.entry_at) is not None:
            del entry_at[offset]
        self._extents.free(offset, size)
        self.evictable_bytes -= size
        self._shares.of(entry.owner).used_bytes -= size
        self._bounds.add(entry.owner, entry.layout.model, -size)
        entry.present &= ~entry.layout.objects.rank_masks[rank]

    # Who leaves.

    def _count_within_quota(self, layout: ModelLayout, size: int, count: int, owner: str) -> int:
        """How many blocks of a size an owner may have more; what makes room for them of its own is evicted."""
        bounds, model = self._bounds, layout.model
        room = bounds.room(owner, model)
        if room is None or room >= size * count:
            return count
        victims = bounds.victims(owner, model, size * count, self._evictable_bytes_of)
        if victims is None:  # as many as there are
            own = min(sum(map(self._evictable_bytes_of, bound)) for bound in bounds.of(owner, model))
            count = min(max(room + own, 0) // size, count)
            victims = bounds.victims(owner, model, size * count, self._evictable_bytes_of) if count else []
        freed: list[tuple[int, int]] = []
        for chunk_hash in victims or ():
            self._evict(self._index[chunk_hash], freed, Removal.QUOTA)
        self._extents.free_all(freed)
        room = bounds.room(owner, model)
        return count if room is None else min(max(room, 0) // size, count)

    def _evictable_bytes_of(self, chunk_hash: bytes) -> int:
        entry = self._index[chunk_hash]
        return entry.room_bytes if not entry.leases and not entry.pins else 0

    def _allocate(self, size: int, count: int, owner: str) -> list[int]:
        offsets = self._extents.allocate(size, count)
        while len(offsets) < count:
            if not self._evict_alike(size, count - len(offsets), owner):
                offset = self._evict_for(size, owner)
                if offset is None:
                    break
                offsets.append(offset)
            offsets += self._extents.allocate(size, count - len(offsets))
        return offsets

    def _evict_alike(self, size: int, count: int, owner: str) -> bool:
        """Evict for so many blocks at once, as long as the oldest have blocks of that size; whether any did."""
        freed: list[tuple[int, int]] = []
        try:
            for entry in self.victims.of(owner):
                if any(n != size for _, n in entry.blocks()):
                    break
                self._evict(entry, freed, Removal.CAPACITY)
                if len(freed) >= count:  # before another one is looked for
                    break
        finally:
            self._extents.free_all(freed)
        return bool(freed)

    def _evict_for(self, size: int, owner: str) -> int | None:
        """Evict until a block fits, and take it. None if that cannot be: then nothing is evicted."""
        while True:
            if size > self.make_available(size):
                return None
            if free := self._extents.allocate(size, 1):  # by what was to be released soon
                return free[0]
            victims = self.victims.for_block(size, owner)
            if victims or not self.catch_up():
                break
        freed: list[tuple[int, int]] = []
        try:
            for entry in victims:
                self._evict(entry, freed, Removal.CAPACITY)
        finally:
            self._extents.free_all(freed)
        return self._extents.allocate(size, 1)[0] if victims else None

    def check_integrity(self) -> None:
        """Assert that every total agrees with the entries and their owners, and that no two blocks overlap."""
        entries = [*self._index.values(), *self.detached]
        blocks = sorted(block for entry in entries for block in entry.blocks())
        assert all(b + n <= blocks[i + 1][0] for i, (b, n) in enumerate(blocks[:-1]))
        resident = sum(n for _, n in blocks)
        assert resident + self.reserved_bytes + self.quarantined_bytes == self.used_bytes
        known = [entry for share in self._shares for entry in share.policy.victims()]
        evictable = [entry for entry in known if not entry.leases and not entry.pins]
        assert self.evictable_bytes == sum(entry.room_bytes for entry in evictable)
        assert {id(e) for e in evictable} == {id(e) for e in self._index.values() if not e.leases and not e.pins}
        for share in self._shares:
            assert share.used_bytes == sum(e.room_bytes for e in entries if self._shares.of(e.owner) is share)
            assert share.chunks == sum(self._shares.of(e.owner) is share for e in self._index.values())
        self._adopting.do_all()
        for bound in self._bounds:
            own = [e for e in entries if e.owner == bound.salt and bound.model in (None, e.layout.model)]
            assert bound.most_bytes >= bound.used_bytes >= sum(e.room_bytes for e in own)
            assert set(bound) == {e.chunk_hash for e in own if not e.detached}
        self.victims.check_integrity()
        self._extents.check_integrity()
