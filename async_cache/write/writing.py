"""The writers of an embedded cache: reserve -> commit | discard."""

import asyncio
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial

from async_cache.aio.sweeper import Sweeper
from async_cache.config import CacheConfig
from async_cache.errors import CacheClosedError
from async_cache.handles.writer import Block, Opened, WriteChunk, Writer
from async_cache.l1.entry import Entry, Reservation
from async_cache.l1.store import L1Store
from async_cache.ledger.roots import Roots
from async_cache.prompt.layout import ModelLayout, Prompt, check_index
from async_cache.values import Shortfall
from async_cache.write.writeback import Writeback


class OpenWriter:
    """What an open writer has reserved, and for what."""

    __slots__ = ("expired", "indices", "prompt", "rank", "reservations", "writer")

    def __init__(
        self,
        writer: Writer,
        prompt: Prompt,
        rank: int,
        indices: Sequence[int],
        reservations: Sequence[Reservation],
        expired: Callable[[], None] | None,
    ):
        self.writer: Writer | None = writer  # until it is closed: a cycle would wait for a garbage collection
        self.prompt, self.rank = prompt, rank
        self.indices, self.reservations = indices, reservations  # by position
        self.expired = expired


class Writing:
    """All writers that are open: what they reserve, publish and leave, and the time after which they expire."""

    def __init__(
        self, l1: L1Store, writeback: Writeback, sweeper: Sweeper, config: CacheConfig, roots: Roots | None = None
    ):
        self.filling: Counter[bytes] = Counter()
        """Chunks for which a writer has room, and how many rooms: they are about to be committed."""
        self._roots = roots if roots is not None else Roots()
        self._l1 = l1
        self._writeback = writeback
        self._loop = asyncio.get_running_loop()
        self._open = sweeper.expiry(config.reservation_ttl_seconds, self._expire)
        self._unseen: deque[Reservation] = deque()  # rooms whose last view has gone, in whatever thread
        self._woken = False  # a `reclaim` is on its way

    @property
    def swept(self) -> int:
        """How many writers have expired."""
        return self._open.swept

    def writer(
        self,
        prompt: Prompt,
        rank: int,
        start_chunk: int,
        expired: Callable[[], None] | None = None,
        *,
        most: int | None = None,
    ) -> Writer:
        """A writer of a rank's chunks from `start_chunk` on, which reserves when it is entered; `most` if given.

        `expired` is called when it was closed because it was idle, or with the cache. Raises ValueError for a rank or
        a chunk that the prompt does not have.
        """
        check_index("rank", rank, prompt.layout.world_size)
        check_index("start_chunk", start_chunk, len(prompt) + 1)
        return Writer(partial(self._reserve, prompt, rank, start_chunk, expired, most))

    def close(self) -> None:
        """Close all writers that are open."""
        for writer in list(self._open):
            self._expire(writer)

    def reclaim(self) -> None:
        """Free the rooms that were in quarantine and that nobody sees any more: in the loop's thread only."""
        self._woken = False
        while self._unseen:
            self._l1.discard((self._unseen.popleft(),))

    async def _reserve(
        self,
        prompt: Prompt,
        rank: int,
        start_chunk: int,
        expired: Callable[[], None] | None,
        most: int | None,
        writer: Writer,
    ) -> Opened:
        if not prompt.hashed:
            await asyncio.to_thread(prompt.hash)
        if self._l1.closed:
            raise CacheClosedError("the cache was closed")
        self.reclaim()
        layout, hashes = prompt.layout, prompt.chunk_hashes
        mask = layout.objects.rank_masks[rank]
        find = self._l1.find
        missing = [
            index
            for index in range(start_chunk, len(hashes) if mask else 0)
            if (entry := find(hashes[index])) is None or mask & ~entry.present
        ]
        found = list(map(find, hashes))
        resident = [entry for entry in found if entry is not None]
        made = self._reserve_beside(resident, layout, [(hashes[index], rank) for index in missing[:most]], prompt.salt)
        for index, entry in enumerate(found):
            if entry is not None and entry.dropped:  # whoever stores a prompt again wants it in L2
                self._writeback.enqueue(entry, hashes, index)
        shortfall = Shortfall.MEMORY if len(made) < len(missing) else None
        self.filling.update([reservation.chunk_hash for reservation in made])
        self._roots.note(prompt)
        opened = OpenWriter(writer, prompt, rank, missing, made, expired)
        self._open.add(opened)
        chunks = tuple(
            WriteChunk(index, reservation.offset, layout, rank)
            for index, reservation in zip(missing, made, strict=False)
        )
        lend, commit = partial(self._lend, opened), partial(self._commit, opened)
        return Opened(chunks, shortfall, lend, commit, partial(self._close, opened), _settled)

    def _reserve_beside(
        self, resident: Sequence[Entry], layout: ModelLayout, blocks: Sequence[tuple[bytes, int]], owner: str
    ) -> list[Reservation]:
        """Reserve room for the tail of a prompt, and take none from its own head while there is any other.

        Of a prompt that is longer than L1, only what is written back makes room for what follows.
        """
        l1 = self._l1
        l1.lease(resident)
        made = l1.reserve(layout, blocks, owner)
        l1.release(reversed(resident))
        if len(made) < len(blocks) and self._writeback.stores:
            unwritten = [entry for entry in resident if entry.unwritten or entry.dropped]
            l1.lease(unwritten)
            made += l1.reserve(layout, blocks[len(made) :], owner)
            l1.release(reversed(unwritten))
        return made

    def _lend(self, opened: OpenWriter, position: int) -> Block:
        """The memory of a chunk, to make views of."""
        size_bytes = opened.prompt.layout.objects.block_bytes[opened.rank]
        return self._l1.arena.export(opened.reservations[position].offset, size_bytes)

    def _commit(self, opened: OpenWriter, position: int) -> None:
        index, prompt = opened.indices[position], opened.prompt
        mask = prompt.layout.objects.rank_masks[opened.rank]
        hashes = prompt.chunk_hashes
        before = hashes[index - 1] if index else None
        self._filled(hashes[index])
        self._writeback.enqueue(self._l1.commit(opened.reservations[position], mask, before), hashes, index)
        self._open.add(opened)

    def _filled(self, chunk_hash: bytes) -> None:
        """One room less is to be filled of a chunk."""
        left = self.filling.pop(chunk_hash, 0) - 1
        if left > 0:
            self.filling[chunk_hash] = left

    def _close(self, opened: OpenWriter, uncommitted: list[tuple[int, Block | None]]) -> None:
        """Give back the rooms that were not committed; in quarantine goes what somebody still sees."""
        self._open.discard(opened)
        opened.writer = None
        self._woken = True  # `reclaim` follows
        free = []
        while uncommitted:  # taken out one by one: no block is kept from being gone
            position, block = uncommitted.pop()
            reservation = opened.reservations[position]
            self._filled(reservation.chunk_hash)
            if block is None:
                free.append(reservation)
            else:
                self._l1.quarantine(reservation)
                weakref.finalize(block, self._unseen_now, reservation).atexit = False
            block = None
        self._l1.discard(free)
        self.reclaim()

    def _unseen_now(self, reservation: Reservation) -> None:
        """The last view of a room has gone: wherever that was, only the loop's thread may change L1.

        It may have been in another thread, or in a garbage collection in the middle of a change of L1.
        """
        self._unseen.append(reservation)
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self.reclaim)
            except RuntimeError:  # the loop is closed, and L1 with it
                return

    def _expire(self, opened: OpenWriter) -> None:
        if opened.writer is not None:  # else another one's `expired` closed it
            opened.writer.expire()
            if opened.expired is not None:
                opened.expired()

    def __repr__(self) -> str:
        return f"<Writing, {len(self._open)} open>"


async def _settled() -> None:
    """What was committed in L1 can be found at once."""
