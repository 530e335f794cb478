"""Delete and clear: what is removed cannot be found from the call on, whatever reads, loads or stores it meanwhile."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import compress, count, islice

from async_cache.aio.worker import Worker
from async_cache.errors import BackendError, CacheClosedError
from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.l2.guard import Guard, Listing
from async_cache.l2.guard.guards import Guards
from async_cache.l2.tombstones import Tombstones
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import Prompt
from async_cache.read.loads import Loader
from async_cache.values import BackendState, Deleted
from async_cache.write.carrier import Carrier
from async_cache.write.writeback import Writeback

_AT_ONCE = 256  # chunks, then the loop gets its turn; and objects in a call to a backend
_CIRCLES = 8  # so often no well-made listing has the same object
_LOOKED_UP_AT_ONCE = 4096  # objects


class Remover:
    """Takes chunks out of L1, out of the loads and writes that are under way, and out of every backend."""

    def __init__(
        self,
        l1: L1Store,
        guards: Guards,
        loader: Loader,
        writeback: Writeback,
        tombstones: Tombstones,
        hashing: Worker,
    ):
        self._l1 = l1
        self._guards = guards
        self._loader = loader
        self._writeback = writeback
        self._tombstones = tombstones
        self._hashing = hashing
        self._carrier = Carrier()

    async def delete(self, prompt: Prompt) -> Deleted:
        """Remove every chunk of a prompt. Raises BackendError if a backend could not, after all others did.

        A removal is carried to its end, also where its caller is cancelled.
        """
        if not prompt.hashed:
            await self._hashing.run(prompt.hash)
            if self._l1.closed:
                raise CacheClosedError("the cache was closed")
        removed = _Removed()
        removal = self._carrier.begin(self._delete(prompt, removed))  # before a backend that leaves is let go
        self._remove(prompt.chunk_hashes[:_AT_ONCE], removed)
        return await self._carrier.wait(removal)

    async def clear(self, tier: str) -> Deleted:
        """Remove everything from both tiers ("all"), or from L1 what L2 has ("l1").

        Raises BackendError and is carried to its end, both like `delete`.
        """
        if tier == "l1":
            return await self._carrier.carry_out(self._clear_written())
        self._tombstones.bury(None)
        removal = self._carrier.begin(self._clear_all())
        self._loader.delete(list(islice(self._loader.in_flight(), _AT_ONCE)))
        return await self._carrier.wait(removal)

    async def empty_l1(self) -> None:
        """Remove everything from L1; what somebody still reads keeps its memory."""
        await self._clear_l1(_Removed(), keep_needed=False)

    async def close(self) -> None:
        """Cancel the removals that are under way: their callers get CacheClosedError."""
        await self._carrier.close()

    # A removal has a task of its own.

    async def _delete(self, prompt: Prompt, removed: "_Removed") -> Deleted:
        """Remove the rest of a long prompt, its head is gone, and then all of it from L2."""
        hashes, buried = prompt.chunk_hashes, _AT_ONCE
        try:
            with self._all_kept():
                await self._count_leased(removed)
                for part in _parts(hashes[buried:]):
                    await asyncio.sleep(0)
                    self._remove(part, removed)
                    await self._count_leased(removed)
                    buried += len(part)
                await self._delete_everywhere(prompt, removed)
            return Deleted(len(removed.chunks), removed.leased)
        finally:
            for part in _parts(hashes[:buried]):
                self._tombstones.lift(part)
                self._store_again(part)
                await asyncio.sleep(0)

    async def _clear_written(self) -> Deleted:
        removed = _Removed()
        await self._clear_l1(removed, keep_needed=True)
        return Deleted(len(removed.chunks), removed.leased)

    async def _clear_all(self) -> Deleted:
        removed = _Removed()
        try:
            with self._all_kept():
                while loads := list(islice(self._loader.in_flight(), _AT_ONCE)):
                    self._loader.delete(loads)
                    await asyncio.sleep(0)
                await self._clear_l1(removed, keep_needed=False)
                await self._delete_everywhere(None, removed)
            return Deleted(len(removed.chunks), removed.leased)
        finally:
            self._tombstones.lift(None)
            for part in _parts(list(self._l1.index)):
                self._store_again(part)
                await asyncio.sleep(0)

    def _store_again(self, chunk_hashes: Iterable[bytes]) -> None:
        """Write back what was committed meanwhile: it may have been deleted together with its old copy."""
        for entry in filter(None, map(self._l1.find, chunk_hashes)):
            self._writeback.enqueue(entry)

    # L1.

    def _remove(self, chunk_hashes: Sequence[bytes], removed: "_Removed") -> None:
        """Let chunks be found no more, wherever they are."""
        self._tombstones.bury(chunk_hashes)
        self._remove_from_l1(chunk_hashes, removed)
        self._loader.delete(chunk_hashes)

    async def _clear_l1(self, removed: "_Removed", *, keep_needed: bool) -> None:
        for part in _parts(list(self._l1.index)):
            self._remove_from_l1(part, removed, keep_needed=keep_needed)
            await asyncio.sleep(0)
            await self._count_leased(removed)

    async def _count_leased(self, removed: "_Removed") -> None:
        """Count what is still leased of what has just been removed: what was released before may not be given back."""
        if removed.held:
            await self._l1.backlog.done()
            removed.leased += sum(entry.leases > 0 for entry in removed.held)
            removed.held.clear()

    def _remove_from_l1(self, chunk_hashes: Iterable[bytes], removed: "_Removed", *, keep_needed: bool = False) -> None:
        """Remove these chunks, as far as they are there."""
        entries = [
            entry
            for entry in filter(None, map(self._l1.find, chunk_hashes))
            if not (keep_needed and self._is_needed(entry))
        ]
        for entry in entries:
            self._writeback.withdraw(entry)
        removed.held += [entry for entry in entries if entry.leases]
        removed.chunks.update([entry.chunk_hash for entry in entries])
        self._l1.remove(entries)

    def _is_needed(self, entry: Entry) -> bool:
        """Whether L2 lacks a chunk, or a request may load the rest of it: what it was promised of it is here."""
        is_whole = entry.present == entry.layout.objects.full_mask
        return self._writeback.keeps(entry) or (entry.leases > 0 and not is_whole)

    # L2.

    async def _delete_everywhere(self, prompt: Prompt | None, removed: "_Removed") -> None:
        """Delete all objects of a prompt, or all if None, from every backend, also one that comes or leaves meanwhile.

        Raises BackendError once all backends have ended, if one failed that is still there.
        """
        asked: list[Guard] = []
        outcomes: list[BaseException | None] = []
        while guards := [guard for guard in self._guards if guard not in asked]:
            asked += guards
            deletions = [self._delete_from(guard, prompt, removed) for guard in guards]
            outcomes += await asyncio.gather(*deletions, return_exceptions=True)
        for guard, outcome in zip(asked, outcomes, strict=True):
            if outcome is not None and guard.state is not BackendState.LEAVING:
                raise outcome

    @contextmanager
    def _all_kept(self) -> Iterator[None]:
        """Have every backend stay open, also one that leaves now."""
        with ExitStack() as kept:
            for guard in self._guards:
                kept.enter_context(guard.kept())
            yield

    async def _delete_from(self, guard: Guard, prompt: Prompt | None, removed: "_Removed") -> None:
        hashes = set(prompt.chunk_hashes) if prompt is not None else None
        with guard.kept():
            ended = await self._writeback.writes_ended(guard, hashes) and await guard.stores_ended(hashes)
            await (_delete_found(guard, prompt, removed) if prompt is not None else _delete_all(guard, removed))
        if not ended:
            raise BackendError(f"{guard.name} may still store what was to be deleted: a write does not end")


class _Removed:
    """What was removed so far."""

    def __init__(self) -> None:
        self.chunks: set[bytes] = set()
        self.leased = 0
        self.held: list[Entry] = []  # leased when it was removed, and not counted yet


def _parts(chunk_hashes: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """So many chunks at a time that the loop is not held for long."""
    return (chunk_hashes[begin : begin + _AT_ONCE] for begin in range(0, len(chunk_hashes), _AT_ONCE))


async def _delete_found(guard: Guard, prompt: Prompt, removed: _Removed) -> None:
    """Delete those of a prompt's objects that a backend has."""
    objects, hashes = prompt.layout.objects, prompt.chunk_hashes
    chunks = max(1, _LOOKED_UP_AT_ONCE // objects.full_mask.bit_count())
    for first in range(0, len(hashes), chunks):
        keys = objects.keys([(chunk_hash, objects.full_mask) for chunk_hash in hashes[first : first + chunks]])
        found = await guard.lookup(keys)
        if found is None:
            raise BackendError(f"{guard.name} cannot be asked what to delete")
        there = list(compress(keys, found))
        guard.unpin(there)
        for begin in range(0, len(there), _AT_ONCE):
            await guard.delete(there[begin : begin + _AT_ONCE])
        removed.chunks.update([key.chunk_hash for key in there])


async def _delete_all(guard: Guard, removed: _Removed) -> None:
    """Delete all that a backend has, as it is listed. Raises BackendError, also for a listing that goes in a circle.

    Of the keys, one is remembered, another one each time that twice as much was listed: in a circle, it comes again and
    again, however long that is. What changes while it is listed may be listed twice.
    """
    listing: Listing = []
    remembered: ObjectKey | None = None
    again = 0
    try:
        for part in count(1):
            keys = [key for key, _ in await guard.next_keys(listing, _AT_ONCE)]
            again += sum(key == remembered for key in keys)
            if again >= _CIRCLES:
                raise BackendError(f"{guard.name} lists the same objects again and again")
            if keys and not part & part - 1:
                remembered, again = keys[0], 0
            if keys:
                await guard.delete(keys)
                removed.chunks.update([key.chunk_hash for key in keys])
            if len(keys) < _AT_ONCE:
                return
    finally:
        await guard.close_listing(listing)
