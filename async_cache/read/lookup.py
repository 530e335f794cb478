"""Asks all backends side by side which objects they hold, and keeps the pins of what was found."""

import asyncio
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import compress
from types import TracebackType
from typing import Self

from async_cache.l2.guard import Guard
from async_cache.l2.tombstones import Tombstones
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import ModelLayout

_UNPINNED_AT_ONCE = 1024  # chunks

Sources = Sequence[tuple[Guard, Mapping[int, int]]]
"""Where to load objects from: backends, with the objects by chunk number."""


class Asked:
    """What a lookup asks for: objects of chunks, as masks by the chunk's number among `hashes`."""

    def __init__(self, layout: ModelLayout, hashes: Sequence[bytes], masks: Mapping[int, int]):
        self.layout = layout
        self.hashes = hashes
        self.masks = masks

    @cached_property
    def keys(self) -> list[ObjectKey]:
        """The key of each object that is asked for."""
        return self.keys_of(self.masks)

    def keys_of(self, masks: Mapping[int, int]) -> list[ObjectKey]:
        """The keys of objects of these chunks, given as masks by number."""
        return self.layout.objects.keys([(self.hashes[number], mask) for number, mask in masks.items()])

    def found(self, answers: Sequence[bool]) -> dict[int, int]:
        """The objects that were found, by chunk number; there is an answer for each of the keys."""
        if all(answers):
            return dict(self.masks)
        bit, members, answer = self.layout.objects.bit, self.layout.objects.members, iter(answers)
        return {
            number: sum(1 << bit(*which) for which, there in zip(members[mask], answer, strict=False) if there)
            for number, mask in self.masks.items()
        }

    def alike(self) -> Iterator[tuple[int, Sequence[int]]]:
        """The different masks, each with the numbers of the chunks of which it is asked."""
        different = set(self.masks.values())
        for mask in different:
            yield mask, [n for n, m in self.masks.items() if m == mask] if len(different) > 1 else list(self.masks)


class Found:
    """Objects that backends hold, pinned there. Leaving it by `with` unpins what nobody took."""

    def __init__(self, asked: Asked, holders: Sequence[tuple[Guard, dict[int, int]]], *, failed: bool):
        self.failed = failed  # a backend that might have held more could not be asked
        self._asked = asked
        self._holders = holders  # the fastest first

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
                    masks[number] &= ~mask

    def touch_prefix(self, chunk_hashes: Sequence[bytes], start_chunk: int = 0) -> None:
        """What was found is used, and with it all that lies in front of it in a prompt, which L1 may have.

        `chunk_hashes` are those of the prompt; number 0 of what was asked for is its `start_chunk`.
        """
        masks = list(self._asked.masks.values())
        if not masks or (len(masks) == len(chunk_hashes) and masks.count(masks[0]) == len(masks)):
            return  # all were asked for in one go, and so the backend knows
        for guard, held in self._holders:
            last = max((number for number, mask in held.items() if mask), default=-1)
            if last >= 0:
                guard.touch_prefix(chunk_hashes[: start_chunk + last + 1])

    def leave_out(self, removed: Container[bytes]) -> None:
        """Unpin what was found of chunks that were removed meanwhile."""
        gone = [number for number in self._asked.masks if self._asked.hashes[number] in removed]
        for guard, masks in self._holders if gone else ():
            guard.unpin(self._asked.keys_of({number: masks.get(number, 0) for number in gone}))
            masks.update(dict.fromkeys(gone, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Unpin what was not taken: of very many objects, in slices, between which the loop has its turn."""
        for guard, masks in self._holders:
            left = [(number, mask) for number, mask in masks.items() if mask]
            masks.clear()
            if left:
                self._unpin(guard, left, 0)

    def _unpin(self, guard: Guard, left: Sequence[tuple[int, int]], begin: int) -> None:
        end = begin + _UNPINNED_AT_ONCE
        guard.unpin(self._asked.keys_of(dict(left[begin:end])))
        if end < len(left):
            asyncio.get_running_loop().call_soon(self._unpin, guard, left, end)


def ask_nowait(guards: Sequence[Guard], asked: Asked, tombstones: Tombstones) -> Found | None:
    """What a single backend answers that has it at hand; None if asking takes time."""
    if not (guards and asked.masks):
        return Found(asked, (), failed=False)
    if len(guards) != 1:
        return None
    masks: dict[int, int] = {}
    for mask, numbers in asked.alike():
        present = guards[0].lookup_nowait(asked.layout, [asked.hashes[n] for n in numbers], mask)
        if present is None:
            guards[0].unpin(asked.keys_of(masks))
            return None
        masks |= dict.fromkeys(numbers if all(present) else compress(numbers, present), mask)
    found = Found(asked, [(guards[0], masks)], failed=False)
    if tombstones:
        found.leave_out(tombstones)
    return found


async def ask(guards: Sequence[Guard], asked: Asked, tombstones: Tombstones) -> Found:
    """Ask every backend at once; done when the fastest that have answered hold everything, or all have answered.

    A backend that fails or stays silent counts as one that holds nothing. Cancelled, it keeps no pin.
    """
    order = _fastest_first(guards, sum(asked.layout.objects.sizes[mask] for mask in asked.masks.values()))
    answers: list[list[bool] | None] = []
    with tombstones.watch() as removed:
        if len(order) == 1:
            answers = [await order[0].lookup(asked.keys)]
        elif order:
            answers = await _ask_all(order, asked.keys)
    holders = [(g, asked.found(found)) for g, found in zip(order, answers, strict=False) if found is not None]
    found = Found(asked, holders, failed=None in answers)
    found.leave_out(removed)
    return found


async def _ask_all(order: Sequence[Guard], keys: Sequence[ObjectKey]) -> list[list[bool] | None]:
    """The answers of the first so many that suffice; what the others find is unpinned."""
    tasks = [asyncio.create_task(guard.lookup(keys)) for guard in order]
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
            _unpin_answer(guard, task, keys)


def _unpin_answer(guard: Guard, task: "asyncio.Task[list[bool] | None]", keys: Sequence[ObjectKey]) -> None:
    def answered(task: "asyncio.Task[list[bool] | None]") -> None:
        found = None if task.cancelled() or task.exception() else task.result()
        if found is not None:
            guard.unpin_found(keys, found)

    task.cancel()
    task.add_done_callback(answered)


def _fastest_first(guards: Sequence[Guard], size_bytes: int) -> Sequence[Guard]:
    """By what was measured, if all were; as configured otherwise."""
    expected = [(guard.meter.expected_load_seconds(size_bytes), guard) for guard in guards]
    known = [(seconds, guard) for seconds, guard in expected if seconds is not None]
    if len(known) < len(guards):
        return guards
    return [guard for _, guard in sorted(known, key=lambda pair: pair[0])]
