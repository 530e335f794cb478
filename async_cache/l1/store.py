"""L1: the chunks in memory. It never awaits: each method is one atomic step of the event loop.

Everything in the index is published. What is reserved is private to its reservation until `commit`, and the first
commit of an object wins.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from async_cache.aio.backlog import Backlog
from async_cache.l1.entry import Entry, Reservation, ReservationState, page_of
from async_cache.ledger.ledger import Ledger
from async_cache.memory.arena import Arena
from async_cache.memory.extents import Extents, Gaps
from async_cache.observe import Observers, notify
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.retention.policy import EvictionPolicy
from async_cache.values import Removal

_RESERVED, _QUARANTINED, _DONE = ReservationState  # by name each would cost a tenth of a microsecond
_CAPACITY = Removal.CAPACITY
_CONSIDERED = 4  # times the room that is needed: so much of what is oldest may turn out to lie side by side
_AT_ONCE = 4096  # entries that are released in a turn of the loop, in a millisecond or two
_MAX_STEPS = 4096  # through memory for one block, where it is fragmented


class L1Store:
    """The index of resident chunks and the room around them; totals change in the methods that change a record."""

    def __init__(
        self,
        arena: Arena,
        policy: EvictionPolicy[Entry],
        on_evict_unwritten: Callable[[Entry], None],
        observers: Observers | None = None,
        ledger: Ledger | None = None,
    ):
        self.arena = arena
        self.index: dict[bytes, Entry] = {}
        self.find = self.index.get
        """The entry of a chunk hash, or None."""
        self._policy = policy
        self._on_evict_unwritten = on_evict_unwritten
        self._observers = observers if observers is not None else Observers()
        self._ledger = ledger if ledger is not None else Ledger()
        self._extents = Extents(arena.size_bytes)
        self._entry_at: dict[int, Entry] | None = None  # by the offset of each block, once sizes turn out to be mixed
        self._detached: set[Entry] = set()
        self.backlog = Backlog(_AT_ONCE)
        """What is released, touched and discarded soon."""
        self.backlogs = [self.backlog]
        """All that gives back room of L1 soon: whoever holds some, and lets go of it in turns, adds his own."""
        self.closed = False
        self.leases = 0
        self.leased_bytes = 0
        self.evictable_bytes = 0
        self.reserved_bytes = 0
        self.quarantined_bytes = 0
        self.left = dict.fromkeys(Removal, 0)
        """Chunks that left, by the reason."""

    @property
    def used_bytes(self) -> int:
        """The bytes of L1 that are not free: resident, reserved or quarantined."""
        return self.arena.size_bytes - self._extents.free_bytes

    @property
    def free_bytes(self) -> int:
        """The bytes of L1 that are free."""
        return self._extents.free_bytes

    @property
    def available_bytes(self) -> int:
        """The bytes of L1 that are free or may be evicted."""
        return self._extents.free_bytes + self.evictable_bytes

    # Reading: lease -> release, for requests; pin -> unpin, for I/O that uses the memory.

    def lease(self, entries: Iterable[Entry]) -> None:
        """Keep entries for a request, each until its `release`. Their places in the eviction order do not change."""
        count = leased = kept = 0
        for entry in entries:
            count += 1
            leases = entry.leases
            entry.leases = leases + 1
            if not leases:
                leased += entry.room_bytes
                if entry.pins or entry.detached:
                    kept += entry.room_bytes
        self.leases += count
        self.leased_bytes += leased
        self.evictable_bytes -= leased - kept

    def release(self, entries: Iterable[Entry]) -> None:
        """Release one lease of each entry. The tail of a prefix comes before its head, so that it is evicted first."""
        use = self._policy.use
        count = released = evictable = 0
        for entry in entries:
            count += 1
            leases = entry.leases = entry.leases - 1
            if not leases:
                released += entry.room_bytes
                if not entry.detached:
                    use(entry)
                    if not entry.pins:
                        evictable += entry.room_bytes
                elif not entry.pins:
                    self._free(entry)
        self.leases -= count
        self.leased_bytes -= released
        self.evictable_bytes += evictable

    def release_soon(self, entries: Sequence[Entry]) -> None:
        """Release entries, of very many some in each of the loop's next turns, or when their room is needed."""
        self.backlog.do(self.release, entries)

    def touch_soon(self, chunk_hashes: Sequence[bytes]) -> None:
        """Touch chunks, after what is released soon."""
        self.backlog.do(self.touch, chunk_hashes)

    def discard_soon(self, reservations: Sequence[Reservation]) -> None:
        """Discard rooms, as `release_soon` releases entries."""
        self.backlog.do(self.discard, reservations)

    def make_available(self, size_bytes: int) -> int:
        """The bytes that are free or may be evicted: with what is released soon, as far as it takes to have so many."""
        while size_bytes > self.available_bytes and self.catch_up():
            pass
        return self.available_bytes

    def is_behind(self) -> bool:
        """Whether something is to give back room soon."""
        return any(self.backlogs)

    def catch_up(self) -> bool:
        """Do some of what is to give back room soon; False if there is nothing of that."""
        for backlog in self.backlogs:
            if backlog:
                backlog.do_some()
                return True
        return False

    def pin(self, entry: Entry) -> None:
        """Keep an entry while I/O uses its memory. Its place in the eviction order does not change."""
        if not entry.pins and not entry.leases and not entry.detached:
            self.evictable_bytes -= entry.room_bytes
        entry.pins += 1

    def unpin(self, entry: Entry) -> None:
        """Take one pin of an entry away; a detached one leaves memory with the last."""
        entry.pins -= 1
        if not entry.pins and not entry.leases:
            if entry.detached:
                self._free(entry)
            else:
                self.evictable_bytes += entry.room_bytes

    def asked(self, prompt: Prompt) -> None:
        """Note that a request asked for all chunks of a prompt, there or not."""
        self._policy.asked(prompt.chunk_hashes, prompt.tokens, prompt.layout.chunk_tokens)

    def touch(self, chunk_hashes: Iterable[bytes]) -> None:
        """Mark chunks as used just now, the last one most recently."""
        for chunk_hash in chunk_hashes:
            entry = self.index.get(chunk_hash)
            if entry is not None and not entry.leases:
                self._policy.use(entry)

    # Writing: reserve -> commit | discard.

    def reserve(self, layout: ModelLayout, blocks: Sequence[tuple[bytes, int]], owner: str = "") -> list[Reservation]:
        """Reserve room for each (chunk hash, rank), evicting what it takes; for the first ones, if all do not fit."""
        made: list[Reservation] = []
        begin = 0
        rooms = layout.objects.room_bytes
        while begin < len(blocks):
            end = begin
            size = rooms[blocks[begin][1]]
            while end < len(blocks) and rooms[blocks[end][1]] == size:
                end += 1
            offsets = self._allocate(size, end - begin)
            made += [
                Reservation(chunk_hash, layout, rank, offset, size, owner)
                for (chunk_hash, rank), offset in zip(blocks[begin:end], offsets, strict=False)
            ]
            self.reserved_bytes += size * len(offsets)
            if len(offsets) < end - begin:
                break
            begin = end
        return made

    def reserve_within(self, entry: Entry, rank: int) -> Reservation:
        """Reserve the unpublished part of an entry's block; the entry is pinned until the reservation is done."""
        self.pin(entry)
        entry.filling += 1
        return Reservation(entry.chunk_hash, entry.layout, rank, entry.offset(rank), 0, entry.owner, entry)

    def commit(self, reservation: Reservation, mask: int, after: bytes | None = None) -> Entry:
        """Publish the objects in `mask`. Returns the entry where they, or those of an earlier commit, can be found.

        `after`: the chunk before it in its prefix, if that is known, to be evicted after this one.
        """
        if reservation.within is not None:
            reservation.within.present |= mask
            self.discard((reservation,))
            self._notify_committed(reservation.within)
            return reservation.within
        chunk_hash, rank = reservation.chunk_hash, reservation.rank
        entry = self.index.get(chunk_hash)
        if entry is not None and not entry.layout.same_bytes(reservation.layout):
            self.discard((reservation,))  # only hashes that somebody made up can meet like this
            return entry
        if entry is not None and entry.ranks >> rank & 1:
            missing = mask & ~entry.present
            if not missing or entry.pins or entry.leases:
                if missing and not entry.filling:  # else a load may write where it would be copied to
                    self._copy(reservation, entry, missing)
                    self._notify_committed(entry)
                self.discard((reservation,))
                return entry
            self._take_block(entry, rank)  # incomplete and unused: the new block replaces it
        size = self._end(reservation)
        if entry is None:
            before = self.index.get(after) if after is not None else None
            pages = page_of(rank, reservation.offset)
            entry = Entry(chunk_hash, reservation.layout, reservation.owner, mask, 1 << rank, pages, size, parent=after)
            if before is not None:
                before.built_on_by(chunk_hash)
            elif after is not None:
                self._ledger.built_on(after, chunk_hash)
            self.index[chunk_hash] = entry
            self._policy.enter(entry, before, kept=before is not None and before.leases > 0)
        else:
            entry.present |= mask
            entry.place(rank, reservation.offset)
        if self._entry_at is not None:
            self._entry_at[reservation.offset] = entry
        if entry.leases:
            self.leased_bytes += size
        elif not entry.pins:
            self.evictable_bytes += size
        self._notify_committed(entry)
        return entry

    def _notify_committed(self, entry: Entry) -> None:
        if self._observers.committed:
            notify(self._observers.committed, entry.observed())

    def _copy(self, reservation: Reservation, entry: Entry, mask: int) -> None:
        """Complete an incomplete block that somebody reads or writes back: what it lacks, nobody has seen."""
        view = self.arena.view
        for rank, _, begin, end in entry.layout.objects.places[mask]:
            to, source = entry.offset(rank), reservation.offset
            view[to + begin : to + end] = view[source + begin : source + end]
        entry.present |= mask

    def discard(self, reservations: Iterable[Reservation]) -> None:
        """Free rooms unpublished, also from quarantine. Once is enough, twice does no harm."""
        rooms = []
        for reservation in reservations:
            if reservation.state is not _DONE:
                size = self._end(reservation)
                if reservation.within is not None:
                    reservation.within.filling -= 1
                    self.unpin(reservation.within)
                else:
                    rooms.append((reservation.offset, size))
        self._extents.free_all(rooms)

    def quarantine(self, reservation: Reservation) -> None:
        """Set a room aside until `discard`: somebody may still touch it."""
        if reservation.state is _RESERVED:
            reservation.state = _QUARANTINED
            self.reserved_bytes -= reservation.size_bytes
            self.quarantined_bytes += reservation.size_bytes

    def _end(self, reservation: Reservation) -> int:
        size = reservation.size_bytes
        if reservation.state is _QUARANTINED:
            self.quarantined_bytes -= size
        else:
            self.reserved_bytes -= size
        reservation.state = _DONE
        return size

    # Leaving.

    def remove(self, entries: Iterable[Entry], removal: Removal = Removal.DELETED) -> None:
        """Let entries be found no more from now on; the memory of each goes with its last lease and pin."""
        freed: list[tuple[int, int]] = []
        for entry in entries:
            self._detach(entry, removal, freed)
            if self._observers.removed:
                notify(self._observers.removed, entry.observed(), removal)
        self._extents.free_all(freed)

    def _detach(self, entry: Entry, removal: Removal, freed: list[tuple[int, int]]) -> None:
        """Take an entry out of the index; adds to `freed` what memory nobody uses any more."""
        del self.index[entry.chunk_hash]
        entry.detached = True
        blocks = entry.blocks()
        if self._entry_at is not None:
            for offset, _ in blocks:
                del self._entry_at[offset]
        self.left[removal] += 1
        self._policy.left(entry, removal)
        self._ledger.left_l1(entry.chunk_hash, entry.owner, entry.child, entry.forked, removal)
        if entry.leases or entry.pins:
            self._detached.add(entry)
        else:
            self.evictable_bytes -= entry.room_bytes
            freed += blocks

    def _free(self, entry: Entry) -> None:
        self._detached.discard(entry)
        self._extents.free_all(entry.blocks())

    def _take_block(self, entry: Entry, rank: int) -> None:
        offset, size = entry.offset(rank), entry.layout.objects.room_bytes[rank]
        if self._entry_at is not None:
            del self._entry_at[offset]
        self._extents.free(offset, size)
        self.evictable_bytes -= size
        entry.present &= ~entry.layout.objects.rank_masks[rank]

    def _allocate(self, size: int, count: int) -> list[int]:
        offsets = self._extents.allocate(size, count)
        while len(offsets) < count:
            if not self._evict_alike(size, count - len(offsets)):
                offset = self._evict_for(size)
                if offset is None:
                    break
                offsets.append(offset)
            offsets += self._extents.allocate(size, count - len(offsets))
        return offsets

    def _evict_alike(self, size: int, count: int) -> bool:
        """Evict for so many blocks at once, as long as the oldest have blocks of that size; whether any did."""
        freed: list[tuple[int, int]] = []
        try:
            for entry in self._victims():
                blocks = entry.blocks()
                if len(freed) >= count or any(n != size for _, n in blocks):
                    break
                self._evict(entry, freed)
        finally:
            self._extents.free_all(freed)
        return bool(freed)

    def _evict_for(self, size: int) -> int | None:
        """Evict until a block fits, and take it. None if that cannot be: then nothing is evicted."""
        while True:
            if size > self.make_available(size):
                return None
            if free := self._extents.allocate(size, 1):  # by what was to be released soon
                return free[0]
            victims = self._oldest_together(size) or self._oldest_and_behind(size)
            if victims or not self.catch_up():
                break
        freed: list[tuple[int, int]] = []
        try:
            for entry in victims:
                self._evict(entry, freed)
        finally:
            self._extents.free_all(freed)
        return self._extents.allocate(size, 1)[0] if victims else None

    def _victims(self) -> Iterator[Entry]:
        """The entries that may be evicted, in order. A leased one comes back to the policy with its release."""
        for entry in self._policy.victims():
            if entry.leases:
                self._policy.suspend(entry)
            elif not entry.pins:
                yield entry

    def _oldest_together(self, size: int) -> Collection[Entry]:
        """The oldest entries that lie side by side and leave room for a block; none if they are too scattered."""
        gaps = Gaps(self._extents)
        tried: list[Entry] = []
        considered = 0
        for entry in self._victims():
            tried.append(entry)
            blocks = entry.blocks()
            for begin, length in blocks:
                first, last = gaps.add(begin, begin + length)
                if last - first >= size:
                    if len(tried) == 1:
                        return tried
                    return [e for e in tried if any(b < first + size and first < b + n for b, n in e.blocks())]
            considered += blocks[0][1]
            if considered >= _CONSIDERED * size:
                break
        return ()

    def _oldest_and_behind(self, size: int) -> Collection[Entry]:
        """The oldest entry that leaves room for a block together with what lies behind it; none if there is none."""
        if self._entry_at is None:
            self._entry_at = self._blocks_in_index()
        entry_at, steps = self._entry_at, 0
        for entry in self._victims():
            for begin, length in entry.blocks():
                row = {entry: None}
                first, last = self._extents.around(begin, begin + length)
                while last - first < size:
                    after = entry_at.get(last)
                    if after is None or after.leases or after.pins:
                        break
                    row[after] = None
                    length = next(n for b, n in after.blocks() if b == last)
                    last = self._extents.around(last, last + length)[1]
                else:
                    return row
                steps += len(row)
            if steps >= _MAX_STEPS:
                break
        return ()

    def _blocks_in_index(self) -> dict[int, Entry]:
        return {offset: entry for entry in self.index.values() for offset, _ in entry.blocks()}

    def _evict(self, entry: Entry, freed: list[tuple[int, int]]) -> None:
        self._detach(entry, _CAPACITY, freed)
        if entry.unwritten:
            self._on_evict_unwritten(entry)
        if self._observers.evicted:
            notify(self._observers.evicted, entry.observed(), _CAPACITY)

    def close(self) -> None:
        """Remove all entries. Those that somebody still reads keep their memory."""
        self.closed = True
        self.backlog.do_all()
        freed: list[tuple[int, int]] = []
        for entry in list(self.index.values()):  # the links between them would keep them alive
            self._detach(entry, Removal.LOST, freed)
        self._extents.free_all(freed)

    def check_integrity(self) -> None:
        """Assert that every total agrees with the records, and that no two blocks overlap."""
        entries = [*self.index.values(), *self._detached]
        evictable = [entry for entry in self._policy.victims() if not entry.leases]
        blocks = sorted(block for entry in entries for block in entry.blocks())
        assert all(b + n <= blocks[i + 1][0] for i, (b, n) in enumerate(blocks[:-1]))
        resident = sum(n for _, n in blocks)
        assert resident + self.reserved_bytes + self.quarantined_bytes == self.used_bytes
        assert self.leases == sum(e.leases for e in entries)
        assert self.leased_bytes == sum(e.room_bytes for e in entries if e.leases)
        assert self.evictable_bytes == sum(e.room_bytes for e in evictable if not e.pins)
        assert {id(e) for e in evictable} == {id(e) for e in self.index.values() if not e.leases}
        for entry in entries:
            assert entry.leases >= 0 and entry.pins >= entry.filling >= 0 and entry.unwritten >= 0
            assert entry.present and entry.ranks and entry.room_bytes == sum(n for _, n in entry.blocks())
            assert entry.detached == (self.index.get(entry.chunk_hash) is not entry)
            assert not entry.detached or entry.leases or entry.pins
        assert self._entry_at is None or self._entry_at == self._blocks_in_index()
        self._extents.check_integrity()
