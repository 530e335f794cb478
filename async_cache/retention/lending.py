"""Who gives way where quotas allow more than a tier has: whoever has filled most of his own.

So each has, of what the tier holds, at least his part of all that quotas allow; what he leaves of that is lent to the
others in the same proportion, and comes back to him with his next stores.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import heappop, heappush
from itertools import count

from async_cache.retention.bound import Bound

_PARTS = 1024  # of a quota


def part_of(used_bytes: int, most_bytes: int) -> int:
    """How much of a quota is filled."""
    return used_bytes * _PARTS // max(most_bytes, 1)


class Lending:
    """The quotas of owners, of all models together, the one that is filled most first."""

    def __init__(self) -> None:
        self.most_bytes = self.used_bytes = 0
        """Of all of them: what they allow, and what is there of it."""
        self._bounds: dict[Bound, int] = {}  # each with the part in its entry of the heap, which is no less than it has
        self._heap: list[tuple[int, int, Bound]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._bounds)

    def join(self, bound: Bound) -> None:
        """An owner has something."""
        self.most_bytes += bound.most_bytes
        self.used_bytes += bound.used_bytes
        self._push(bound, part_of(bound.used_bytes, bound.most_bytes))

    def leave(self, bound: Bound) -> None:
        """An owner has nothing any more, or no quota."""
        if self._bounds.pop(bound, None) is not None:
            self.most_bytes -= bound.most_bytes
            self.used_bytes -= bound.used_bytes

    def grew(self, bound: Bound, size_bytes: int) -> None:
        """An owner has so much more, or less."""
        if bound in self._bounds:
            self.used_bytes += size_bytes
            part = part_of(bound.used_bytes, bound.most_bytes)
            if part > self._bounds[bound]:
                self._push(bound, part)

    def allow(self, bound: Bound, most_bytes: int) -> None:
        """The quota of an owner is another one."""
        if bound in self._bounds:
            self.most_bytes += most_bytes - bound.most_bytes
        bound.most_bytes = most_bytes
        self.grew(bound, 0)

    def fullest(self, taken: Mapping[Bound | None, int], exhausted: set[Bound]) -> tuple[Bound, int] | None:
        """The one that is filled most when so much has been taken of each, and how much; None where all are exhausted.

        Those of which something was taken, or that are exhausted, have to be `restored` after that.
        """
        while self._heap:
            part, _, bound = self._heap[0]
            if self._bounds.get(bound) != -part:
                heappop(self._heap)
                continue
            now = part_of(bound.used_bytes - taken.get(bound, 0), bound.most_bytes)
            if bound not in exhausted and now == -part:
                return bound, now
            heappop(self._heap)
            if bound in exhausted:
                self._bounds[bound] = -1
            else:
                self._push(bound, now)
        return None

    def restore(self, bounds: Iterable[Bound]) -> None:
        """What was taken of these, or not found in them, did not leave after all, or has left by now."""
        for bound in bounds:
            part = part_of(bound.used_bytes, bound.most_bytes)
            if bound in self._bounds and part > self._bounds[bound]:
                self._push(bound, part)

    def _push(self, bound: Bound, part: int) -> None:
        self._bounds[bound] = part
        heappush(self._heap, (-part, next(self._numbers), bound))
        if len(self._heap) > 2 * len(self._bounds) + _PARTS:
            self._heap = sorted((-of, next(self._numbers), each) for each, of in self._bounds.items() if of >= 0)


def choose(
    lending: Lending,
    room_bytes: int,
    sizes_of: Callable[[bytes], tuple[int, int]],
    others: Iterator[bytes],
    others_part: Callable[[int], int],
) -> list[bytes]:
    """The chunks that leave for so much room, each of whoever has filled most then; too few where no more may.

    `sizes_of` says what a chunk gives back, as room and as bytes that count for a quota: no room where it has to stay.
    `others` are those that belong to nobody with a quota, in order, and `others_part` how much of theirs is filled
    when so many bytes of it were taken.
    """
    chosen: dict[bytes, None] = {}
    taken: dict[Bound | None, int] = {None: 0}
    exhausted: set[Bound] = set()
    in_order: dict[Bound | None, Iterator[bytes]] = {None: others}
    others_left = True
    while room_bytes > 0:
        bound, part = lending.fullest(taken, exhausted) or (None, -1)
        if others_left and others_part(taken[None]) >= part:
            bound = None
        elif bound is None:
            break
        own = in_order.setdefault(bound, iter(bound if bound is not None else ()))
        room, size_bytes = 0, 0
        for chunk_hash in own:
            room, size_bytes = sizes_of(chunk_hash) if chunk_hash not in chosen else (0, 0)
            if room:
                chosen[chunk_hash] = None
                break
        room_bytes -= room
        taken[bound] = taken.get(bound, 0) + size_bytes
        if not room and bound is not None:
            exhausted.add(bound)
        elif not room:
            others_left = False
    lending.restore({bound for bound in (*taken, *exhausted) if bound is not None})
    return list(chosen)
