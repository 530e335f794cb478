"""Asks all backends side by side which objects they hold, and keeps the pins of what was found."""

import asyncio
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, compress
from types import TracebackType
from typing import Self, overload

from async_cache.errors import BackendError
from async_cache.l2.backend import LookupNowait
from async_cache.l2.guard import Guard
from async_cache.l2.guard.guards import unpin_answer
from async_cache.l2.tombstones import Tombstones
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import ModelLayout

_TOUCHED_AT_ONCE = 2048  # chunks, in a few milliseconds; then the loop has its turn
_MADE_AT_ONCE = 4096  # keys of objects, in a millisecond or two
_UNPINNED_AT_ONCE = 4096  # objects, or those of one chunk

Sources = Sequence[tuple[Guard, Mapping[int, int]]]
"""Where to load objects from: backends, with the objects by chunk number."""


class Asked:
    """What a lookup asks for: objects of chunks, as masks by the chunk's number among `hashes`."""

    def __init__(self, layout: ModelLayout, hashes: Sequence[bytes], masks: dict[int, int], owner: str = ""):
        self.owner = owner  # whose chunks they are
        self.layout = layout
        self.hashes = hashes
        self.masks = masks

    def keys(self) -> Sequence[ObjectKey]:
        """The key of each object that is asked for, in order; of very many, each is made when it is looked at."""
        if len(self.masks) <= self.layout.objects.chunks_with(_MADE_AT_ONCE):
            return self.keys_of(self.masks)
        return _ManyKeys(self)

    def keys_of(self, masks: Mapping[int, int]) -> list[ObjectKey]:
        """The keys of objects of these chunks, given as masks by number."""
        return self.layout.objects.keys([(self.hashes[number], mask) for number, mask in masks.items()])

    def found(self, answers: Sequence[bool]) -> dict[int, int]:
        """The objects that were found, by chunk number; there is an answer for each of the keys."""
        if all(answers):
            return dict(self.masks)
        bit, members = self.layout.objects.bit, self.layout.objects.members
        found: dict[int, int] = {}
        begin = 0
        for number, mask in self.masks.items():
            end = begin + mask.bit_count()
            some = answers[begin:end]
            begin = end
            if all(some):
                found[number] = mask
            else:
                found[number] = sum(1 << bit(*which) for which in compress(members[mask], some)) if any(some) else 0
        return found


class _ManyKeys(Sequence[ObjectKey]):
    """The keys of what is asked for: a slice of them is a list, and no more of them are there at a time."""

    def __init__(self, asked: Asked):
        self._keys_of = asked.keys_of
        self._masks = list(asked.masks.items())
        self._ends = list(accumulate(mask.bit_count() for _, mask in self._masks))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, which: int) -> ObjectKey: ...
    @overload
    def __getitem__(self, which: slice) -> list[ObjectKey]: ...
    def __getitem__(self, which: int | slice) -> ObjectKey | list[ObjectKey]:
        """A key, or those of a slice of some in a row."""
        if isinstance(which, int):
            return self[which : which + 1][0]
        begin, end, _ = which.indices(len(self))
        first, last = bisect_right(self._ends, begin), bisect_left(self._ends, end)
        before = self._ends[first - 1] if first else 0
        return self._keys_of(dict(self._masks[first : last + 1]))[begin - before : end - before]

    def __iter__(self) -> Iterator[ObjectKey]:
        for chunk in self._masks:
            yield from self._keys_of(dict((chunk,)))


