"""Whose chunks leave L1 for whom: what one does not use of its share is lent, and comes back by eviction."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from async_cache.l1.entry import Entry
from async_cache.retention.policy import EvictionPolicy
from async_cache.values import Removal


class Share:
    """What some owners have of L1 together, and in which order their chunks leave."""

    __slots__ = ("chunks", "kept_bytes", "owners", "policy", "used_bytes")

    def __init__(self, policy: EvictionPolicy[Entry]):
        self.policy = policy
        self.owners: set[str] = set()
        """Whose it is, where that was said."""
        self.kept_bytes = 0
        """Up to so much of it, others take nothing."""
        self.used_bytes = self.chunks = 0

    @property
    def lent_bytes(self) -> int:
        """What it has beyond its own, which others may take back."""
        return max(self.used_bytes - self.kept_bytes, 0)

    def __repr__(self) -> str:
        return f"<Share, {self.used_bytes} of {self.kept_bytes} bytes in {self.chunks} chunks>"


class Shares:
    """The shares of all owners. Those who have none of their own have one together: at first, these are all.

    For a chunk of an owner there leave, where its share has more than it keeps, those of the same share; then those of
    others that have more than they keep; then, in any case, those of the same share. What a share keeps is taken by no
    other.
    """

    def __init__(self, policy: EvictionPolicy[Entry]):
        self._common = Share(policy)
        self._of: dict[str, Share] = {}
        self._named: dict[str, Share] = {}

    def of(self, owner: str) -> Share:
        """That of an owner."""
        return self._of.get(owner, self._common)

    def those_of(self, owners: Collection[str]) -> list[Share]:
        """The shares that these owners have, and nobody else."""
        shares = {id(share): share for share in map(self._of.get, owners) if share is not None}
        return [share for share in shares.values() if share.owners <= set(owners)]

    def divide(
        self,
        parts: Mapping[str, tuple[Collection[str], int]],
        common_bytes: int,
        make_policy: Callable[[], EvictionPolicy[Entry]],
        entries: Iterable[Entry],
    ) -> None:
        """Give owners shares: by name, whose it is, and how many bytes. Who had one and is not named keeps nothing.

        `entries`: all that have memory, those that were removed while they were in use among them.
        """
        for share in self._named.values():
            share.kept_bytes = 0
        self._common.kept_bytes = common_bytes
        new: dict[str, Share] = {}
        for name, (owners, kept_bytes) in parts.items():
            if name not in self._named:
                self._named[name] = Share(make_policy())
            share = self._named[name]
            share.kept_bytes = kept_bytes
            new |= {owner: share for owner in owners if self._of.get(owner) is not share}
        for entry in entries if new else ():
            if entry.owner in new:
                self._move(entry, new[entry.owner])
        for owner, share in new.items():
            self.of(owner).owners.discard(owner)
            share.owners.add(owner)
        self._of |= new

    def _move(self, entry: Entry, to: Share) -> None:
        before = self.of(entry.owner)
        before.used_bytes -= entry.room_bytes
        to.used_bytes += entry.room_bytes
        if not entry.detached:
            before.policy.left(entry, Removal.LOST)
            before.chunks -= 1
            to.policy.enter(entry, None)
            to.chunks += 1

    def victims(self, owner: str) -> Iterator[tuple[Share, Entry]]:
        """The chunks that may leave for one of an owner, in order, and those that must stay for now among them."""
        own = self.of(owner)
        if not self._named:
            for entry in own.policy.victims():
                yield own, entry
            return
        others = [share for share in (self._common, *self._named.values()) if share is not own and share.lent_bytes]
        others.sort(key=lambda share: -share.lent_bytes)
        is_first = own.lent_bytes > 0
        if is_first:
            yield from _all_of(own)
        for share in others:
            yield from _lent_of(share)
        if not is_first:
            yield from _all_of(own)

    def may_leave(self, entry: Entry, owner: str) -> bool:
        """Whether a chunk may leave for one of an owner, whatever the order."""
        share = self.of(entry.owner)
        return share is self.of(owner) or share.lent_bytes >= entry.room_bytes

    def __iter__(self) -> Iterator[Share]:
        return iter((self._common, *self._named.values()))


def _all_of(share: Share) -> Iterator[tuple[Share, Entry]]:
    for entry in share.policy.victims():
        yield share, entry


def _lent_of(share: Share) -> Iterator[tuple[Share, Entry]]:
    """As many as it has beyond its own, if all of those that may be evicted go."""
    left = share.lent_bytes
    for entry in share.policy.victims():
        evictable = not entry.leases and not entry.pins
        if evictable:
            left -= entry.room_bytes
            if left < 0:
                break
        yield share, entry
