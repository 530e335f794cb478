"""Delete and clear: what is removed cannot be found from the call on, whatever reads, loads or stores it meanwhile."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import TypeVar

from async_cache.aio.backlog import Backlog
from async_cache.aio.slices import InTurns, slices, turn
from async_cache.aio.worker import Worker
from async_cache.errors import BackendError, CacheClosedError
from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.l2.guard import Guard
from async_cache.l2.guard.guards import Guards
from async_cache.l2.tombstones import Tombstones
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import Prompt
from async_cache.prompt.origin import Selection
from async_cache.read.load import ChunkLoad
from async_cache.read.loads import Loader
from async_cache.values import BackendState, Deleted, DeletedModel
from async_cache.write.carrier import Carrier
from async_cache.write.deletions import AT_ONCE, Removed, delete_all, delete_found, listed
from async_cache.write.writeback import Writeback

_AT_ONCE = 256  # chunks, then the loop gets its turn
_SELECTED_AT_ONCE = 2048  # chunks that are looked at: a millisecond or so
_NAMED_AT_ONCE = 16_384  # hashes that are put into a set

T = TypeVar("T")


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
        removed: Callable[[Sequence[bytes] | None], Awaitable[None]],
    ):
        self._l1 = l1
        self._guards = guards
        self._loader = loader
        self._writeback = writeback
        self._tombstones = tombstones
        self._hashing = hashing
        self._tell_removed = removed
        self._carrier = Carrier()
        self._backlog = Backlog(_AT_ONCE)

    async def delete(self, prompt: Prompt) -> Deleted:
        """Remove every chunk of a prompt. Raises BackendError if a backend could not, after all others did.

        A removal is carried to its end, also where its caller is cancelled.
        """
        if not prompt.hashed:
            await self._hashing.run(prompt.hash)
            if self._l1.closed:
                raise CacheClosedError("the cache was closed")
        removed = Removed()
        removal = self._carrier.begin(self._delete(prompt, removed))  # before a backend that leaves is let go
        removal.add_done_callback(lambda _: self._backlog.do(self._lift, prompt.chunk_hashes[: removed.buried]))
        self._remove(prompt.chunk_hashes[:_AT_ONCE], removed)
        return await self._ended(removal)

    async def delete_model(self, selection: Selection) -> DeletedModel:
        """Remove every chunk of what is selected. Raises BackendError and is carried to its end, both like `delete`."""
        removed, buried = Removed(), list[bytes]()
        removal = self._carrier.begin(self._delete_model(selection, removed, buried))
        removal.add_done_callback(lambda _: self._backlog.do(self._lift, buried))
        return await self._ended(removal)

    async def clear(self, tier: str) -> Deleted:
        """Remove everything from both tiers ("all"), or from L1 what L2 has ("l1").

        Raises BackendError and is carried to its end, both like `delete`.
        """
        if tier == "l1":
            return await self._carrier.carry_out(self._clear_written())
        self._tombstones.bury(None)
        removal = self._carrier.begin(self._clear_all())
        removal.add_done_callback(lambda _: self._lift_all())
        self._loader.delete(list(islice(self._loader.in_flight(), _AT_ONCE)))
        return await self._ended(removal)

    async def _ended(self, removal: "asyncio.Task[T]") -> T:
        """What a removal has removed, when all of its tombstones are lifted."""
        try:
            return await self._carrier.wait(removal)
        finally:
            await self._backlog.done()

    async def empty_l1(self) -> None:
        """Remove everything from L1; what somebody still reads keeps its memory."""
        await self._clear_l1(Removed(), keep_needed=False)

    async def close(self) -> None:
        """Cancel the removals that are under way: their callers get CacheClosedError."""
        await self._carrier.close()
        self._backlog.do_all()

    # A removal has a task of its own.

    async def _delete(self, prompt: Prompt, removed: Removed) -> Deleted:
        """Remove the rest of a long prompt, whose head is gone, and then all of it from L2."""
        with self._all_kept():
            await self._count_leased(removed)
            await asyncio.sleep(0)
            async for part in InTurns(prompt.chunk_hashes[removed.buried :], _AT_ONCE):
                self._remove(part, removed)
                await self._count_leased(removed)
            try:
                await self._at_each(partial(self._delete_from, prompt, removed))
            finally:
                await self._tell_removed(prompt.chunk_hashes)
        return Deleted(len(removed.chunks), removed.leased)

    async def _delete_model(self, selection: Selection, removed: Removed, buried: list[bytes]) -> DeletedModel:
        """Remove what is selected: what L1 has, what is on its way, and what the backends know that they have.

        Whatever one of them has found is deleted from all, since some do not know what their objects are of.
        """

        async def remove(keys: Sequence[ObjectKey]) -> None:
            chunk_hashes = list(dict.fromkeys([key.chunk_hash for key in keys]))
            buried.extend(chunk_hashes)
            self._remove(chunk_hashes, removed)
            await self._count_leased(removed)

        async def delete(guard: Guard, keys: Sequence[ObjectKey]) -> None:
            for part in slices(keys, AT_ONCE):
                removed.objects += await guard.delete(part)

        async def delete_known(guard: Guard) -> None:
            if not (await self._writeback.writes_ended(guard, None) and await guard.stores_ended(None)):
                raise BackendError(f"{guard.name} may still store what was to be deleted: a write does not end")
            async for part in listed(guard, removed, selection):
                keys = [key for key, _ in part]
                await remove(keys)
                removed.chunks.update([key.chunk_hash for key in keys])
                removed.size_bytes += sum(size_bytes for _, size_bytes in part)
                await delete(guard, keys)
                for other in self._guards:
                    if other is not guard and other.chunks_without_origin() != 0:
                        await delete(other, keys)
            await delete(guard, in_memory)

        in_memory: list[ObjectKey] = []
        with self._all_kept():
            there: list[Entry | ChunkLoad] = [*self._l1.index.values(), *self._loader.in_flight().values()]
            async for some in InTurns(there, _SELECTED_AT_ONCE):
                selected = [each for each in some if each.origin in selection]
                for part in slices(selected, _AT_ONCE):
                    await turn()
                    keys = [key for each in part for key in _keys_of(each)]
                    removed.size_bytes += sum(it.room_bytes for it in part if self._l1.find(it.chunk_hash) is it)
                    await remove(keys)
                    in_memory += keys
            try:
                await self._at_each(delete_known)
            finally:
                await self._tell_removed(buried)
        unsure = tuple(guard.name for guard in self._guards.current if guard.chunks_without_origin() != 0)
        return DeletedModel(len(removed.chunks), removed.leased, removed.size_bytes, unsure)

    async def _clear_written(self) -> Deleted:
        removed = Removed()
        await self._clear_l1(removed, keep_needed=True)
        return Deleted(len(removed.chunks), removed.leased)

    async def _clear_all(self) -> Deleted:
        removed = Removed()
        with self._all_kept():
            while loads := list(islice(self._loader.in_flight(), _AT_ONCE)):
                self._loader.delete(loads)
                await asyncio.sleep(0)
            await self._clear_l1(removed, keep_needed=False)
            try:
                await self._at_each(partial(self._delete_from, None, removed))
            finally:
                await self._tell_removed(None)
        return Deleted(len(removed.chunks), removed.leased)

    # Its tombstones are lifted when the task has ended, also where it was cancelled before it began.

    def _lift(self, chunk_hashes: Sequence[bytes]) -> None:
        self._tombstones.lift(chunk_hashes)
        self._store_again(chunk_hashes)

    def _lift_all(self) -> None:
        self._tombstones.lift(None)
        self._backlog.do(self._store_again, list(self._l1.index))

    def _store_again(self, chunk_hashes: Iterable[bytes]) -> None:
        """Write back what was committed meanwhile: it may have been deleted together with its old copy."""
        for entry in filter(None, map(self._l1.find, chunk_hashes)):
            self._writeback.enqueue(entry)

    # L1.

    def _remove(self, chunk_hashes: Sequence[bytes], removed: Removed) -> None:
        """Let chunks be found no more, wherever they are."""
        self._tombstones.bury(chunk_hashes)
        removed.buried += len(chunk_hashes)
        self._remove_from_l1(chunk_hashes, removed)
        self._loader.delete(chunk_hashes)

    async def _clear_l1(self, removed: Removed, *, keep_needed: bool) -> None:
        async for part in InTurns(list(self._l1.index), _AT_ONCE):
            self._remove_from_l1(part, removed, keep_needed=keep_needed)
            await self._count_leased(removed)

    async def _count_leased(self, removed: Removed) -> None:
        """Count what is still leased of what has just been removed: what was released before may not be given back."""
        if removed.held:
            await self._l1.backlog.done()
            removed.leased += sum(entry.leases > 0 for entry in removed.held)
            removed.held.clear()

    def _remove_from_l1(self, chunk_hashes: Iterable[bytes], removed: Removed, *, keep_needed: bool = False) -> None:
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
        """Whether a chunk is retained, waits for L2, or is promised to a request that may load the rest of it."""
        is_whole = entry.present == entry.layout.objects.full_mask
        return entry.retained or self._writeback.keeps(entry) or (entry.leases > 0 and not is_whole)

    # L2.

    async def _at_each(self, delete: Callable[[Guard], Awaitable[None]]) -> None:
        """Delete from every backend, also from one that comes or leaves meanwhile.

        Raises BackendError once all backends have ended, if one failed that is still there.
        """
        asked: list[Guard] = []
        outcomes: list[BaseException | None] = []
        while guards := [guard for guard in self._guards if guard not in asked]:
            asked += guards
            outcomes += await asyncio.gather(*map(delete, guards), return_exceptions=True)
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

    async def _delete_from(self, prompt: Prompt | None, removed: Removed, guard: Guard) -> None:
        hashes: set[bytes] | None = None
        with guard.kept():
            if prompt is not None:
                hashes = set()
                async for part in InTurns(prompt.chunk_hashes, _NAMED_AT_ONCE):
                    hashes.update(part)
            ended = await self._writeback.writes_ended(guard, hashes) and await guard.stores_ended(hashes)
            await (delete_found(guard, prompt, removed) if prompt is not None else delete_all(guard, removed))
        if not ended:
            raise BackendError(f"{guard.name} may still store what was to be deleted: a write does not end")


def _keys_of(chunk: Entry | ChunkLoad) -> list[ObjectKey]:
    """All objects that a chunk may have."""
    objects = chunk.layout.objects
    return objects.keys([(chunk.chunk_hash, objects.full_mask)])
