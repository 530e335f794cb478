"""What a chunk consists of: groups of layers, and the objects that each rank has of them.

The objects of a chunk are numbered by bit, `rank * len(groups) + group`, so that what a chunk holds, lacks or needs is
one int whatever the world size. Such an int is called a mask.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from itertools import accumulate
from operator import index, or_
from typing import Any, TypeVar

from async_cache.prompt.keys import ObjectKey

T = TypeVar("T")

DTYPE_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1, "int16": 2, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4, "int64": 8, "float64": 8,
}  # fmt: skip

PAGE_BYTES = 4096
MAX_OBJECTS_PER_CHUNK = 4096
MAX_OBJECT_BYTES = 2**32
MAX_DIMENSIONS = 32
_KEPT_OBJECTS = 2**18  # that may be in all masks together, of which is kept what was computed

Span = tuple[int, int]
"""Where an object begins and ends in the block of its rank, in bytes."""


@dataclass(frozen=True)
class ObjectGroup:
    """The layers that share a shape: `shape` and `dtype` (a torch name) are those of one object.

    `window_chunks`: None for full attention, w >= 1 if only the last w chunks of a prefix are needed.
    `ranks`: those that hold this group, None for all.
    """

    shape: tuple[int, ...]
    dtype: str
    _: KW_ONLY
    window_chunks: int | None = None
    ranks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        try:
            given = tuple(self.shape)
        except TypeError:
            raise TypeError(f"shape must be a tuple of integers, not {self.shape!r}") from None
        try:
            shape = tuple(map(index, given))  # those of numpy are integers, too
        except TypeError:
            shape = ()
        if not 0 < len(shape) <= MAX_DIMENSIONS or min(shape) < 1 or bool in map(type, given):
            raise ValueError(f"shape must be 1 to {MAX_DIMENSIONS} positive integers, not {self.shape!r}")
        if not isinstance(self.dtype, str):
            raise TypeError(f"dtype must be a name, such as 'float16', not {self.dtype!r}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(sorted(DTYPE_BYTES))}")
        if math.prod(shape) * DTYPE_BYTES[self.dtype] > MAX_OBJECT_BYTES:
            raise ValueError(f"an object has at most {MAX_OBJECT_BYTES} bytes, not those of {self.shape!r}")
        object.__setattr__(self, "shape", shape)
        if self.window_chunks is not None:
            object.__setattr__(self, "window_chunks", as_count("window_chunks", self.window_chunks))
        if self.ranks is not None:
            object.__setattr__(self, "ranks", as_tuple("ranks", self.ranks))

    @cached_property
    def size_bytes(self) -> int:
        """The bytes of one object of this group."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class ChunkObjects:
    """The objects of a chunk under one layout: which there are, who holds them, and where they lie in memory."""

    def __init__(self, groups: Sequence[ObjectGroup], world_size: int):
        self._groups = groups
        self._world_size = world_size
        self._in_units: dict[tuple[int, int], int] = {}

    def ranks_of(self, group: ObjectGroup) -> Sequence[int]:
        """The ranks that hold a group."""
        return range(self._world_size) if group.ranks is None else group.ranks

    def know_all(self) -> None:
        """Compute what is computed only once, which takes its time for thousands of objects."""
        mask = self.full_mask
        _ = self.places[mask], self.sizes[mask], self.rooms[mask], self.prefix_mask, self.rank_masks, self.room_bytes

    def bit(self, rank: int, group: int) -> int:
        """The number of an object within its chunk."""
        return rank * len(self._groups) + group

    def chunks_with(self, objects: int) -> int:
        """How many chunks have about so many objects; one at least."""
        return max(1, objects // max(1, self.full_mask.bit_count()))

    def bytes_in_units(self, unit_bytes: int, least_bytes: int) -> int:
        """What all objects of a chunk take where each takes a multiple of some bytes, and so many at least."""
        size_bytes = self._in_units.get((unit_bytes, least_bytes))
        if size_bytes is None:
            size_bytes = self._in_units[unit_bytes, least_bytes] = sum(
                max(-(-group.size_bytes // unit_bytes) * unit_bytes, least_bytes) * len(self.ranks_of(group))
                for group in self._groups
            )
        return size_bytes

    # Masks.

    @cached_property
    def full_mask(self) -> int:
        """All the objects of a chunk."""
        return sum(1 << self.bit(rank, g) for g, group in enumerate(self._groups) for rank in self.ranks_of(group))

    @cached_property
    def prefix_mask(self) -> int:
        """The objects that every chunk of a prefix needs: those with full attention."""
        return self.full_mask & ~sum(mask for _, mask in self.windows)

    @cached_property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """The (window_chunks, mask) of groups of which only the end of a prefix is needed."""
        masks: dict[int, int] = {}
        for g, group in enumerate(self._groups):
            if group.window_chunks is not None:
                mask = sum(1 << self.bit(rank, g) for rank in self.ranks_of(group))
                masks[group.window_chunks] = masks.get(group.window_chunks, 0) | mask
        return tuple(sorted(masks.items()))

    @cached_property
    def reaching(self) -> tuple[tuple[int, int], ...]:
        """For each window_chunks, ascending, a mask of the groups that have that window or a longer one."""
        masks = accumulate(reversed([mask for _, mask in self.windows]), or_)
        return tuple(zip([window for window, _ in self.windows], reversed(list(masks)), strict=True))

    @cached_property
    def rank_masks(self) -> tuple[int, ...]:
        """By rank, the objects that it holds."""
        every = (1 << len(self._groups)) - 1
        return tuple(self.full_mask & every << self.bit(rank, 0) for rank in range(self._world_size))

    def mask_of_ranks(self, ranks: Sequence[int]) -> int:
        """The objects that these ranks hold."""
        return self.full_mask if len(ranks) == self._world_size else sum(self.rank_masks[rank] for rank in ranks)

    # Where they lie: a rank has all its objects of a chunk in one block, back to back.

    @cached_property
    def spans(self) -> tuple[tuple[Span | None, ...], ...]:
        """By rank and group, where the object lies in the rank's block; None where the rank lacks the group."""
        holders = [frozenset(self.ranks_of(group)) for group in self._groups]
        return tuple(self._spans(rank, holders) for rank in range(self._world_size))

    def _spans(self, rank: int, holders: Sequence[frozenset[int]]) -> tuple[Span | None, ...]:
        spans: list[Span | None] = []
        begin = 0
        for group, ranks in zip(self._groups, holders, strict=True):
            if rank in ranks:
                spans.append((begin, begin + group.size_bytes))
                begin += group.size_bytes
            else:
                spans.append(None)
        return tuple(spans)

    @cached_property
    def block_bytes(self) -> tuple[int, ...]:
        """By rank, the bytes of a chunk."""
        return tuple(max((span[1] for span in spans if span), default=0) for spans in self.spans)

    @cached_property
    def room_bytes(self) -> tuple[int, ...]:
        """By rank, the room that a chunk takes in L1: whole pages."""
        return tuple(-(-size // PAGE_BYTES) * PAGE_BYTES for size in self.block_bytes)

    # What is known of each mask. None of them knows this object: with its layout it is gone at once, and need not wait
    # for a collection, as many as there may be.

    @cached_property
    def members(self) -> "_ByMask[tuple[tuple[int, int], ...]]":
        """By mask, (rank, group) of each object in it."""
        groups = len(self._groups)
        return _ByMask(lambda mask: tuple(divmod(b, groups) for b in range(mask.bit_length()) if mask >> b & 1))

    @cached_property
    def places(self) -> "_ByMask[tuple[tuple[int, int, int, int], ...]]":
        """By mask, (rank, group, begin, end) of each object in it: which it is, and where in its rank's block."""
        members, spans = self.members, self.spans
        return _ByMask(lambda mask: tuple((r, g, *(spans[r][g] or (0, 0))) for r, g in members[mask]))

    @cached_property
    def sizes(self) -> "_ByMask[int]":
        """By mask, the bytes of the objects in it."""
        members, groups = self.members, self._groups
        return _ByMask(lambda mask: sum(groups[group].size_bytes for _, group in members[mask]))

    @cached_property
    def ranks(self) -> "_ByMask[tuple[int, ...]]":
        """By mask, the ranks of the objects in it, ascending."""
        members = self.members
        return _ByMask(lambda mask: tuple(sorted({rank for rank, _ in members[mask]})))

    @cached_property
    def rooms(self) -> "_ByMask[int]":
        """By mask, the room that the blocks of its ranks take, in bytes."""
        ranks, room_bytes = self.ranks, self.room_bytes
        return _ByMask(lambda mask: sum(room_bytes[rank] for rank in ranks[mask]))

    def keys(self, chunks: Iterable[tuple[bytes, int]]) -> list[ObjectKey]:
        """The keys of the objects of chunks, each given as (chunk hash, mask)."""
        new, members = tuple.__new__, self.members  # a third of the time that the named tuple's constructor takes
        return [
            new(ObjectKey, (chunk_hash, rank, group)) for chunk_hash, mask in chunks for rank, group in members[mask]
        ]


class _ByMask(dict[int, T]):
    """What is known of a mask, computed once: there are few different ones, and they are asked for all the time.

    Of very many different ones, only the first are kept: fewer, the more objects they may have.
    """

    def __init__(self, compute: Callable[[int], T]):
        self._compute = compute

    def __missing__(self, mask: int) -> T:
        value = self._compute(mask)
        if len(self) * mask.bit_length() < _KEPT_OBJECTS:
            self[mask] = value
        return value


def as_tuple(name: str, values: Iterable[T]) -> tuple[T, ...]:
    """The values of a sequence. Raises TypeError for what is none."""
    try:
        return tuple(values)
    except TypeError:
        raise TypeError(f"{name} must be a sequence, not {type(values).__name__}") from None


def as_int(name: str, value: Any) -> int:
    """A whole number as an int; NumPy's are some, too, a bool is none. Raises TypeError."""
    try:
        if type(value) is not bool:
            return index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be an int, not {type(value).__name__}")


def check_int(name: str, value: Any) -> None:
    """Check for what is an int already. Raises TypeError."""
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")


def as_count(name: str, value: Any) -> int:
    """A count that fits 32 bits, at least 1. Raises TypeError or ValueError."""
    count = as_int(name, value)
    if not 1 <= count < 2**32:
        raise ValueError(f"{name} must be at least 1, and less than 2**32, not {count}")
    return count
