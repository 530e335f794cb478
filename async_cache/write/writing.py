"""The writers of an embedded cache: reserve -> commit | discard."""

import asyncio
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress

from async_cache.aio.backlog import Backlog
from async_cache.aio.slices import InTurns, turn
from async_cache.aio.sweeper import Sweeper
from async_cache.aio.worker import Worker
from async_cache.config import CacheConfig
from async_cache.errors import CacheClosedError, LimitError
from async_cache.handles.writer import Block, Life, Opened, WriteChunk, Writer
from async_cache.l1.entry import Entry, Reservation
from async_cache.l1.store import L1Store
from async_cache.ledger.roots import Roots
from async_cache.prompt.layout import Prompt, check_index
from async_cache.read.filling import Filling
from async_cache.values import Shortfall
from async_cache.write.writeback import Writeback

_AT_ONCE = 4096  # chunks that are looked at in a millisecond or two; then the loop has its turn
_RESERVED_AT_ONCE = 1024  # where others may have to be evicted for them
_ENQUEUED_AT_ONCE = 512
_DISCARDED_AT_ONCE = 1024


class OpenWriter:
    """What an open writer has reserved, and for what."""

    __slots__ = ("expired", "indices", "left", "prompt", "rank", "reservations", "writer")

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
        self.left = bytearray(b"\1") * len(reservations)  # 1 for each that was not committed
        self.expired = expired


