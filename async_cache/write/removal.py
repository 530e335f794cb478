"""Delete and clear: gone from the moment of the call, whatever reads, loads or writes it."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any

from async_cache.config import CacheConfig
from async_cache.errors import BackendError, CacheClosedError
from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.l2.guard import Guard
from async_cache.l2.tombstones import Tombstones
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import Prompt
from async_cache.read.loads import Loader
from async_cache.values import Deleted
from async_cache.write.writeback import Writeback

_CHUNKS_AT_ONCE = 256  # then the loop gets its turn


class Remover:
    """Takes chunks out of L1, out of what is on its way, and out of every backend."""

    def __init__(
        self,
        l1: L1Store,
        guards: Sequence[Guard],
        loader: Loader,
        writeback: Writeback,
        tombstones: Tombstones,
        config: CacheConfig,
    ):
        self._l1 = l1
        self._guards = guards
        self._loader = loader
        self._writeback = writeback
        self._tombstones = tombstones
        self._config = config
        self._tasks: set[asyncio.Task[Deleted]] = set()

    async def delete(self, prompt: Prompt) -> Deleted:
        """Remove every chunk of a prompt. Raises BackendError if a backend could not, after all others did.

        It is carried to its end also where the caller is cancelled: half a removal would be neither here nor there.
        """
        if not prompt.hashed:
            await asyncio.to_thread(prompt.hash)
            if self._l1.closed:
                raise CacheClosedError("the cache was closed")
        hashes = prompt.chunk_hashes
        self._tombstones.bury(hashes)
        resident, leased = self._remove_from_l1(hashes)
        self._loader.forget(hashes)
        return await self._carry(self._delete_from_l2(prompt, resident, leased))

    async def clear(self, tier: str) -> Deleted:
        """Remove everything from both tiers ("all"), or from L1 what L2 has ("l1"). Carried to its end likewise."""
        if tier == "l1":
            resident, leased = await self._clear_l1(keep_needed=True)
            return Deleted(len(resident), leased)
        self._tombstones.bury(None)
        self._loader.forget(list(self._loader.table))
        return await self._carry(self._clear_all())

    async def close(self) -> None:
        """Give up what is under way: whoever waits for it gets CacheClosedError."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _carry(self, removal: Coroutine[Any, Any, Deleted]) -> Deleted:
        task = asyncio.create_task(removal)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # by `close`, and not the caller
                raise CacheClosedError("the cache was closed") from None
            raise

    def _ended(self, task: "asyncio.Task[Deleted]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, also where its caller is gone

    async def empty_l1(self) -> None:
        """Let go of what is resident, in slices; what somebody still reads keeps its memory."""
        await self._clear_l1(keep_needed=False)

    async def _delete_from_l2(self, prompt: Prompt, resident: set[bytes], leased: int) -> Deleted:
        hashes = prompt.chunk_hashes
        try:
            keys = prompt.layout.objects.keys([(h, prompt.layout.objects.full_mask) for h in hashes])
            found = await self._on_every_backend(lambda guard: self._delete_found(guard, keys))
            return Deleted(len(resident | found), leased)
        finally:
            self._tombstones.lift(hashes)
            self._write_again(hashes)

    async def _clear_all(self) -> Deleted:
        try:
            resident, leased = await self._clear_l1(keep_needed=False)
            found = await self._on_every_backend(self._delete_all)
            return Deleted(len(resident | found), leased)
        finally:
            self._tombstones.lift(None)
            self._write_again(list(self._l1.index))

    def _write_again(self, chunk_hashes: Iterable[bytes]) -> None:
        """What was stored while its old copy was being removed may have been removed with it."""
        for entry in filter(None, map(self._l1.index.get, chunk_hashes)):
            self._writeback.enqueue(entry)

    def _remove_from_l1(self, chunk_hashes: Iterable[bytes], *, keep_needed: bool = False) -> tuple[set[bytes], int]:
        resident, leased = set(), 0
        for chunk_hash in chunk_hashes:
            entry = self._l1.index.get(chunk_hash)
            if entry is not None and not (keep_needed and _is_needed(entry)):
                resident.add(chunk_hash)
                leased += entry.leases > 0
                self._writeback.withdraw(entry)
                self._l1.remove(entry)
        return resident, leased

    async def _clear_l1(self, *, keep_needed: bool) -> tuple[set[bytes], int]:
        hashes = list(self._l1.index)
        resident: set[bytes] = set()
        leased = 0
        for begin in range(0, len(hashes), _CHUNKS_AT_ONCE):
            slice_ = hashes[begin : begin + _CHUNKS_AT_ONCE]
            some, some_leased = self._remove_from_l1(slice_, keep_needed=keep_needed)
            resident |= some
            leased += some_leased
            await asyncio.sleep(0)
        return resident, leased

    async def _on_every_backend(self, remove: Callable[[Guard], Awaitable[set[bytes]]]) -> set[bytes]:
        """The chunks that were found on any. Raises BackendError once all have ended, if one failed."""
        outcomes = await asyncio.gather(*map(remove, self._guards), return_exceptions=True)
        found: set[bytes] = set()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            found |= outcome
        return found

    async def _delete_found(self, guard: Guard, keys: Sequence[ObjectKey]) -> set[bytes]:
        landed = await self._landed(guard, {key.chunk_hash for key in keys})
        found = await guard.lookup(keys)
        if found is None:
            raise BackendError(f"{guard.backend.name} can not be asked what to delete")
        guard.unpin_found(keys, found)
        there = [key for key, is_there in zip(keys, found, strict=True) if is_there]
        if there:
            await guard.delete(there)
        _check(guard, landed)
        return {key.chunk_hash for key in there}

    async def _delete_all(self, guard: Guard) -> set[bytes]:
        landed = await self._landed(guard, None)
        keys = await guard.keys()
        for begin in range(0, len(keys), _CHUNKS_AT_ONCE):
            await guard.delete(keys[begin : begin + _CHUNKS_AT_ONCE])
        _check(guard, landed)
        return {key.chunk_hash for key in keys}

    async def _landed(self, guard: Guard, chunk_hashes: set[bytes] | None) -> bool:
        return await self._writeback.writes_ended(guard, chunk_hashes)


def _check(guard: Guard, landed: bool) -> None:
    if not landed:
        raise BackendError(f"{guard.backend.name} may still store what was to be deleted: a write does not end")


def _is_needed(entry: Entry) -> bool:
    """Whether L2 lacks it, or a request may have the rest of it loaded: what was promised of it is here."""
    return bool(entry.unwritten or (entry.leases and entry.present != entry.layout.objects.full_mask))
