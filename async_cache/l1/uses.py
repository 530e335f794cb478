"""What keeps entries in memory: leases, of requests; pins, of I/O that uses it; and retention."""

from collections.abc import Iterable, Sequence

from msgspec import Struct

from async_cache.l1.entry import Entry
from async_cache.l1.rooms import Rooms
from async_cache.l1.shares import Shares
from async_cache.retention.quotas import Bounds


class Leased(Struct, gc=False):
    """What is leased: so many pairs of request and chunk, and the memory of these chunks, which counts once."""

    leases: int = 0
    size_bytes: int = 0


class Uses:
    """Counts who uses entries, and has those that nobody uses evicted in the order of their last use."""

    def __init__(self, rooms: Rooms, shares: Shares, bounds: Bounds):
        self._rooms = rooms
        self._shares = shares
        self._bounds = bounds
        self.leases = 0
        self.leased_bytes = 0
        self._leased_of: dict[str, Leased] = {}  # by owner: of those who have nothing leased, nothing is known

    def lease(self, entries: Iterable[Entry]) -> None:
        """Keep entries for a request, each until its `release`. Their places in the eviction order do not change."""
        count = leased = kept = 0
        owner, before = "", (0, 0)  # most often, all of them are of one owner
        for entry in entries:
            if entry.owner != owner:
                self._count(owner, count - before[0], leased - before[1])
                owner, before = entry.owner, (count, leased)
            count += 1
            leases = entry.leases
            entry.leases = leases + 1
            if not leases:
                leased += entry.room_bytes
                if entry.pins or entry.detached:
                    kept += entry.room_bytes
        self._count(owner, count - before[0], leased - before[1])
        self.leases += count
        self.leased_bytes += leased
        self._rooms.evictable_bytes -= leased - kept

    def release(self, entries: Iterable[Entry]) -> None:
        """Release one lease of each entry. The tail of a prefix comes before its head, so that it is evicted first."""
        owner, before = "", (0, 0)
        count = released = evictable = 0
        used: list[Entry] = []
        for entry in entries:
            if entry.owner != owner:
                self._count(owner, before[0] - count, before[1] - released)
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
                    self._rooms.free(entry)
        self._count(owner, before[0] - count, before[1] - released)
        self._use(owner, used)
        self.leases -= count
        self.leased_bytes -= released
        self._rooms.evictable_bytes += evictable

    def grew(self, entry: Entry, size_bytes: int) -> None:
        """Take note that an entry has so much more memory."""
        if entry.leases:
            self.leased_bytes += size_bytes
            self._leased_of[entry.owner].size_bytes += size_bytes
        elif not entry.pins:
            self._rooms.evictable_bytes += size_bytes

    def _count(self, owner: str, leases: int, size_bytes: int) -> None:
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

    def touch(self, entry: Entry) -> None:
        """Mark an entry as used just now; one that is leased is when it is released."""
        if not entry.leases:
            self._use(entry.owner, (entry,))

    def _use(self, owner: str, entries: Sequence[Entry]) -> None:
        """Entries of an owner were used just now, one after the other."""
        self._shares.of(owner).policy.use_all(entries)
        if self._bounds:
            for entry in entries:
                self._bounds.use(entry.chunk_hash, owner, entry.layout.model)

    def pin(self, entry: Entry) -> None:
        """Keep an entry while I/O uses its memory. Its place in the eviction order does not change."""
        if not entry.pins and not entry.leases and not entry.detached:
            self._rooms.evictable_bytes -= entry.room_bytes
        entry.pins += 1

    def unpin(self, entry: Entry) -> None:
        """Take one pin of an entry away; a detached one leaves memory with the last."""
        entry.pins -= 1
        if not entry.pins and not entry.leases:
            if entry.detached:
                self._rooms.free(entry)
            else:
                self._rooms.evictable_bytes += entry.room_bytes
                self._shares.of(entry.owner).policy.resume(entry)

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

    def check_integrity(self, entries: Sequence[Entry]) -> None:
        """Assert that the totals agree with the entries: all that have memory."""
        assert self.leases == sum(e.leases for e in entries)
        assert self.leased_bytes == sum(e.room_bytes for e in entries if e.leases)
        assert self.leased_of(self._leased_of) == Leased(self.leases, self.leased_bytes)
        assert all(leased.leases for leased in self._leased_of.values()), "who has nothing is not known"
