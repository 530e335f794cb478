"""Delete and clear: what is removed cannot be found from the call on, whatever reads, loads or stores it meanwhile."""

import asyncio
from collections.abc import Iterable, Sequence

from async_cache.errors import BackendError, CacheClosedError
from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.l2.guard import Guard, Listing
from async_cache.l2.guard.guards import Guards
from async_cache.l2.tombstones import Tombstones
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import Prompt
from async_cache.read.loads import Loader
from async_cache.values import Deleted
from async_cache.write.carrier import Carrier
from async_cache.write.writeback import Writeback

_AT_ONCE = 256  # chunks, then the loop gets its turn; and objects in a call to a backend


class Remover:
    """Takes chunks out of L1, out of the loads and writes that are under way, and out of every backend."""

    def __init__(
        self,
        l1: L1Store,
        guards: Guards,
        loader: Loader,
        writeback: Writeback,
        tombstones: Tombstones,
    ):
        self._l1 = l1
        self._guards = guards
        self._loader = loader
        self._writeback = writeback
        self._tombstones = tombstones
        self._carrier = Carrier()

    async def delete(self, prompt: Prompt) -> Deleted:
        """Remove every chunk of a prompt. Raises BackendError if a backend could not, after all others did.

        A removal is carried to its end, also where its caller is cancelled.
        """
        if not prompt.hashed:
            await asyncio.to_thread(prompt.hash)
            if self._l1.closed:
                raise CacheClosedError("the cache was closed")
        hashes = prompt.chunk_hashes
        self._tombstones.bury(hashes)
        resident, leased = self._remove_from_l1(hashes)
        self._loader.delete(hashes)
        return await self._carrier.carry_out(self._delete_from_l2(prompt, resident, leased))

    async def clear(self, tier: str) -> Deleted:
        """Remove everything from both tiers ("all"), or from L1 what L2 has ("l1").

        Raises BackendError and is carried to its end, both like `delete`.
        """
        if tier == "l1":
            return await self._carrier.carry_out(self._clear_written())
        self._tombstones.bury(None)
        self._loader.delete(list(self._loader.in_flight()))
        return await self._carrier.carry_out(self._clear_all())

    async def empty_l1(self) -> None:
        """Remove everything from L1; what somebody still reads keeps its memory."""
        await self._clear_l1(keep_needed=False)

    async def close(self) -> None:
        """Cancel the removals that are under way: their callers get CacheClosedError."""
        await self._carrier.close()

    # A removal has a task of its own.

    async def _delete_from_l2(self, prompt: Prompt, resident: set[bytes], leased: int) -> Deleted:
        hashes, objects = prompt.chunk_hashes, prompt.layout.objects
        try:
            found = await self._delete_everywhere(objects.keys([(h, objects.full_mask) for h in hashes]))
            return Deleted(len(resident | found), leased)
        finally:
            self._tombstones.lift(hashes)
            self._store_again(hashes)

    async def _clear_written(self) -> Deleted:
        resident, leased = await self._clear_l1(keep_needed=True)
        return Deleted(len(resident), leased)

    async def _clear_all(self) -> Deleted:
        try:
            resident, leased = await self._clear_l1(keep_needed=False)
            found = await self._delete_everywhere(None)
            return Deleted(len(resident | found), leased)
        finally:
            self._tombstones.lift(None)
            self._store_again(list(self._l1.index))

    def _store_again(self, chunk_hashes: Iterable[bytes]) -> None:
        """Write back what was committed meanwhile: it may have been deleted together with its old copy."""
        for entry in filter(None, map(self._l1.find, chunk_hashes)):
            self._writeback.enqueue(entry)

    # L1.

    async def _clear_l1(self, *, keep_needed: bool) -> tuple[set[bytes], int]:
        hashes = list(self._l1.index)
        resident: set[bytes] = set()
        leased = 0
        for begin in range(0, len(hashes), _AT_ONCE):
            some, some_leased = self._remove_from_l1(hashes[begin : begin + _AT_ONCE], keep_needed=keep_needed)
            resident |= some
            leased += some_leased
            await asyncio.sleep(0)
        return resident, leased

    def _remove_from_l1(self, chunk_hashes: Iterable[bytes], *, keep_needed: bool = False) -> tuple[set[bytes], int]:
        """Remove these chunks, as far as they are there; those that were, and how many of them are leased."""
        resident, leased = set(), 0
        for entry in filter(None, map(self._l1.find, chunk_hashes)):
            if not (keep_needed and self._is_needed(entry)):
                resident.add(entry.chunk_hash)
                leased += entry.leases > 0
                self._writeback.withdraw(entry)
                self._l1.remove(entry)
        return resident, leased

    def _is_needed(self, entry: Entry) -> bool:
        """Whether L2 lacks a chunk, or a request may load the rest of it: what it was promised of it is here."""
        is_whole = entry.present == entry.layout.objects.full_mask
        return self._writeback.keeps(entry) or (entry.leases > 0 and not is_whole)

    # L2.

    async def _delete_everywhere(self, keys: Sequence[ObjectKey] | None) -> set[bytes]:
        """Delete these objects, or all if None, from every backend, also one that is added meanwhile.

        Returns the chunks that were found on any. Raises BackendError once all backends have ended, if one failed.
        """
        asked: set[Guard] = set()
        outcomes: list[set[bytes] | BaseException] = []
        while guards := [guard for guard in self._guards.current if guard not in asked]:
            asked.update(guards)
            deletions = [self._delete_from(guard, keys) for guard in guards]
            outcomes += await asyncio.gather(*deletions, return_exceptions=True)
        found: set[bytes] = set()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            found |= outcome
        return found

    async def _delete_from(self, guard: Guard, keys: Sequence[ObjectKey] | None) -> set[bytes]:
        hashes = None if keys is None else {key.chunk_hash for key in keys}
        with guard.kept():
            ended = await self._writeback.writes_ended(guard, hashes) and await guard.stores_ended(hashes)
            deleted = await (_delete_all(guard) if keys is None else _delete_found(guard, keys))
        if not ended:
            raise BackendError(f"{guard.name} may still store what was to be deleted: a write does not end")
        return deleted


async def _delete_found(guard: Guard, keys: Sequence[ObjectKey]) -> set[bytes]:
    """Delete those of the objects that a backend has; the chunks of which it had any."""
    found = await guard.lookup(keys)
    if found is None:
        raise BackendError(f"{guard.name} cannot be asked what to delete")
    there = [key for key, is_there in zip(keys, found, strict=True) if is_there]
    guard.unpin(there)
    for begin in range(0, len(there), _AT_ONCE):
        await guard.delete(there[begin : begin + _AT_ONCE])
    return {key.chunk_hash for key in there}


async def _delete_all(guard: Guard) -> set[bytes]:
    """Delete all that a backend has, as it is listed; the chunks that it had."""
    deleted: set[bytes] = set()
    listing: Listing = []
    try:
        while True:
            keys = [key for key, _ in await guard.next_keys(listing, _AT_ONCE)]
            if keys:
                await guard.delete(keys)
                deleted.update(key.chunk_hash for key in keys)
            if len(keys) < _AT_ONCE:
                return deleted
    finally:
        await guard.close_listing(listing)
