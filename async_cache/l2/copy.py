"""Copies what one backend holds, and others lack, to them: what `async-cache copy` and draining a backend do.

A copy can be broken off at any time and begun anew: what is there is left out. Every object is verified as it is
loaded, and decoded where it was encoded; a few are in memory at a time, however many there are.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from itertools import accumulate, compress
from mmap import mmap
from typing import Any

from msgspec.structs import asdict

from async_cache.config import CacheConfig
from async_cache.errors import BackendError
from async_cache.l2.backend import Backend, LoadOutcome
from async_cache.l2.guard import Call, Guard, Listing
from async_cache.l2.guard.guards import held_by
from async_cache.l2.opening import open_all
from async_cache.l2.tombstones import Tombstones
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.objects import PAGE_BYTES
from async_cache.values import BackendState, Copied

_LISTED = 256  # objects that are asked for at a time
_BATCH_BYTES = 32 * 2**20  # of what is listed, loaded at a time, unless one object is larger
_ROOM_BYTES = 2 * _BATCH_BYTES  # in a buffer: what is encoded is listed as shorter than it is
_WORKERS = 2  # one loads while another one stores

Objects = list[tuple[ObjectKey, int]]
"""Keys, each with the size of its object in bytes."""
Arrived = Callable[[Guard, Collection[bytes]], Awaitable[None]]
"""Hears of the chunks of which objects were stored in a backend."""
Stages = Sequence[Sequence[Guard]]
"""To whom objects go: to all of the first stage, and what none of these has stored, to the next."""


async def copy_all(
    source: Backend,
    target: Backend,
    config: CacheConfig | None = None,
    told: Callable[[Copied], None] = lambda copied: None,
) -> Copied:
    """Open two backends, copy what the second one lacks, and close them.

    `told` hears now and then how far it is; `config` has the limits of those that have none of their own. Raises
    BackendError where one cannot be opened, the source cannot be listed, or one is left alone after failures.
    """
    config = config if config is not None else CacheConfig(l2=[])
    await open_all([source, target], config)
    guards = [Guard.of(backend, config) for backend in (source, target)]
    try:
        of, to = guards
        return await Copy(of, lambda: [to], lambda: [[to]], Tombstones(), told).run()
    finally:
        for guard in guards:
            await guard.close(config.close_timeout_seconds)


class Copy:
    """One copying of all objects of `source` that none of `others` holds, to where `stages` says at the time.

    What gets a tombstone meanwhile is not stored.
    """

    def __init__(
        self,
        source: Guard,
        others: Callable[[], Sequence[Guard]],
        stages: Callable[[], Stages],
        tombstones: Tombstones,
        told: Callable[[Copied], None] = lambda copied: None,
        arrived: Arrived | None = None,
    ):
        self.copied = Copied()
        """How far it is."""
        self._source = source
        self._others = others
        self._stages = stages
        self._tombstones = tombstones
        self._told = told
        self._arrived = arrived
        self._listing: Listing = []
        self._listed = False
        self._turn = asyncio.Lock()  # of the listing

    async def run(self) -> Copied:
        """Look at all objects, and copy what is to be copied. What fails of single objects is counted.

        Raises BackendError where the source cannot be listed, or one side is left alone after failures.
        """
        with self._source.kept():
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(_WORKERS):
                        workers.create_task(self._work())
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            finally:
                await self._source.close_listing(self._listing)
        return self.copied

    async def _work(self) -> None:
        buffer = _Buffer()
        while objects := await self._next():
            for batch in _batches(await self._missing(objects)):
                with self._tombstones.watch() as removed:
                    await self._store(await self._load(batch, buffer), buffer, removed)

    async def _next(self) -> Objects:
        async with self._turn:
            if self._listed:
                return []
            objects = await self._source.next_keys(self._listing, _LISTED)
            self._listed = len(objects) < _LISTED
        self._count(found=len(objects))
        return objects

    async def _missing(self, objects: Objects) -> Objects:
        """Those that none of the others holds, as far as they can say."""
        held = await held_by(self._others(), [key for key, _ in objects])
        self._count(present=len(held))
        return [(key, size) for key, size in objects if key not in held]

    async def _load(self, batch: Objects, buffer: "_Buffer") -> dict[ObjectKey, memoryview]:
        """Those that can be loaded, in the buffer."""
        source, keys = self._source, [key for key, _ in batch]
        found = await source.lookup(keys)
        if found is None:
            raise BackendError(f"{source.name} does not say what it holds")
        sizes = {key: size for (key, size), there in zip(batch, found, strict=True) if there}
        try:
            outcomes = await self._outcomes(sizes, buffer) if sizes else []
        finally:
            source.unpin(list(sizes))
        self._count(
            gone=len(batch) - len(sizes) + outcomes.count(LoadOutcome.GONE),
            corrupt=outcomes.count(LoadOutcome.CORRUPT),
            failed=outcomes.count(LoadOutcome.FAILED),
        )
        return {key: loaded for key, loaded in zip(sizes, outcomes, strict=True) if isinstance(loaded, memoryview)}

    async def _outcomes(self, sizes: Mapping[ObjectKey, int], buffer: "_Buffer") -> list[memoryview | LoadOutcome]:
        buffer.begin()
        call = self._source.begin_load_listed(list(sizes), list(sizes.values()), buffer.room)
        try:
            if call is not None:
                return await call.result()
        except BackendError:
            if self._source.allows():
                return [LoadOutcome.FAILED] * len(sizes)
        finally:
            buffer.leave_to(call)
        raise BackendError(f"{self._source.name} is left alone after failures")

    async def _store(self, left: dict[ObjectKey, memoryview], buffer: "_Buffer", removed: Tombstones) -> None:
        stages = self._stages()
        for stage in stages:
            for key in [key for key in left if key.chunk_hash in removed]:
                del left[key]
                self._count(gone=1)
            if not left:
                return
            keys, views = list(left), list(left.values())
            staying = [guard for guard in stage if guard.state is BackendState.ACTIVE]  # since the first stage began
            begun = [
                (guard, guard.begin_store(keys, views)) for guard in staying
            ]  # in this step: a deletion waits for them
            calls = [(guard, call) for guard, call in begun if call is not None]
            answers = await asyncio.gather(*(_stored(call, buffer) for _, call in calls))
            for (guard, _), stored in zip(calls, answers, strict=True):
                new = list(compress(keys, stored))
                for key in new:
                    if key in left:
                        self._count(copied=1, copied_bytes=len(left.pop(key)))
                if new and self._arrived is not None:
                    await self._arrived(guard, {key.chunk_hash for key in new})
        self._count(failed=len(left))
        takers = [guard for stage in stages for guard in stage]
        if left and takers and not any(guard.allows() for guard in takers):
            raise BackendError(f"{' and '.join(guard.name for guard in takers)} cannot be written to")

    def _count(self, **more: int) -> None:
        before = asdict(self.copied)
        self.copied = Copied(**before | {name: before[name] + count for name, count in more.items()})
        self._told(self.copied)


async def _stored(call: Call[list[bool]], buffer: "_Buffer") -> list[bool]:
    """Which objects a call has stored; none where it failed."""
    try:
        return await call.result()
    except BackendError:
        return []
    finally:
        buffer.leave_to(call)


class _Buffer:
    """Memory for the objects of a batch, used again for the next one unless a call may still touch it."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")
        self._used = 0

    def begin(self) -> None:
        """From now on, nobody needs what it has given."""
        self._used = 0

    def room(self, sizes: Sequence[int]) -> list[memoryview]:
        """Room for objects of these sizes in bytes, each from the beginning of a page on. Raises OSError."""
        ends = list(accumulate((-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes), initial=self._used))
        memory = self._memory
        if ends[-1] > len(memory):
            memory = memoryview(mmap(-1, max(ends[-1], _ROOM_BYTES)))  # pages that nobody touches cost nothing
            if not self._memory:
                self._memory = memory
        if memory is self._memory:
            self._used = ends[-1]
        return [memory[begin : begin + size] for begin, size in zip(ends, sizes, strict=False)]

    def leave_to(self, call: Call[Any] | None) -> None:
        """Cancel a call that has not ended, and leave the memory to it."""
        if call is not None and not call.has_ended:
            call.cancel()
            self._memory = memoryview(b"")


def _batches(objects: Objects) -> Iterator[Objects]:
    """Objects of BATCH_BYTES together; one that is larger has a batch of its own."""
    batch: Objects = []
    size_bytes = 0
    for key, size in objects:
        if batch and size_bytes + size > _BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
        batch.append((key, size))
        size_bytes += size
    if batch:
        yield batch