class Found:
    """Objects that backends hold, pinned there. Leaving it by `with` unpins what nobody took."""

    def __init__(self, asked: Asked, holders: Sequence[tuple[Guard, dict[int, int]]], *, failed: bool = False):
        self.failed = failed  # a backend that might have held more could not be asked
        self.letting_go = 0  # holders of which very many objects are being unpinned, in slices
        self._asked = asked
        self._holders = holders  # the fastest first
        self._in_order_from = _in_order_from(asked.masks) if asked.masks else sys.maxsize
        self._has_heard = False  # whether the only backend has heard of what others stored, ...
        self._lookup: LookupNowait | None = None  # ... and what answers since then

    @property
    def numbers(self) -> Iterable[int]:
        """The chunks that were asked for."""
        return self._asked.masks

    def masks(self) -> dict[int, int]:
        """The objects that some backend holds, by chunk number."""
        if len(self._holders) == 1:
            return self._holders[0][1]
        merged: dict[int, int] = {}
        for _, masks in self._holders:
            for number, mask in masks.items():
                merged[number] = merged.get(number, 0) | mask
        return merged

    def mask_of(self, number: int) -> int:
        """The objects of a chunk that some backend holds, and that nobody took."""
        mask = 0
        for _, masks in self._holders:
            mask |= masks.get(number, 0)
        return mask

    def sources(self, wanted: Mapping[int, int]) -> Sources:
        """Where to load objects from: each from its fastest holder."""
        left = dict(wanted)
        sources = []
        for guard, masks in self._holders:
            if left == masks:
                part, left = left, {}
            else:
                part = {number: mask for number, lacks in left.items() if (mask := masks.get(number, 0) & lacks)}
                for number, mask in part.items():
                    left[number] &= ~mask
            sources.append((guard, part))
        return sources

    def take(self, sources: Sources) -> None:
        """Hand the pins of sources over to the caller."""
        for (_, masks), (_, part) in zip(self._holders, sources, strict=True):
            if part == masks:
                masks.clear()
            else:
                for number, mask in part.items():
                    left = masks.pop(number) & ~mask
                    if left:
                        masks[number] = left

    def ask_more(self, masks: Mapping[int, int]) -> Mapping[int, int] | None:
        """Ask for objects of more chunks, by number, what has them at hand: those that are there, by number.

        None, and nothing more is pinned, if asking for them takes time, or there are several to be asked.
        """
        if not (masks and self._holders):
            return {}
        if len(self._holders) > 1:
            return None
        guard, held = self._holders[0]
        there: dict[int, int] = {}
        for mask, numbers in alike(masks):
            present = guard.lookup_nowait(
                self._asked.layout, [self._asked.hashes[n] for n in numbers], mask, self._lookup
            )
            if present is None:
                guard.unpin(self._asked.keys_of(there))
                return None
            there |= dict.fromkeys(numbers if all(present) else compress(numbers, present), mask)
        held |= there
        if there:
            self._in_order_from = _in_order_from(masks)
        return there

    @property
    def follows(self) -> bool:
        """Whether what was not answered at once may be, after `hear`."""
        return not self._has_heard and len(self._holders) == 1 and self._holders[0][0].backend.follows

    async def hear(self) -> None:
        """Have the only backend hear of what others have stored. Where it fails, it counts as holding nothing."""
        self._has_heard = True
        try:
            self._lookup = await self._holders[0][0].lookup_later()
        except BackendError:
            self.let_go()
            self._holders, self.failed = (), True

    def touch_prefix(self, chunk_hashes: Sequence[bytes], start_chunk: int = 0) -> Iterator[None]:
        """What was found is used, and with it all that lies in front of it in a prompt, which L1 may have.

        `chunk_hashes` are those of the prompt; number 0 of what was asked for is its `start_chunk`. Of very many, each
        step touches some, the last ones first.
        """
        for guard, held in self._holders:
            last = max(compress(held, held.values()), default=None)
            end = start_chunk + min(last + 1, self._in_order_from) if last is not None else 0
            while end > 0:
                begin = max(0, end - _TOUCHED_AT_ONCE)
                guard.touch_prefix(chunk_hashes[begin:end])
                end = begin
                if end:
                    yield

    def leave_out(self, removed: Container[bytes], numbers: Iterable[int]) -> None:
        """Unpin what was found of those of these chunks that were removed meanwhile."""
        gone = [number for number in numbers if self._asked.hashes[number] in removed]
        for guard, masks in self._holders if gone else ():
            guard.unpin(self._asked.keys_of({number: masks.pop(number, 0) for number in gone}))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.let_go()

    def let_go(self) -> None:
        """Unpin what was not taken: of very many objects, in slices, between which the loop has its turn."""
        for guard, masks in self._holders:
            left = [(number, mask) for number, mask in masks.items() if mask]
            masks.clear()
            if left:
                self.letting_go += 1
                self._unpin(guard, left, 0)

    def _unpin(self, guard: Guard, left: Sequence[tuple[int, int]], begin: int) -> None:
        end = begin + self._asked.layout.objects.chunks_with(_UNPINNED_AT_ONCE)
        try:
            guard.unpin(self._asked.keys_of(dict(left[begin:end])))
        finally:
            if end < len(left):
                asyncio.get_running_loop().call_soon(self._unpin, guard, left, end)
            else:
                self.letting_go -= 1


