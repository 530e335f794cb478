"""L1: the chunks in memory. It never awaits: each method is one atomic step of the event loop.

Everything in the index is published. What is reserved is private to its reservation until `commit`, and the first
commit of an object wins.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from msgspec import Struct

from async_cache.aio.backlog import Backlog
from async_cache.l1.entry import Entry, Reservation, ReservationState, page_of
from async_cache.l1.shares import Shares
from async_cache.l1.victims import Victims
from async_cache.ledger.ledger import Ledger
from async_cache.memory.arena import Arena
from async_cache.memory.extents import Extents
from async_cache.observe import Observers, notify
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.retention.policy import EvictionPolicy
from async_cache.retention.quotas import Bounds, Quota
from async_cache.values import Removal

_RESERVED, _QUARANTINED, _DONE = ReservationState  # by name each would cost a tenth of a microsecond
_CAPACITY = Removal.CAPACITY
_ADOPTED_AT_ONCE = 1024  # entries that turn out to be within a quota, in the same time
_AT_ONCE = 4096  # entries that are released in a turn of the loop, in a millisecond or two


class Leased(Struct, gc=False):
    """What is leased: so many pairs of request and chunk, and the memory of these chunks, which counts once."""

    leases: int = 0
    size_bytes: int = 0


class L1Store:
    """The index of resident chunks and the room around them; totals change in the methods that change a record."""

    def __init__(
        self,
        arena: Arena,
        policy: EvictionPolicy[Entry],
        on_evict_unwritten: Callable[[Entry], None],
        observers: Observers | None = None,
        ledger: Ledger | None = None,
        on_deferred_commit: Callable[[Entry], None] = lambda entry: None,
        bounds: Bounds | None = None,
    ):
        self.arena = arena
        self.index: dict[bytes, Entry] = {}
        self.find = self.index.get
        """The entry of a chunk hash, or None."""
        self.shares = Shares(policy)
        """Whose chunks leave for whom."""
        self.bounds = bounds if bounds is not None else Bounds()
        """What owners may have at most."""
        self._on_evict_unwritten = on_evict_unwritten
        self._on_deferred_commit = on_deferred_commit
        self._observers = observers if observers is not None else Observers()
        self._ledger = ledger if ledger is not None else Ledger()
        self._extents = Extents(arena.size_bytes)
        self._victims = Victims(self.shares, self._extents, self.index, lambda: self.evictable_bytes > 0)
        self._detached: set[Entry] = set()
        self.backlog = Backlog(_AT_ONCE)
        """What is released, touched and discarded soon."""
        self.backlogs = [self.backlog]
        """All that gives back room of L1 soon: whoever holds some, and lets go of it in turns, adds his own."""
        self._adopting = Backlog(_ADOPTED_AT_ONCE)
        self.closed = False
        self.leases = 0
        self.leased_bytes = 0
        self._leased_of: dict[str, Leased] = {}  # by owner: of those who have nothing leased, nothing is known
        self.evictable_bytes = 0
        self.reserved_bytes = 0
        self.quarantined_bytes = 0
        self.deferred_by_owner: Counter[str] = Counter()
        self.left = dict.fromkeys(Removal, 0)
        """Chunks that left, by the reason."""

    @property
    def used_bytes(self) -> int:
        """The bytes of L1 that are not free: resident, reserved or quarantined."""
        return self.arena.size_bytes - self._extents.free_bytes

    @property
    def deferred(self) -> int:
        """Commits that wait until a load no longer writes where they belong."""
        return self.deferred_by_owner.total()

    @property
    def free_bytes(self) -> int:
        """The bytes of L1 that are free."""
        return self._extents.free_bytes

    @property
    def available_bytes(self) -> int:
        """The bytes of L1 that are free or may be evicted."""
        return self._extents.free_bytes + self.evictable_bytes

    def divide(
        self,
        parts: Mapping[str, tuple[Collection[str], int]],
        common_bytes: int,
        make_policy: Callable[[], EvictionPolicy[Entry]],
    ) -> None:
        """Give owners shares, as `Shares.divide` does."""
        self.shares.divide(parts, common_bytes, make_policy, [*self.index.values(), *self._detached])

    def bound(self, quotas: Sequence[Quota]) -> None:
        """Keep owners within other quotas from now on. What is there counts for them in the loop's next turns."""
        self.bounds.change(quotas)
        self._adopting.do(self._count_for_quotas, list(self.index.values()) if self.bounds else ())

    def _count_for_quotas(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if not entry.detached:
                self.bounds.adopt(entry.chunk_hash, entry.owner, entry.layout.model)

    # Reading: lease -> release, for requests; pin -> unpin, for I/O that uses the memory.

    def lease(self, entries: Iterable[Entry]) -> None:
        """Keep entries for a request, each until its `release`. Their places in the eviction order do not change."""
        count = leased = kept = 0
        owner, before = "", (0, 0)  # most often, all of them are of one owner
        for entry in entries:
            if entry.owner != owner:
                self._count_leases(owner, count - before[0], leased - before[1])
                owner, before = entry.owner, (count, leased)
            count += 1
            leases = entry.leases
            entry.leases = leases + 1
            if not leases:
                leased += entry.room_bytes
                if entry.pins or entry.detached:
                    kept += entry.room_bytes
        self._count_leases(owner, count - before[0], leased - before[1])
        self.leases += count
        self.leased_bytes += leased
        self.evictable_bytes -= leased - kept

    def release(self, entries: Iterable[Entry]) -> None:
        """Release one lease of each entry. The tail of a prefix comes before its head, so that it is evicted first."""
        owner, before = "", (0, 0)
        count = released = evictable = 0
        used: list[Entry] = []
        for entry in entries:
            if entry.owner != owner:
                self._count_leases(owner, before[0] - count, before[1] - released)
                self._use(owner, used)
                owner, before, used = entry.owner, (count, released), []
            count += 1
            leases = entry.leases = entry.leases - 1
            if not leases:
                released += entry.room_bytes
                if not entry.detached:
                    used.append(entry)
                    if not entry.pins:
                        evictable += entry.room_bytes
                elif not entry.pins:
                    self._free(entry)
        self._count_leases(owner, before[0] - count, before[1] - released)
        self._use(owner, used)
        self.leases -= count
        self.leased_bytes -= released
        self.evictable_bytes += evictable

    def _use(self, owner: str, entries: Sequence[Entry]) -> None:
        """Entries of an owner were used just now, one after the other."""
        self.shares.of(owner).policy.use_all(entries)
        if self.bounds:
            for entry in entries:
                self.bounds.use(entry.chunk_hash, owner, entry.layout.model)

    def _count_leases(self, owner: str, leases: int, size_bytes: int) -> None:
        """An owner's chunks have so many leases more, and so many bytes of them are leased now that were not."""
        if leases:
            leased = self._leased_of.get(owner)
            if leased is None:
                leased = self._leased_of[owner] = Leased()
            leased.leases += leases
            leased.size_bytes += size_bytes
            if not leased.leases:
                del self._leased_of[owner]

    def leased_of(self, owners: Iterable[str]) -> Leased:
        """What is leased of the chunks of these owners."""
        known = [leased for leased in map(self._leased_of.get, owners) if leased is not None]
        return Leased(sum(leased.leases for leased in known), sum(leased.size_bytes for leased in known))

    def release_soon(self, entries: Sequence[Entry]) -> None:
        """Release entries, of very many some in each of the loop's next turns, or when their room is needed."""
        self.backlog.do_ahead(self.release, entries)

    def touch_soon(self, chunk_hashes: Sequence[bytes]) -> None:
        """Touch chunks, after what is released soon."""
        self.backlog.do(self.touch, chunk_hashes)

    def discard_soon(self, reservations: Sequence[Reservation]) -> None:
        """Discard rooms, as `release_soon` releases entries."""
        self.backlog.do(self.discard, reservations)

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
                self.shares.of(entry.owner).policy.resume(entry)

    def retain(self, entry: Entry) -> None:
        """Keep an entry until `unretain`, or until it is removed."""
        if not entry.retained:
            entry.retained = True
            self.pin(entry)

    def unretain(self, entry: Entry) -> None:
        """Keep an entry no longer. Of a prefix, the head comes before the tail, which may leave first then."""
        if entry.retained:
            entry.retained = False
            self.unpin(entry)

    def asked(self, prompts: Sequence[Prompt], owner: str) -> None:
        """Note that a request asked for all chunks of prompts of one owner, there or not."""
        note = self.shares.of(owner).policy.asked
        for prompt in prompts:
            note(prompt.chunk_hashes, prompt.tokens, prompt.layout.chunk_tokens)

    def hint(
        self, prompt: Prompt, output_tokens: int | None, returns: bool | None, within_seconds: float | None
    ) -> None:
        """Note what an engine knows of the future of a prompt."""
        self.shares.of(prompt.salt).policy.hint(prompt.chunk_hashes, output_tokens, returns, within_seconds)

    def touch(self, chunk_hashes: Iterable[bytes]) -> None:
        """Mark chunks as used just now, the last one most recently."""
        for chunk_hash in chunk_hashes:
            entry = self.index.get(chunk_hash)
            if entry is not None and not entry.leases:
                self._use(entry.owner, (entry,))

    # Writing: reserve -> commit | discard.

    def reserve(
        self, layout: ModelLayout, blocks: Sequence[tuple[bytes, int]], owner: str = "", adapter: str = ""
    ) -> list[Reservation]:
        """Reserve room for each (chunk hash, rank), evicting what it takes; for the first ones, if all do not fit."""
        made: list[Reservation] = []
        begin = 0
        rooms, is_bounded = layout.objects.room_bytes, bool(self.bounds)
        while begin < len(blocks):
            size, end = rooms[blocks[begin][1]], begin + 1
            if len(rooms) == 1:
                end = len(blocks)
            while end < len(blocks) and rooms[blocks[end][1]] == size:
                end += 1
            wanted = self._count_within_quota(layout, size, end - begin, owner) if is_bounded else end - begin
            offsets = self._allocate(size, wanted, owner)
            self.bounds.add(owner, layout.model, size * len(offsets))
            made += [
                Reservation(chunk_hash, layout, rank, offset, size, owner, adapter=adapter)
                for (chunk_hash, rank), offset in zip(blocks[begin:end], offsets, strict=False)
            ]
            self.reserved_bytes += size * len(offsets)
            if len(offsets) < end - begin:
                break
            begin = end
        return made

    def _count_within_quota(self, layout: ModelLayout, size: int, count: int, owner: str) -> int:
        """How many blocks of a size an owner may have more; what makes room for them of its own is evicted."""
        bounds, model = self.bounds, layout.model
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
            self._evict(self.index[chunk_hash], freed, Removal.QUOTA)
        self._extents.free_all(freed)
        room = bounds.room(owner, model)
        return count if room is None else min(max(room, 0) // size, count)

    def over_quota(self, prompt: Prompt, rank: int) -> str | None:
        """Why the owner of a prompt gets no block more of a rank, where that is a quota."""
        size, model = prompt.layout.objects.room_bytes[rank], prompt.layout.model
        for bound in self.bounds.of(prompt.salt, model):
            if bound.used_bytes + size > bound.most_bytes:
                whose = f"the salt {bound.salt!r}" + (f" and the model {bound.model!r}" if bound.model else "")
                return f"quotas: {bound.used_bytes} of {bound.most_bytes} bytes of L1 are used by {whose}"
        return None

    def _evictable_bytes_of(self, chunk_hash: bytes) -> int:
        entry = self.index[chunk_hash]
        return entry.room_bytes if not entry.leases and not entry.pins else 0

    def reserve_within(self, entry: Entry, rank: int) -> Reservation:
        """Reserve the unpublished part of an entry's block; the entry is pinned until the reservation is done."""
        self.pin(entry)
        entry.filling += 1
        return Reservation(
            entry.chunk_hash, entry.layout, rank, entry.offset(rank), 0, entry.owner, entry, adapter=entry.adapter
        )

    def commit(self, reservation: Reservation, mask: int, after: bytes | None = None) -> Entry:
        """Publish the objects in `mask`. Returns the entry where they, or those of an earlier commit, can be found.

        Where a load is writing to the same block they are published when it has ended, unless it brought them, and
        `on_deferred_commit` is called.
        `after`: the chunk before it in its prefix, if that is known, to be evicted after this one.
        """
        return self.commit_all(((reservation, mask, after),))[0]

    def commit_all(self, commits: Iterable[tuple[Reservation, int, bytes | None]]) -> list[Entry]:
        """Publish as `commit` does, of one reservation after the other."""
        index, is_bounded, entry_at = self.index, bool(self.bounds), self._victims.entry_at
        committed = self._observers.committed
        entries: list[Entry] = []
        owner, share = None, None
        for reservation, mask, after in commits:
            chunk_hash = reservation.chunk_hash
            entry = index.get(chunk_hash)
            if entry is not None or reservation.within is not None:
                entries.append(self._commit_more(reservation, mask, entry))
                continue
            if share is None or reservation.owner != owner:
                owner = reservation.owner
                share = self.shares.of(owner)
            layout, rank, offset = reservation.layout, reservation.rank, reservation.offset
            size = self._end(reservation)
            entry = Entry(chunk_hash, layout, owner, mask, 1 << rank, page_of(rank, offset), size, parent=after)
            entry.adapter = reservation.adapter
            before = index.get(after) if after is not None else None
            if before is not None:
                before.built_on_by(chunk_hash)
            elif after is not None:
                self._ledger.built_on(after, chunk_hash)
            index[chunk_hash] = entry
            self.evictable_bytes += size
            share.used_bytes += size
            share.chunks += 1
            if is_bounded:  # its bytes were counted when they were reserved
                self.bounds.enter(chunk_hash, owner, layout.model, after)
            share.policy.enter(entry, before, kept=before is not None and before.leases > 0)
            if entry_at is not None:
                entry_at[offset] = entry
            if committed:
                notify(committed, entry.observed())
            entries.append(entry)
        return entries

    def _commit_more(self, reservation: Reservation, mask: int, entry: Entry | None) -> Entry:
        """Publish objects of a chunk of which L1 has some already, or of which a part of the block was reserved."""
        if reservation.within is not None:
            reservation.within.present |= mask
            self._notify_committed(reservation.within)
            self.discard((reservation,))
            return reservation.within
        assert entry is not None
        rank = reservation.rank
        if not entry.layout.same_bytes(reservation.layout):
            self.discard((reservation,))  # only hashes that somebody made up can meet like this
            return entry
        if entry.ranks >> rank & 1:
            missing = mask & ~entry.present
            if missing and entry.filling:  # a load may write where it would be copied to
                entry.deferred += ((reservation, mask),)
                self.deferred_by_owner[entry.owner] += 1
                return entry
            if not missing or entry.pins or entry.leases:
                if missing:
                    self._copy(reservation, entry, missing)
                    self._notify_committed(entry)
                self.discard((reservation,))
                return entry
            self._take_block(entry, rank)  # incomplete and unused: the new block replaces it
        size = self._end(reservation)
        self.bounds.add(reservation.owner, reservation.layout.model, -size)
        self.bounds.add(entry.owner, entry.layout.model, size)
        self.shares.of(entry.owner).used_bytes += size
        entry.present |= mask
        entry.place(rank, reservation.offset)
        if (entry_at := self._victims.entry_at) is not None:
            entry_at[reservation.offset] = entry
        if entry.leases:
            self.leased_bytes += size
            self._leased_of[entry.owner].size_bytes += size
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
                self.bounds.add(reservation.owner, reservation.layout.model, -size)
                if reservation.within is not None:
                    self._filled(reservation.within)
                else:
                    rooms.append((reservation.offset, size))
        self._extents.free_all(rooms)

    def _filled(self, entry: Entry) -> None:
        """A load has ended that wrote to an entry's block: with the last one, what was committed meanwhile is there."""
        entry.filling -= 1
        if entry.deferred and not entry.filling:
            deferred, entry.deferred = entry.deferred, ()
            self.deferred_by_owner[entry.owner] -= len(deferred)
            if not self.deferred_by_owner[entry.owner]:
                del self.deferred_by_owner[entry.owner]
            before = entry.present
            for reservation, mask in deferred:
                if missing := mask & ~entry.present:
                    self._copy(reservation, entry, missing)
            self.discard([reservation for reservation, _ in deferred])
            if entry.present != before and not entry.detached:
                self._notify_committed(entry)
                self._on_deferred_commit(entry)
        self.unpin(entry)

    def quarantine(self, reservation: Reservation) -> None:
        """Set a room aside until `discard`: somebody may still touch it."""
        if reservation.state is _RESERVED:
            reservation.state = _QUARANTINED
            self.reserved_bytes -= reservation.size_bytes
            self.quarantined_bytes += reservation.size_bytes

    def _end(self, reservation: Reservation) -> int:
        """Reserve a room no more; its bytes, which quotas still count."""
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
        self.unretain(entry)
        del self.index[entry.chunk_hash]
        entry.detached = True
        blocks = entry.blocks()
        if (entry_at := self._victims.entry_at) is not None:
            for offset, _ in blocks:
                del entry_at[offset]
        self.left[removal] += 1
        share = self.shares.of(entry.owner)
        share.policy.left(entry, removal)
        share.chunks -= 1
        self.bounds.left(entry.chunk_hash, entry.owner, entry.layout.model)
        self._ledger.left_l1(entry.chunk_hash, entry.owner, entry.child, entry.forked, removal)
        if entry.leases or entry.pins:
            self._detached.add(entry)
        else:
            self.evictable_bytes -= entry.room_bytes
            share.used_bytes -= entry.room_bytes
            self.bounds.add(entry.owner, entry.layout.model, -entry.room_bytes)
            freed += blocks

    def _free(self, entry: Entry) -> None:
        self._detached.discard(entry)
        self.shares.of(entry.owner).used_bytes -= entry.room_bytes
        self.bounds.add(entry.owner, entry.layout.model, -entry.room_bytes)
        self._extents.free_all(entry.blocks())

    def _take_block(self, entry: Entry, rank: int) -> None:
        offset, size = entry.offset(rank), entry.layout.objects.room_bytes[rank]
        if (entry_at := self._victims.entry_at) is not None:
            del entry_at[offset]
        self._extents.free(offset, size)
        self.evictable_bytes -= size
        self.shares.of(entry.owner).used_bytes -= size
        self.bounds.add(entry.owner, entry.layout.model, -size)
        entry.present &= ~entry.layout.objects.rank_masks[rank]

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
            for entry in self._victims.of(owner):
                if any(n != size for _, n in entry.blocks()):
                    break
                self._evict(entry, freed)
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
            victims = self._victims.for_block(size, owner)
            if victims or not self.catch_up():
                break
        freed: list[tuple[int, int]] = []
        try:
            for entry in victims:
                self._evict(entry, freed)
        finally:
            self._extents.free_all(freed)
        return self._extents.allocate(size, 1)[0] if victims else None

    def _evict(self, entry: Entry, freed: list[tuple[int, int]], removal: Removal = _CAPACITY) -> None:
        self._detach(entry, removal, freed)
        if entry.unwritten:
            self._on_evict_unwritten(entry)
        if self._observers.evicted:
            notify(self._observers.evicted, entry.observed(), removal)

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
        known = [entry for share in self.shares for entry in share.policy.victims()]
        evictable = [entry for entry in known if not entry.leases and not entry.pins]
        blocks = sorted(block for entry in entries for block in entry.blocks())
        assert all(b + n <= blocks[i + 1][0] for i, (b, n) in enumerate(blocks[:-1]))
        resident = sum(n for _, n in blocks)
        assert resident + self.reserved_bytes + self.quarantined_bytes == self.used_bytes
        assert self.leases == sum(e.leases for e in entries)
        assert self.leased_of(self._leased_of) == Leased(self.leases, self.leased_bytes)
        assert all(leased.leases for leased in self._leased_of.values()), "who has nothing is not known"
        assert self.leased_bytes == sum(e.room_bytes for e in entries if e.leases)
        assert self.evictable_bytes == sum(e.room_bytes for e in evictable)
        assert {id(e) for e in evictable} == {id(e) for e in self.index.values() if not e.leases and not e.pins}
        for share in self.shares:
            assert share.used_bytes == sum(e.room_bytes for e in entries if self.shares.of(e.owner) is share)
            assert share.chunks == sum(self.shares.of(e.owner) is share for e in self.index.values())
        for entry in entries:
            assert entry.leases >= 0 and entry.pins >= entry.filling >= 0 and entry.unwritten >= 0
            assert entry.filling or not entry.deferred
            assert entry.present and entry.ranks and entry.room_bytes == sum(n for _, n in entry.blocks())
            assert entry.detached == (self.index.get(entry.chunk_hash) is not entry)
            assert not entry.detached or entry.leases or entry.pins
            assert not entry.retained or (entry.pins and not entry.detached)
        assert self.deferred == sum(len(entry.deferred) for entry in entries)
        self._adopting.do_all()
        for bound in self.bounds:
            own = [e for e in entries if e.owner == bound.salt and bound.model in (None, e.layout.model)]
            assert bound.most_bytes >= bound.used_bytes >= sum(e.room_bytes for e in own)
            assert set(bound) == {e.chunk_hash for e in own if not e.detached}
        self._victims.check_integrity()
        self._extents.check_integrity()
