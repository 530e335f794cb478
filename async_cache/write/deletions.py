"""What is deleted from one backend: all of a prompt, or of a model, or everything. And what was deleted, counted."""

import asyncio
from collections.abc import AsyncIterator
from itertools import compress, count

from async_cache.aio.slices import InTurns, slices
from async_cache.errors import BackendError
from async_cache.l1.entry import Entry
from async_cache.l2.guard import Guard, Listing
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import Prompt
from async_cache.prompt.origin import Selection

AT_ONCE = 256  # objects in a call to a backend
_CIRCLES = 8  # so often no well-made listing has the same object
_LOOKED_UP_AT_ONCE = 4096  # objects
_CLEARED_SECONDS = 3600.0  # for all that a backend has: a listing may have no end, where others go on storing


class Removed:
    """What was removed so far."""

    def __init__(self) -> None:
        self.chunks: set[bytes] = set()
        self.leased = self.buried = self.objects = self.size_bytes = 0
        self.held: list[Entry] = []  # leased when it was removed, and not counted yet


async def delete_found(guard: Guard, prompt: Prompt, removed: Removed) -> None:
    """Delete those of a prompt's objects that a backend has."""
    objects = prompt.layout.objects
    async for hashes in InTurns(prompt.chunk_hashes, objects.chunks_with(_LOOKED_UP_AT_ONCE)):
        async with guard.removals.entered(prompt.salt, len(hashes) * objects.full_mask.bit_count()):
            keys = objects.keys([(chunk_hash, objects.full_mask) for chunk_hash in hashes])
            found = await guard.lookup(keys, prompt.salt)
            if found is None:
                raise BackendError(f"{guard.name} cannot be asked what to delete")
            there = list(compress(keys, found))
            guard.unpin(there)
            for part in slices(there, AT_ONCE):
                await guard.delete(part)
            removed.chunks.update([key.chunk_hash for key in there])


async def delete_all(guard: Guard, removed: Removed) -> None:
    """Delete all that a backend has, as it is listed, in an hour at most. Raises BackendError, as `listed` does."""
    async for part in listed(guard, removed):
        keys = [key for key, _ in part]
        if deleted := await guard.delete(keys):
            removed.objects += deleted
            removed.chunks.update([key.chunk_hash for key in keys])


async def listed(
    guard: Guard, removed: Removed, selection: Selection | None = None
) -> AsyncIterator[list[tuple[ObjectKey, int]]]:
    """What a backend lists, all of it or what is selected, in parts, each object with its size. For an hour at most.

    Nothing where it does not know what its objects are of.

    Raises BackendError, also for a listing that goes in a circle or does not end in time. Of the keys, one is
    remembered, another one each time that twice as much was listed: in a circle, it comes again and again, however long
    that is. What changes while it is listed may be listed twice.
    """
    if selection is not None and guard.chunks_without_origin() is None:
        return
    clock = asyncio.get_running_loop().time
    latest = clock() + _CLEARED_SECONDS
    listing: Listing = []
    remembered: ObjectKey | None = None
    again = 0
    try:
        for part in count(1):
            objects = await guard.next_keys(listing, AT_ONCE, selection)
            again += sum(key == remembered for key, _ in objects)
            if again >= _CIRCLES:
                raise BackendError(f"{guard.name} lists the same objects again and again")
            if objects and not part & part - 1:
                remembered, again = objects[0][0], 0
            yield objects
            if len(objects) < AT_ONCE:
                return
            if clock() > latest:
                left = f"{removed.objects} objects were deleted, and what it lists behind them is left"
                raise BackendError(f"{guard.name} still lists objects after {_CLEARED_SECONDS:.0f} s: {left}")
    finally:
        await guard.close_listing(listing)