def alike(masks: Mapping[int, int]) -> Iterator[tuple[int, Sequence[int]]]:
    """The different masks, each with the numbers of the chunks that have it."""
    different = set(masks.values())
    for mask in different:
        yield mask, [n for n, m in masks.items() if m == mask] if len(different) > 1 else list(masks)


def _in_order_from(masks: Mapping[int, int]) -> int:
    """The first chunk of a call that asks for the same of chunks in a row: it leaves them used in their order.

    For others, this is the end.
    """
    first = next(iter(masks), sys.maxsize)
    in_a_row = len(masks) == next(reversed(masks), first) - first + 1 if masks else False
    return first if in_a_row and len(set(masks.values())) == 1 else sys.maxsize


async def ask(guards: Sequence[Guard], asked: Asked, tombstones: Tombstones) -> Found:
    """Ask every backend at once; done when the fastest that have answered hold everything, or all have answered.

    A backend that fails or stays silent counts as one that holds nothing. Cancelled, it keeps no pin.
    """
    order = fastest_first(guards, asked)
    answers: list[list[bool] | None] = []
    with tombstones.watch() as removed:
        if len(order) == 1:
            answers = [await order[0].lookup(asked.keys(), asked.owner)]
        elif order:
            answers = await _ask_all(order, asked.keys(), asked.owner)
    holders = [(g, asked.found(found)) for g, found in zip(order, answers, strict=False) if found is not None]
    found = Found(asked, holders, failed=None in answers)
    if removed:
        found.leave_out(removed, asked.masks)
    return found


async def _ask_all(order: Sequence[Guard], keys: Sequence[ObjectKey], owner: str) -> list[list[bool] | None]:
    """The answers of the first so many that suffice; what the others find is unpinned."""
    tasks = [asyncio.create_task(guard.lookup(keys, owner)) for guard in order]
    used = 0
    try:
        missing = set(range(len(keys)))
        for task in tasks:
            await asyncio.wait((task,))
            used += 1
            found = task.result()
            missing.difference_update(i for i, there in enumerate(found or ()) if there)
            if not missing:
                break
        return [task.result() for task in tasks[:used]]
    except BaseException:
        used = 0
        raise
    finally:
        for guard, task in zip(order[used:], tasks[used:], strict=True):
            unpin_answer(guard, task, keys)


def fastest_first(guards: Sequence[Guard], asked: Asked) -> Sequence[Guard]:
    """By what was measured, if all were; as configured otherwise."""
    if len(guards) < 2:
        return guards
    size_bytes = sum(map(asked.layout.objects.sizes.__getitem__, asked.masks.values()))
    expected = [(guard.meter.expected_load_seconds(size_bytes), guard) for guard in guards]
    known = [(seconds, guard) for seconds, guard in expected if seconds is not None]
    if len(known) < len(guards):
        return guards
    return [guard for _, guard in sorted(known, key=lambda pair: pair[0])]
