"""What fixes the bytes: a model's layout, and the prompts that are hashed under it.

The objects of a chunk are numbered by bit, `rank * len(groups) + group`, so that what a chunk holds, lacks or needs is
one int whatever the world size.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

from async_cache import keys
from async_cache.keys import Media, ObjectKey

T = TypeVar("T")

DTYPE_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1, "int16": 2, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4, "int64": 8, "float64": 8,
}  # fmt: skip

PAGE_BYTES = 4096
HASH_AT_ONCE_TOKENS = 32_768  # a quarter of a millisecond; a longer prompt is hashed when it is first used
MAX_OBJECTS_PER_CHUNK = 4096
MAX_OBJECT_BYTES = 2**32
MAX_DIMENSIONS = 32
MAX_NAME = 1024


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
        shape = tuple(self.shape)
        if not 0 < len(shape) <= MAX_DIMENSIONS or any(type(n) is not int or n < 1 for n in shape):
            raise ValueError(f"shape must be 1 to {MAX_DIMENSIONS} positive integers, not {self.shape!r}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(sorted(DTYPE_BYTES))}")
        if math.prod(shape) * DTYPE_BYTES[self.dtype] > MAX_OBJECT_BYTES:
            raise ValueError(f"an object has at most {MAX_OBJECT_BYTES} bytes, not those of {self.shape!r}")
        _check_count("window_chunks", self.window_chunks, optional=True)
        object.__setattr__(self, "shape", shape)
        if self.ranks is not None:
            object.__setattr__(self, "ranks", tuple(self.ranks))

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of one object."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ModelLayout:
    """How a model's KV is cut into objects: every chunk of `chunk_tokens` has one per rank and group."""

    model: str
    groups: tuple[ObjectGroup, ...]
    _: KW_ONLY
    chunk_tokens: int = 256
    world_size: int = 1
    readers_per_rank: int = 1
    revision: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "revision"):
            if len(keys.check_text(name, getattr(self, name))) > MAX_NAME:
                raise ValueError(f"{name} has more than {MAX_NAME} bytes")
        if not self.model:
            raise ValueError("model must not be empty")
        for name in ("chunk_tokens", "world_size", "readers_per_rank"):
            _check_count(name, getattr(self, name))
        groups = tuple(self.groups)
        if not groups or not all(isinstance(g, ObjectGroup) for g in groups):
            raise ValueError("groups must be one or more ObjectGroup")
        if self.world_size * len(groups) > MAX_OBJECTS_PER_CHUNK:
            raise ValueError(f"world_size * groups must be at most {MAX_OBJECTS_PER_CHUNK}")
        for group in groups:
            if group.ranks is not None:
                check_ranks(group.ranks, self.world_size)
        object.__setattr__(self, "groups", groups)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # what was computed is not sent along

    def prompt(self, tokens: Any, *, salt: str = "", adapter: str = "", media: Media = ()) -> "Prompt":
        """The chunk hashes of `tokens` under this layout.

        `tokens`: integers of any kind (see `keys.pack_tokens`). `salt` separates tenants, `adapter` names a LoRA,
        `media` are (token offset, digest) of images and the like. A tail shorter than a chunk is not cached.
        """
        packed = keys.pack_tokens(tokens)
        count = len(packed) // 4
        whole = count - count % self.chunk_tokens
        items = tuple(item for item in keys.check_media(media, count) if item[0] < whole)
        return Prompt(self, self._root("tokens", salt, adapter), count, salt, adapter, packed[: whole * 4], items)

    def prompt_from_hashes(
        self, block_hashes: Sequence[bytes], block_tokens: int, *, salt: str = "", adapter: str = ""
    ) -> "Prompt":
        """A prompt known only by an engine's own chained block hashes, each for `block_tokens` tokens.

        It never meets a prompt made from tokens, nor one of another block size. Hashes that are seeded at random are
        found again by nobody else.
        """
        _check_count("block_tokens", block_tokens)
        if self.chunk_tokens % block_tokens:
            raise ValueError(f"chunk_tokens {self.chunk_tokens} is not a multiple of block_tokens {block_tokens}")
        blocks = keys.check_blocks(block_hashes)
        root = self._root(f"blocks/{block_tokens}", salt, adapter)
        hashes = keys.chain_blocks(root, blocks, self.chunk_tokens // block_tokens)
        return Prompt(
            self,
            root,
            len(blocks) * block_tokens,
            salt,
            adapter,
            hashes=hashes,
            blocks=blocks,
            block_tokens=block_tokens,
        )

    def prompt_from_digests(self, digests: Sequence[bytes], *, salt: str = "", adapter: str = "") -> "Prompt":
        """A run of chunks known by an engine's own digests, one for each, that cover all tokens up to its end.

        For engines whose blocks are chunks, and that ask for runs which begin anywhere: what a chunk is found by does
        not depend on the chunks that are asked for before it. It never meets a prompt made otherwise.
        """
        checked = keys.check_blocks(digests)
        if len(set(checked)) != len(checked):
            raise ValueError("a digest is there twice: each has to cover all tokens up to the end of its chunk")
        root = self._root("digests", salt, adapter)
        hashes = keys.hash_each(root, checked)
        return Prompt(self, root, len(checked) * self.chunk_tokens, salt, adapter, hashes=hashes, digests=checked)

    def _root(self, domain: str, salt: str, adapter: str) -> bytes:
        fields = [domain, self.model, self.revision, keys.check_label("adapter", adapter)]
        fields += [keys.check_label("salt", salt), str(self.chunk_tokens), str(self.world_size)]
        for group in self.groups:
            fields += [group.dtype, ",".join(map(str, group.shape)), str(group.window_chunks or "")]
            fields.append(",".join(map(str, sorted(self._ranks_of(group)))))
        return keys.root(fields)

    def _ranks_of(self, group: ObjectGroup) -> Sequence[int]:
        return range(self.world_size) if group.ranks is None else group.ranks

    @cached_property
    def _bytes_digest(self) -> bytes:
        return self._root("tokens", "", "")

    def same_bytes(self, other: "ModelLayout") -> bool:
        """Whether the chunks of both may meet, whoever reads them: their hashes do."""
        return self is other or self._bytes_digest == other._bytes_digest

    # What the core asks of a layout. An object is a bit, see the module's docstring.

    @cached_property
    def full_mask(self) -> int:
        """All the objects of a chunk."""
        return sum(1 << self.bit(rank, g) for g, group in enumerate(self.groups) for rank in self._ranks_of(group))

    @cached_property
    def prefix_mask(self) -> int:
        """The objects that every chunk of a prefix needs: those with full attention."""
        return self.full_mask & ~sum(mask for _, mask in self.windows)

    @cached_property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """(window_chunks, mask) of the groups of which only the end of a prefix is needed."""
        masks: dict[int, int] = {}
        for g, group in enumerate(self.groups):
            if group.window_chunks is not None:
                mask = sum(1 << self.bit(rank, g) for rank in self._ranks_of(group))
                masks[group.window_chunks] = masks.get(group.window_chunks, 0) | mask
        return tuple(sorted(masks.items()))

    @cached_property
    def rank_masks(self) -> tuple[int, ...]:
        """By rank, the objects that it holds."""
        every = (1 << len(self.groups)) - 1
        return tuple(self.full_mask & every << self.bit(rank, 0) for rank in range(self.world_size))

    def mask_of_ranks(self, ranks: Sequence[int]) -> int:
        """The objects that these ranks hold."""
        return self.full_mask if len(ranks) == self.world_size else sum(self.rank_masks[rank] for rank in ranks)

    @cached_property
    def spans(self) -> tuple[tuple[tuple[int, int] | None, ...], ...]:
        """By rank and group, where the object lies in the rank's block: (begin, end) in bytes, None if not held."""
        return tuple(self._spans(rank) for rank in range(self.world_size))

    def _spans(self, rank: int) -> tuple[tuple[int, int] | None, ...]:
        spans: list[tuple[int, int] | None] = []
        begin = 0
        for group in self.groups:
            if rank in self._ranks_of(group):
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

    def bit(self, rank: int, group: int) -> int:
        """The number of an object within its chunk."""
        return rank * len(self.groups) + group

    @cached_property
    def objects(self) -> "_ByMask[tuple[tuple[int, int], ...]]":
        """By mask, (rank, group) of each object in it."""
        groups = len(self.groups)
        return _ByMask(lambda mask: tuple(divmod(b, groups) for b in range(mask.bit_length()) if mask >> b & 1))

    @cached_property
    def places(self) -> "_ByMask[tuple[tuple[int, int, int, int], ...]]":
        """By mask, (rank, group, begin, end) of each object in it: which it is, and where in its rank's block."""
        return _ByMask(lambda mask: tuple((r, g, *(self.spans[r][g] or (0, 0))) for r, g in self.objects[mask]))

    @cached_property
    def sizes(self) -> "_ByMask[int]":
        """By mask, the bytes of the objects in it."""
        return _ByMask(lambda mask: sum(self.groups[group].size_bytes for _, group in self.objects[mask]))

    @cached_property
    def ranks(self) -> "_ByMask[tuple[int, ...]]":
        """By mask, the ranks of the objects in it, ascending."""
        return _ByMask(lambda mask: tuple(sorted({rank for rank, _ in self.objects[mask]})))

    def object_keys(self, chunks: Iterable[tuple[bytes, int]]) -> list[ObjectKey]:
        """The keys of the objects of chunks, each given as (chunk hash, mask)."""
        new, objects = tuple.__new__, self.objects  # a third of the time that the named tuple's constructor takes
        return [
            new(ObjectKey, (chunk_hash, rank, group)) for chunk_hash, mask in chunks for rank, group in objects[mask]
        ]


class _ByMask(dict[int, T]):
    """What is known of a mask, computed once: there are few different ones, and they are asked for all the time."""

    def __init__(self, compute: Callable[[int], T]):
        self._compute = compute

    def __missing__(self, mask: int) -> T:
        value = self._compute(mask)
        if len(self) < MAX_OBJECTS_PER_CHUNK:
            self[mask] = value
        return value


class Prompt:
    """A layout, the chunk hashes of a prompt's tokens, and a salt: made once, used for every call.

    `tokens` counts the prompt's tokens, the tail that is not cached included. `len(prompt)` counts its whole chunks.
    What the hashes were made from is kept for whoever has to make them again: `packed` ids of the whole chunks and the
    `media` in them, or an engine's `blocks` of `block_tokens` each, or its `digests` of chunks.
    """

    __slots__ = (
        "_hashes", "adapter", "block_tokens", "blocks", "digests", "layout", "media", "packed", "root", "salt",
        "tokens",
    )  # fmt: skip

    def __init__(
        self,
        layout: ModelLayout,
        root: bytes,
        tokens: int,
        salt: str,
        adapter: str,
        packed: bytes = b"",
        media: Media = (),
        hashes: list[bytes] | None = None,
        blocks: tuple[bytes, ...] = (),
        block_tokens: int = 0,
        digests: tuple[bytes, ...] = (),
    ):
        self.layout, self.root, self.tokens, self.salt, self.adapter = layout, root, tokens, salt, adapter
        self.packed, self.media, self._hashes = packed, media, hashes
        self.blocks, self.block_tokens, self.digests = blocks, block_tokens, digests
        if tokens <= HASH_AT_ONCE_TOKENS:
            self.hash()

    @property
    def hashed(self) -> bool:
        """Whether `chunk_hashes` is known: if not, asking for it takes milliseconds."""
        return self._hashes is not None

    def hash(self) -> None:
        """Compute the chunk hashes, once; may run in any thread."""
        if self._hashes is None:
            self._hashes = keys.chain_tokens(self.root, self.packed, self.layout.chunk_tokens, self.media)

    @property
    def chunk_hashes(self) -> list[bytes]:
        """One 32-byte digest for each whole chunk."""
        if self._hashes is None:
            self.hash()
            assert self._hashes is not None
        return self._hashes

    def __len__(self) -> int:
        return self.tokens // self.layout.chunk_tokens

    def same_as(self, other: "Prompt") -> bool:
        """Whether both have the same chunks, by their hashes, or before either is known, by the ids."""
        if self is other:
            return True
        if self.root != other.root or self.tokens != other.tokens:
            return False
        if self._hashes is None and other._hashes is None:
            return self.packed == other.packed and self.media == other.media
        return self.chunk_hashes == other.chunk_hashes  # all: an engine's digests are not chained

    def __repr__(self) -> str:
        return f"<Prompt of {self.tokens} tokens, {len(self)} chunks, model {self.layout.model!r}>"


def check_ranks(ranks: Sequence[int], world_size: int) -> tuple[int, ...]:
    """Distinct ranks within the world, ascending."""
    checked = tuple(ranks)
    for rank in checked:
        check_index("rank", rank, world_size)
    if not checked or len(set(checked)) != len(checked):
        raise ValueError(f"ranks must be one or more distinct ranks, not {ranks!r}")
    return tuple(sorted(checked))


def check_index(name: str, value: int, bound: int) -> None:
    """A rank or a reader."""
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not 0 <= value < bound:
        raise ValueError(f"{name} {value} is not in 0..{bound - 1}")


def _check_count(name: str, value: int | None, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not 1 <= value < 2**32:
        raise ValueError(f"{name} must be at least 1, and less than 2**32, not {value}")