class Writing:
    """All writers that are open: what they reserve, publish and leave, and the time after which they expire."""

    def __init__(
        self,
        l1: L1Store,
        writeback: Writeback,
        sweeper: Sweeper,
        hashing: Worker,
        config: CacheConfig,
        roots: Roots | None = None,
        filling: Filling | None = None,
    ):
        self._filling = filling if filling is not None else Filling()
        self._roots = roots if roots is not None else Roots()
        self._l1 = l1
        self._discarding = Backlog(_DISCARDED_AT_ONCE)
        l1.rooms.add_backlog(self._discarding)
        self._writeback = writeback
        self._hashing = hashing
        self._loop = asyncio.get_running_loop()
        self._open = sweeper.expiry(config.reservation_ttl_seconds, self._expire)
        self._unseen: deque[Reservation] = deque()  # rooms whose last view has gone, in whatever thread
        self._woken = False  # a `reclaim` is on its way

    def reconfigure(self, config: CacheConfig) -> None:
        """Let writers be idle for as long as the settings say now."""
        self._open.live_for(config.reservation_ttl_seconds)

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
        self._discarding.do_all()

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
        self._check_open()
        if not prompt.hashed:
            await self._hashing.run(prompt.hash)
            self._check_open()
        self.reclaim()
        missing: list[int] = []
        resident: list[Entry] = []  # leased meanwhile
        made: list[Reservation] = []
        chunks: list[WriteChunk] = []
        life = Life()
        try:
            dropped = await self._look_up(prompt, rank, start_chunk, missing, resident)
            await self._make_room(prompt, rank, missing[:most], resident, made)
            async for positions in InTurns(range(len(made)), _AT_ONCE):
                self._check_open()
                chunks += [WriteChunk(missing[n], made[n].offset, prompt.layout, rank, n, life) for n in positions]
                self._filling.begun([made[n].chunk_hash for n in positions])
            async for some in InTurns(dropped, _ENQUEUED_AT_ONCE):
                self._check_open()
                for entry, index in some:
                    if entry.dropped and not entry.detached:  # whoever stores a prompt again wants it in L2
                        self._writeback.enqueue(entry, prompt.chunk_hashes, index)
        except BaseException:
            self._discarding.do(self._discard, made[: len(chunks)])
            self._l1.discard_soon(made[len(chunks) :])
            raise
        finally:
            self._l1.release_soon(resident[::-1])
        if missing and not made and (over := self._l1.rooms.over_quota(prompt, rank)) is not None:
            raise LimitError(over)
        shortfall = Shortfall.MEMORY if len(made) < len(missing) else None
        self._roots.note(prompt)
        opened = OpenWriter(writer, prompt, rank, missing, made, expired)
        self._open.add(opened)
        lend, commit = partial(self._lend, opened), partial(self._commit, opened)
        return Opened(tuple(chunks), life, shortfall, lend, commit, partial(self._close, opened), _settled)

    def _check_open(self) -> None:
        if self._l1.closed:
            raise CacheClosedError("the cache was closed")

    async def _look_up(
        self, prompt: Prompt, rank: int, start_chunk: int, missing: list[int], resident: list[Entry]
    ) -> list[tuple[Entry, int]]:
        """Add the chunks that L1 lacks of a rank to `missing`, and lease to `resident` what it has of a prompt.

        Returns what of that some backend has dropped, and which chunk it is.
        """
        dropped: list[tuple[Entry, int]] = []
        hashes, mask = prompt.chunk_hashes, prompt.layout.objects.rank_masks[rank]
        begin = 0
        async for some in InTurns(hashes, _AT_ONCE):
            self._check_open()
            found = list(map(self._l1.find, some))
            there = [entry for entry in found if entry is not None]
            self._l1.uses.lease(there)
            resident += there
            missing += [
                index
                for index, entry in enumerate(found, begin)
                if index >= start_chunk and mask & ~(entry.present if entry is not None else 0)
            ]
            dropped += [(entry, n) for n, entry in enumerate(found, begin) if entry is not None and entry.dropped]
            begin += len(some)
        return dropped

    async def _make_room(
        self, prompt: Prompt, rank: int, missing: Sequence[int], resident: list[Entry], made: list[Reservation]
    ) -> None:
        """Reserve room for the tail of a prompt, and take none from its own head while there is any other.

        Of a prompt that is longer than L1, only what is written back makes room for what follows.
        """
        l1, hashes, beside_all = self._l1, prompt.chunk_hashes, True
        while len(made) < len(missing):
            part = missing[len(made) : len(made) + _RESERVED_AT_ONCE]
            some = l1.reserve(prompt.layout, [(hashes[index], rank) for index in part], prompt.salt, prompt.adapter)
            made += some
            if len(some) == len(part):
                if len(made) < len(missing):
                    await turn()
                    self._check_open()
            elif beside_all and self._writeback.stores:
                beside_all = False
                unwritten = [entry for entry in resident if entry.unwritten or entry.dropped]
                l1.lease(unwritten)
                l1.release_soon(resident[::-1])
                resident[:] = unwritten
            else:
                break

    def _lend(self, opened: OpenWriter, position: int) -> Block:
        """The memory of a chunk, to make views of."""
        size_bytes = opened.prompt.layout.objects.block_bytes[opened.rank]
        return self._l1.arena.export(opened.reservations[position].offset, size_bytes)

    def _commit(self, opened: OpenWriter, position: int) -> None:
        index, prompt = opened.indices[position], opened.prompt
        mask = prompt.layout.objects.rank_masks[opened.rank]
        hashes = prompt.chunk_hashes
        before = hashes[index - 1] if index else None
        opened.left[position] = 0
        self._filling.ended(hashes[index])
        self._writeback.enqueue(self._l1.commit(opened.reservations[position], mask, before), hashes, index)
        self._open.add(opened)

    def _close(self, opened: OpenWriter, lent: list[tuple[int, Block]]) -> None:
        """Give back the rooms that were not committed; in quarantine goes what somebody still sees."""
        self._open.discard(opened)
        opened.writer = None
        self._woken = True  # `reclaim` follows
        rooms = opened.reservations
        while lent:  # taken out one by one: no block is kept from being gone
            position, block = lent.pop()
            reservation, opened.left[position] = rooms[position], 0
            self._filling.ended(reservation.chunk_hash)
            self._l1.quarantine(reservation)
            weakref.finalize(block, self._unseen_now, reservation).atexit = False
            del block
        self._discarding.do(self._discard, list(compress(rooms, opened.left)))
        self.reclaim()

    def _discard(self, rooms: Sequence[Reservation]) -> None:
        for room in rooms:
            self._filling.ended(room.chunk_hash)
        self._l1.discard(rooms)

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
