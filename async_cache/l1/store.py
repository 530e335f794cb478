"""L1: the chunks in memory. It never awaits: each method is one atomic step of the event loop.

Everything in the index is published. What is reserved is private to its reservation until `commit`, and the first
commit of an object wins.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from async_cache.aio.backlog import Backlog
from async_cache.l1.entry import Entry, Reservation, ReservationState, page_of
from async_cache.l1.rooms import Rooms
from async_cache.l1.shares import Shares
from async_cache.l1.uses import Uses
from async_cache.ledger.ledger import Ledger
from async_cache.memory.arena import Arena
from async_cache.observe import Observers, notify
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.retention.policy import EvictionPolicy
from async_cache.retention.quotas import Bounds
from async_cache.values import Removal

_DONE = ReservationState.DONE  # by name it would cost a tenth of a microsecond
_CAPACITY = Removal.CAPACITY
_AT_ONCE = 4096  # entries that are released in a turn of the loop, in a millisecond or two


class L1Store:
    """The index of resident chunks: what is published, and what leaves. Totals change with the records."""

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
        self.rooms = rooms = Rooms(arena.size_bytes, self.index, self.shares, self.bounds, self._evict)
        """The memory, and who leaves for what has to come."""
        self.uses = Uses(rooms, self.shares, self.bounds)
        """What keeps entries in memory."""
        self._on_evict_unwritten = on_evict_unwritten
        self._on_deferred_commit = on_deferred_commit
        self._observers = observers if observers is not None else Observers()
        self._ledger = ledger if ledger is not None else Ledger()
        self._victims = rooms.victims
        self.backlog = Backlog(_AT_ONCE)
        """What is released, touched and discarded soon."""
        rooms.add_backlog(self.backlog)
        self.closed = False
        self.deferred_by_owner: Counter[str] = Counter()
        self.left = dict.fromkeys(Removal, 0)
        """Chunks that left, by the reason."""

    @property
    def used_bytes(self) -> int:
        """The bytes of L1 that are not free: resident, reserved or quarantined."""
        return self.rooms.used_bytes

    @property
    def reserved_bytes(self) -> int:
        """The bytes of L1 that are reserved."""
        return self.rooms.reserved_bytes

    @property
    def quarantined_bytes(self) -> int:
        """The bytes of L1 that are not reserved any more, and that somebody may still touch."""
        return self.rooms.quarantined_bytes

    @property
    def leases(self) -> int:
        """The leases that there are."""
        return self.uses.leases

    @property
    def leased_bytes(self) -> int:
        """The bytes of L1 that are leased."""
        return self.uses.leased_bytes

    @property
    def deferred(self) -> int:
        """Commits that wait until a load no longer writes where they belong."""
        return self.deferred_by_owner.total()

    def divide(
        self,
        parts: Mapping[str, tuple[Collection[str], int]],
        common_bytes: int,
        make_policy: Callable[[], EvictionPolicy[Entry]],
    ) -> None:
        """Give owners shares, as `Shares.divide` does."""
        self.shares.divide(parts, common_bytes, make_policy, [*self.index.values(), *self.rooms.detached])

    # Reading: lease -> release, for requests; pin -> unpin, for I/O that uses the memory.

    def lease(self, entries: Iterable[Entry]) -> None:
        """Keep entries for a request, each until its `release`."""
        self.uses.lease(entries)

    def release(self, entries: Iterable[Entry]) -> None:
        """Release one lease of each entry, the tail of a prefix before its head."""
        self.uses.release(entries)

    def pin(self, entry: Entry) -> None:
        """Keep an entry while I/O uses its memory."""
        self.uses.pin(entry)

    def unpin(self, entry: Entry) -> None:
        """Take one pin of an entry away."""
        self.uses.unpin(entry)

    def release_soon(self, entries: Sequence[Entry]) -> None:
        """Release entries, of very many some in each of the loop's next turns, or when their room is needed."""
        self.backlog.do_ahead(self.uses.release, entries)

    def touch_soon(self, chunk_hashes: Sequence[bytes]) -> None:
        """Touch chunks, after what is released soon."""
        self.backlog.do(self.touch, chunk_hashes)

    def discard_soon(self, reservations: Sequence[Reservation]) -> None:
        """Discard rooms, as `release_soon` releases entries."""
        self.backlog.do(self.discard, reservations)

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
        for entry in filter(None, map(self.find, chunk_hashes)):
            self.uses.touch(entry)

    # Writing: reserve -> commit | discard.

    def reserve(
        self, layout: ModelLayout, blocks: Sequence[tuple[bytes, int]], owner: str = "", adapter: str = ""
    ) -> list[Reservation]:
        """Reserve room for each (chunk hash, rank), evicting what it takes; for the first ones, if all do not fit."""
        return self.rooms.reserve(layout, blocks, owner, adapter)

    def quarantine(self, reservation: Reservation) -> None:
        """Set a room aside until `discard`: somebody may still touch it."""
        self.rooms.quarantine(reservation)

    def reserve_within(self, entry: Entry, rank: int) -> Reservation:
        """Reserve the unpublished part of an entry's block; the entry is pinned until the reservation is done."""
        self.uses.pin(entry)
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
        rooms, end = self.rooms, self.rooms.end
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
            size = end(reservation)
            entry = Entry(chunk_hash, layout, owner, mask, 1 << rank, page_of(rank, offset), size, parent=after)
            entry.adapter = reservation.adapter
            before = index.get(after) if after is not None else None
            if before is not None:
                before.built_on_by(chunk_hash)
            elif after is not None:
                self._ledger.built_on(after, chunk_hash)
            index[chunk_hash] = entry
            rooms.evictable_bytes += size
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
            self.rooms.free_block(entry, rank)  # incomplete and unused: the new block replaces it
        size = self.rooms.end(reservation)
        self.bounds.add(reservation.owner, reservation.layout.model, -size)
        self.bounds.add(entry.owner, entry.layout.model, size)
        self.shares.of(entry.owner).used_bytes += size
        entry.present |= mask
        entry.place(rank, reservation.offset)
        if (entry_at := self._victims.entry_at) is not None:
            entry_at[reservation.offset] = entry
        self.uses.grew(entry, size)
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
                size = self.rooms.end(reservation)
                self.bounds.add(reservation.owner, reservation.layout.model, -size)
                if reservation.within is not None:
                    self._filled(reservation.within)
                else:
                    rooms.append((reservation.offset, size))
        self.rooms.free_all(rooms)

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
        self.uses.unpin(entry)

    # Leaving.

    def remove(self, entries: Iterable[Entry], removal: Removal = Removal.DELETED) -> None:
        """Let entries be found no more from now on; the memory of each goes with its last lease and pin."""
        freed: list[tuple[int, int]] = []
        for entry in entries:
            self._detach(entry, removal, freed)
            if self._observers.removed:
                notify(self._observers.removed, entry.observed(), removal)
        self.rooms.free_all(freed)

    def _detach(self, entry: Entry, removal: Removal, freed: list[tuple[int, int]]) -> None:
        """Take an entry out of the index; adds to `freed` what memory nobody uses any more."""
        if entry.retained:
            self.uses.unretain(entry)
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
            self.rooms.detached.add(entry)
        else:
            self.rooms.evictable_bytes -= entry.room_bytes
            share.used_bytes -= entry.room_bytes
            self.bounds.add(entry.owner, entry.layout.model, -entry.room_bytes)
            freed += blocks

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
        self.rooms.free_all(freed)

    def check_integrity(self) -> None:
        """Assert that every total agrees with the records, and that no two blocks overlap."""
        entries = [*self.index.values(), *self.rooms.detached]
        for entry in entries:
            assert entry.leases >= 0 and entry.pins >= entry.filling >= 0 and entry.unwritten >= 0
            assert entry.filling or not entry.deferred
            assert entry.present and entry.ranks and entry.room_bytes == sum(n for _, n in entry.blocks())
            assert entry.detached == (self.index.get(entry.chunk_hash) is not entry)
            assert not entry.detached or entry.leases or entry.pins
            assert not entry.retained or (entry.pins and not entry.detached)
        assert self.deferred == sum(len(entry.deferred) for entry in entries)
        self.uses.check_integrity(entries)
        self.rooms.check_integrity()
