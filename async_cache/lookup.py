"""Asks all backends side by side which objects they hold, and keeps the pins of what was found."""

import asyncio
from collections.abc import Sequence

from async_cache.keys import ObjectKey
from async_cache.l2.guard import Guard
from async_cache.layout import ModelLayout


class Asked:
    """What a lookup asks for: objects of chunks, by the chunk's number within the request."""

    def __init__(self, layout: ModelLayout, missing: Sequence[tuple[int, bytes, int]]):
        self.layout = layout
        self.chunks = [(number, chunk_hash, layout.objects(mask)) for number, chunk_hash, mask in missing]
        self.keys = [
            ObjectKey(chunk_hash, rank, group) for _, chunk_hash, objects in self.chunks for rank, group in objects
        ]

    def masks(self, found: Sequence[bool]) -> dict[int, int]:
        """By chunk number, the objects that were found."""
        bit = self.layout.bit
        answers = iter(found)
        masks = {}
        for number, _, objects in self.chunks:
            mask = 0
            for rank, group in objects:
                if next(answers):
                    mask |= 1 << bit(rank, group)
            masks[number] = mask
        return masks


class Found:
    """Objects that backends hold, pinned there. What nobody takes is given back by `close`."""

    def __init__(self, asked: Asked, holders: Sequence[tuple[Guard, dict[int, int]]], *, failed: bool):
        self.failed = failed  # a backend that might have held more could not be asked
        self._asked = asked
        self._holders = holders  # the fastest first

    def mask(self, number: int) -> int:
        """The objects of a chunk that some backend holds."""
        mask = 0
        for _, masks in self._holders:
            mask |= masks.get(number, 0)
        return mask

    def sources(self, number: int, wanted: int) -> list[tuple[Guard, int]]:
        """Where to load objects of a chunk from, each from its fastest holder."""
        sources = []
        for guard, masks in self._holders:
            mask = masks.get(number, 0) & wanted
            if mask:
                wanted &= ~mask
                sources.append((guard, mask))
        return sources

    def take(self, number: int, wanted: int) -> list[tuple[Guard, int]]:
        """The same, and the pins are the caller's from now on."""
        sources = self.sources(number, wanted)
        for guard, masks in self._holders:
            for taker, mask in sources:
                if taker is guard:
                    masks[number] &= ~mask
        return sources

    def close(self) -> None:
        """Give back the pins that were not taken."""
        for guard, masks in self._holders:
            keys = [
                key
                for number, chunk_hash, _ in self._asked.chunks
                if masks.get(number)
                for key in self._asked.layout.object_keys(chunk_hash, masks[number])
            ]
            masks.clear()
            guard.unpin(keys)


async def ask(guards: Sequence[Guard], asked: Asked, timeout_seconds: float) -> Found:
    """Ask every backend at once; done when the fastest that have answered hold everything, or all have answered.

    A backend that fails or stays silent counts as one that holds nothing. Cancelled, it keeps no pin.
    """
    order = _fastest_first(guards, sum(asked.layout.groups[key.group].size_bytes for key in asked.keys))
    if len(order) == 1:
        answers = [await order[0].lookup(asked.keys, timeout_seconds)]
    else:
        answers = await _ask_all(order, asked.keys, timeout_seconds)
    holders = [(g, asked.masks(found)) for g, found in zip(order, answers, strict=False) if found is not None]
    return Found(asked, holders, failed=None in answers)


async def _ask_all(order: Sequence[Guard], keys: Sequence[ObjectKey], timeout_seconds: float) -> list[list[bool] | None]:
    """The answers of the first so many that suffice; those of the others are given back."""
    tasks = [asyncio.create_task(guard.lookup(keys, timeout_seconds)) for guard in order]
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
    except asyncio.CancelledError:
        used = 0
        raise
    finally:
        for guard, task in zip(order[used:], tasks[used:], strict=True):
            _give_back(guard, task, keys)


def _give_back(guard: Guard, task: "asyncio.Task[list[bool] | None]", keys: Sequence[ObjectKey]) -> None:
    def answered(task: "asyncio.Task[list[bool] | None]") -> None:
        found = None if task.cancelled() or task.exception() else task.result()
        if found is not None:
            guard.unpin_found(keys, found)

    task.cancel()
    task.add_done_callback(answered)


def _fastest_first(guards: Sequence[Guard], size_bytes: int) -> Sequence[Guard]:
    """By what was measured, if all were; as configured otherwise."""
    expected = [(guard.expected_load_seconds(size_bytes), guard) for guard in guards]
    known = [(seconds, guard) for seconds, guard in expected if seconds is not None]
    if len(known) < len(guards):
        return guards
    return [guard for _, guard in sorted(known, key=lambda pair: pair[0])]
