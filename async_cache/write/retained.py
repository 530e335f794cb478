"""Retention: prompts that are kept until a time that somebody named, in every tier that can promise that.

What is decided for some chunks is decided in one step of the loop: they are there, and kept from then on. What is kept
in a backend is noted there, so that it is kept after a restart as well.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from operator import attrgetter

import msgspec

from async_cache.aio.backlog import Backlog
from async_cache.aio.slices import InTurns, turn
from async_cache.aio.sweeper import Sweeper
from async_cache.aio.worker import Worker
from async_cache.config import CacheConfig
from async_cache.errors import BackendError, CacheClosedError
from async_cache.l1.store import L1Store
from async_cache.l2.guard import Guard
from async_cache.l2.guard.guards import Guards, ask_all, held_by
from async_cache.prompt import coverage
from async_cache.prompt.arguments import MOST_SECONDS
from async_cache.prompt.layout import Prompt
from async_cache.retention.allowance import Allowance
from async_cache.values import Clipped, Retained
from async_cache.write.carrier import Carrier
from async_cache.write.retention import Note, Retention, Tier

log = logging.getLogger(__name__)

MOST = 1024
"""Retentions of one owner at a time."""
_AT_ONCE = 256  # chunks in a step of the loop: a millisecond or two
_expires_at = attrgetter("expires_at")
_TRIES = 8  # to keep chunks while others are removed
_HASH_BYTES = 32
_AGAIN_SECONDS = 1.0  # after which a backend that did not tell its notes is asked again; each time twice as long
_MOST_AGAIN_SECONDS = 60.0


class Retentions:
    """All that is retained, until it expires, is ended, or is removed."""

    def __init__(
        self,
        l1: L1Store,
        guards: Guards,
        sweeper: Sweeper,
        hashing: Worker,
        config: CacheConfig,
        wall: Callable[[], float] = time.time,
    ):
        self._l1 = l1
        self._guards = guards
        self._hashing = hashing
        self._share = config.retain_share
        self._wall = wall
        self._clock = asyncio.get_running_loop().time
        self._deadlines = sweeper.deadlines(self._expire)
        self._by_name: dict[str, Retention] = {}
        self._count: Counter[str] = Counter()  # by owner
        self._being_held: set[Retention] = set()  # not decided yet
        self._changes = 0  # of what may be kept: chunks were removed, or a backend has come or gone
        self._carrier = Carrier()
        self._backlog = Backlog(_AT_ONCE)
        l1_allowance = Allowance(lambda: l1.arena.size_bytes, self._share)
        self._l1_tier = Tier(l1_allowance, self._keep_in_l1, self._let_go_in_l1)
        self._tiers: dict[Guard, Tier] = {}
        for guard in guards.current:
            self._join(guard)

    def __iter__(self) -> Iterator[Retention]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def reconfigure(self, config: CacheConfig) -> None:
        """Let each owner keep the share of a tier that the settings say now; what is kept stays."""
        self._share = config.retain_share
        for tier in (self._l1_tier, *self._tiers.values()):
            tier.allowance.owner_share = self._share

    # What is asked.

    async def retain(self, prompt: Prompt, tokens: int | None, ttl_seconds: float) -> Retained:
        """Keep what is there of the head of a prompt, and say how much that is. A second call changes the first.

        It is carried to its end, also where its caller is cancelled.
        """
        if not prompt.hashed:
            await self._hashing.run(prompt.hash)
            if self._l1.closed:
                raise CacheClosedError("the cache was closed")
        asked = prompt.tokens if tokens is None else tokens
        return await self._carrier.carry_out(self._retain(prompt, asked // prompt.layout.chunk_tokens, ttl_seconds))

    async def retained(self, is_mine: Callable[[str], bool] = lambda owner: True) -> list[Retained]:
        """What is retained of those owners, the first to expire first."""
        await turn()  # also the first slice: many may ask at once
        mine: list[Retention] = []
        async for part in InTurns(list(self._by_name.values()), _AT_ONCE):
            mine += [retention for retention in part if is_mine(retention.owner)]
        mine.sort(key=_expires_at)
        told: list[Retained] = []
        async for part in InTurns(mine, _AT_ONCE):
            told += map(self._told, part)
        return told

    def _told(self, of: Retention) -> Retained:
        left = max(of.expires_at - self._clock(), 0.0) if of.chunks else 0.0
        names = of.model, of.revision, of.adapter, of.owner
        return Retained(of.chunks * of.chunk_tokens, of.chunks, left, of.clipped, *names)

    async def _retain(self, prompt: Prompt, chunks: int, ttl_seconds: float) -> Retained:
        layout, owner = prompt.layout, prompt.salt
        hashes = prompt.chunk_hashes[:chunks]
        name = prompt.chunk_hashes[-1].hex() if prompt.chunk_hashes else ""
        retention = Retention(
            name,
            owner,
            layout.model,
            layout.revision,
            prompt.adapter,
            layout.chunk_tokens,
            0,
            Clipped.NOT_STORED,
            self._clock() + ttl_seconds,
            {},
            {},
        )
        before = self._by_name.get(name)
        if not ttl_seconds:
            retention.clipped = None
        elif before is None and self._count[owner] >= MOST:
            retention.clipped = Clipped.QUOTA
        elif hashes:
            self._being_held.add(retention)
            try:
                await self._hold_unchanged(retention, prompt, hashes)
            finally:
                self._being_held.discard(retention)
        tiers = set(retention.held)
        if (before := self._by_name.pop(name, None)) is not None:  # it may have come or gone meanwhile
            tiers.update(before.held)
            self._end(before)
        if retention.chunks:
            self._by_name[name] = retention
            self._count[owner] += 1
            self._deadlines.set(retention, retention.expires_at)
        await self._note(name, tiers)
        return self._told(retention)

    async def _hold_unchanged(self, retention: Retention, prompt: Prompt, hashes: Sequence[bytes]) -> None:
        """Keep what is there, and begin anew where some of it may have been removed, or a backend come or gone."""
        for _ in range(_TRIES):
            changes = self._changes
            await self._hold(retention, prompt, hashes)
            if changes == self._changes:
                return
            self._release(retention, 0)
            retention.chunks, retention.clipped = 0, Clipped.NOT_STORED

    async def _hold(self, retention: Retention, prompt: Prompt, hashes: Sequence[bytes]) -> None:
        """Keep what is there of these chunks, from the head on, as far as there is room, and say how much that is."""
        layout, guards, tiers = prompt.layout, list(self._tiers), [self._l1_tier, *self._tiers.values()]
        objects, full = layout.objects, layout.objects.full_mask
        retention.chunk_bytes |= {tier: tier.chunk_bytes(layout) for tier in tiers}
        refused: dict[Tier, Clipped] = {}
        held: list[int] = []  # by chunk, the objects that some tier has, and keeps
        stored: list[int] = []  # those that are there
        why: list[Clipped] = []
        try:
            async for part in InTurns(hashes, max(1, _AT_ONCE // full.bit_count())):
                there = await self._find(prompt, part, guards)
                try:
                    kept, all_there = self._take_each(retention, tiers, part, [self._in_l1(part), *there], refused)
                finally:
                    for guard, masks in zip(guards, there, strict=True):
                        guard.unpin(objects.keys([(h, mask) for h, mask in zip(part, masks, strict=True) if mask]))
                held += kept
                stored += all_there
                reasons = set(refused.values())
                why += [Clipped.QUOTA if Clipped.QUOTA in reasons else Clipped.MEMORY] * len(part)
                if not all(kept):
                    break
            retention.chunks = length = coverage.lengths(layout, held)[-1]
        except BaseException:
            self._release(retention, 0)
            raise
        retention.clipped = None
        if length < len(hashes):
            is_there = coverage.lengths(layout, stored)[-1] > length
            if is_there:
                retention.clipped = why[length]
            else:
                promised_nowhere = await self._is_elsewhere(prompt, hashes[length])
                retention.clipped = Clipped.MEMORY if promised_nowhere else Clipped.NOT_STORED
        self._release(retention, length, set(hashes[length : len(held)]))

    def _take_each(
        self,
        retention: Retention,
        tiers: Sequence[Tier],
        hashes: Sequence[bytes],
        there: Sequence[Sequence[int]],
        refused: dict[Tier, Clipped],
    ) -> tuple[list[int], list[int]]:
        """Keep these chunks in each tier that has some of them; by chunk, the objects that are kept, and all."""
        kept, all_there = [0] * len(hashes), [0] * len(hashes)
        for tier, masks in zip(tiers, there, strict=True):
            some = [h for h, mask in zip(hashes, masks, strict=True) if mask] if tier.guard is None else hashes
            taken = self._take(retention, tier, some) if tier not in refused else 0
            if taken < len(some):
                refused.setdefault(tier, tier.allowance.room(retention.owner)[1])
            mine = set(some[:taken])
            for n, mask in enumerate(masks):
                all_there[n] |= mask
                kept[n] |= mask if hashes[n] in mine else 0
        return kept, all_there

    async def _find(self, prompt: Prompt, hashes: Sequence[bytes], guards: Sequence[Guard]) -> list[list[int]]:
        """By backend, the objects of each chunk that it has, and has pinned."""
        objects = prompt.layout.objects
        keys = objects.keys([(chunk_hash, objects.full_mask) for chunk_hash in hashes])
        members = objects.members[objects.full_mask]
        answers = await ask_all(guards, keys, prompt.salt)
        return [
            [
                sum(
                    1 << objects.bit(*which)
                    for which, there in zip(members, found[n * len(members) : (n + 1) * len(members)], strict=True)
                    if there
                )
                for n in range(len(hashes))
            ]
            if found is not None
            else [0] * len(hashes)
            for found in answers
        ]

    async def _is_elsewhere(self, prompt: Prompt, chunk_hash: bytes) -> bool:
        """Whether a backend that can promise nothing has some of a chunk."""
        others = [guard for guard in self._guards.current if guard not in self._tiers]
        objects = prompt.layout.objects
        return bool(await held_by(others, objects.keys([(chunk_hash, objects.full_mask)])))

    def _in_l1(self, hashes: Sequence[bytes]) -> list[int]:
        return [entry.present if (entry := self._l1.find(chunk_hash)) is not None else 0 for chunk_hash in hashes]

    # Keeping, and letting go.

    def _take(self, retention: Retention, tier: Tier, hashes: Sequence[bytes], *, must: bool = False) -> int:
        taken = tier.allowance.take(retention.owner, hashes, retention.chunk_bytes[tier], must=must)
        if taken:
            tier.keep(hashes[:taken])
            retention.held.setdefault(tier, []).extend(hashes[:taken])
        return taken

    def _release(self, retention: Retention, chunks: int, beyond: Collection[bytes] = ()) -> None:
        """Keep only the first so many chunks of a retention; `beyond` are all the others, where there are some left.

        What a tier keeps is in the order of the prompt: the others are at its end.
        """
        for tier, hashes in list(retention.held.items()):
            left = len(hashes) if chunks else 0
            while left and hashes[left - 1] in beyond:
                left -= 1
            if left < len(hashes):
                self._backlog.do(partial(self._let_go, retention, tier), hashes[left:])
                retention.held[tier] = hashes[:left]
            if not left:
                del retention.held[tier]

    def _let_go(self, retention: Retention, tier: Tier, hashes: Sequence[bytes]) -> None:
        tier.let_go(tier.allowance.give(retention.owner, hashes, retention.chunk_bytes[tier]))

    def _end(self, retention: Retention) -> None:
        self._deadlines.discard(retention)
        self._count[retention.owner] -= 1
        self._release(retention, 0)

    def _expire(self, retention: Retention) -> None:
        self._note_soon(retention.name, self._forget(retention))

    def _forget(self, retention: Retention) -> set[Tier]:
        """End a retention; the tiers that are to be told."""
        tiers = set(retention.held)
        self._by_name.pop(retention.name, None)
        self._end(retention)
        return tiers

    def _keep_in_l1(self, hashes: Sequence[bytes]) -> None:
        for entry in filter(None, map(self._l1.find, hashes)):
            self._l1.uses.retain(entry)

    def _let_go_in_l1(self, hashes: Sequence[bytes]) -> None:
        for entry in filter(None, map(self._l1.find, hashes)):
            self._l1.uses.unretain(entry)

    async def removed(self, chunk_hashes: Sequence[bytes] | None) -> None:
        """End the retentions of chunks that somebody removed, or of all if None; no restart brings them back."""
        self._changes += 1
        for tier in self._tiers.values():
            if tier.unheard is not None:
                tier.unheard.add(chunk_hashes)
        gone = set(chunk_hashes) if chunk_hashes is not None else set()
        async for some in InTurns(list(self._by_name.values()), 32):
            ended = [
                retention
                for retention in some
                if self._by_name.get(retention.name) is retention
                and (chunk_hashes is None or any(not gone.isdisjoint(h) for h in retention.held.values()))
            ]
            told = [(retention.name, self._forget(retention)) for retention in ended]
            await asyncio.gather(*(self._note(*each) for each in told))

    # Backends come and go.

    def join(self, guard: Guard) -> None:
        """Keep in one backend more what is retained, as far as there is room."""
        tier = self._join(guard)
        if tier is not None:
            self._changes += 1
            for retention in self._by_name.values():
                retention.chunk_bytes[tier] = min(retention.chunk_bytes.values(), default=1)
                self._take(retention, tier, retention.hashes)
                self._note_soon(retention.name, {tier})
            self._carrier.begin(self._recover_from(guard, tier))

    def _join(self, guard: Guard) -> Tier | None:
        if not guard.backend.retains:
            return None
        allowance = Allowance(lambda: usage.capacity_bytes if (usage := guard.usage()) is not None else 0, self._share)
        tier = self._tiers[guard] = Tier(allowance, guard.retain, guard.unretain, guard)
        return tier

    def leave(self, guard: Guard) -> None:
        """Forget a backend that is about to be closed; what no other tier keeps is not retained any more."""
        tier = self._tiers.pop(guard, None)
        if tier is not None:
            self._changes += 1
            for retention in list(self._by_name.values()):
                if retention.held.pop(tier, None) and not retention.held:
                    self._expire(retention)

    async def recover(self) -> None:
        """Keep what the notes of the backends say. Of one that does not answer in time, that goes on behind it."""
        if self._tiers:
            tasks = {self._carrier.begin(self._recover_from(*item)): item[0] for item in self._tiers.items()}
            await asyncio.wait(tasks, timeout=max(guard.timeouts.lookup_seconds for guard in tasks.values()))

    async def _recover_from(self, guard: Guard, tier: Tier) -> None:
        """Keep what the notes of a backend say; where it does not tell them, later."""
        try:
            notes = await guard.notes()
        except BackendError as error:
            log.warning("what is retained in %s is not known yet: %s", guard.name, error)
            self._carrier.begin(self._recover_later(guard, tier))
        else:
            await self._recover_all(notes, guard, tier)

    async def _recover_later(self, guard: Guard, tier: Tier) -> None:
        """Ask a backend again for its notes, ever less often, until it tells them or has left."""
        seconds = _AGAIN_SECONDS
        while True:
            await asyncio.sleep(max(seconds, guard.breaker.retry_at - self._clock() if not guard.allows() else 0.0))
            if self._tiers.get(guard) is not tier:
                return None
            try:
                notes = await guard.notes()
            except BackendError:
                seconds = min(2 * seconds, _MOST_AGAIN_SECONDS)
            else:
                return await self._recover_all(notes, guard, tier)

    async def _recover_all(self, notes: dict[str, bytes], guard: Guard, tier: Tier) -> None:
        for name, note in notes.items():
            if self._tiers.get(guard) is not tier:
                return  # it has left
            if len(name) == 2 * _HASH_BYTES:  # else it is of something else
                self._recover(name, note, tier)
                await asyncio.sleep(0)
        tier.unheard = None

    def _recover(self, name: str, encoded: bytes, tier: Tier) -> None:
        try:
            note = msgspec.msgpack.decode(encoded, type=Note)
        except msgspec.DecodeError as error:
            log.warning("a note on what is retained cannot be read: %s", error)
            return
        left = min(note.noted_at + note.lives_seconds - self._wall(), note.lives_seconds)
        retention = self._by_name.get(name)
        data = note.hashes
        hashes = [data[at : at + _HASH_BYTES] for at in range(0, len(data), _HASH_BYTES)]
        was_removed = tier.unheard is not None and tier.unheard.has_any_of(hashes)
        if not 0 < left <= MOST_SECONDS or not hashes or was_removed:
            self._note_soon(name, {tier})
            return
        if retention is None:
            retention = self._by_name[name] = Retention(
                name,
                note.owner,
                note.model,
                note.revision,
                note.adapter,
                note.chunk_tokens,
                note.chunks,
                note.clipped,
                self._clock() + left,
                {},
                {},
            )
            self._count[note.owner] += 1
            self._deadlines.set(retention, retention.expires_at)
        if tier not in retention.held:
            retention.chunk_bytes[tier] = note.chunk_bytes
            self._take(retention, tier, hashes, must=True)  # it was promised

    # Notes.

    def _note_soon(self, name: str, tiers: Collection[Tier]) -> None:
        if any(tier.guard is not None for tier in tiers) and not self._l1.closed:
            self._carrier.begin(self._note(name, tiers))

    async def _note(self, name: str, tiers: Collection[Tier]) -> None:
        """Tell the backends of these tiers what is retained under a name by now."""
        await asyncio.gather(*(self._note_in(name, tier) for tier in tiers if tier.guard is not None))

    async def _note_in(self, name: str, tier: Tier) -> None:
        assert tier.guard is not None
        async with tier.noting:  # in the order in which it changes
            retention = self._by_name.get(name)
            hashes = retention.held.get(tier) if retention is not None else None
            note = msgspec.msgpack.encode(self._encoded(retention, tier, hashes)) if retention and hashes else None
            try:
                await tier.guard.keep_note(name, note)
            except BackendError as error:
                log.warning("what is retained in %s is not known there after a restart: %s", tier.guard.name, error)

    def _encoded(self, of: Retention, tier: Tier, hashes: Sequence[bytes]) -> Note:
        names = of.owner, of.model, of.revision, of.adapter
        left = max(of.expires_at - self._clock(), 0.0)
        data = b"".join(hashes)
        sizes = of.chunk_tokens, of.chunk_bytes[tier], of.chunks
        return Note(1, *names, *sizes, of.clipped, self._wall(), left, data)

    async def close(self) -> None:
        """End what is under way. What is noted stays so, and is kept by whoever opens the backends next."""
        await self._carrier.close()
        self._backlog.do_all()

    def check_integrity(self) -> None:
        """Assert that the tiers keep what retentions hold of them, and nothing else."""
        self._backlog.do_all()
        for tier in (self._l1_tier, *self._tiers.values()):
            held = Counter(h for retention in (*self, *self._being_held) for h in retention.held.get(tier, ()))
            assert len(tier.allowance) == len(held)
            assert sum(tier.allowance.kept_bytes.values()) >= 0
        assert sum(self._count.values()) == len(self)
