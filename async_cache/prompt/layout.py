"""What fixes the bytes: a model's layout, and the prompts that are hashed under it."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

from msgspec import Struct

from async_cache.prompt import keys
from async_cache.prompt.keys import Media
from async_cache.prompt.objects import (
    MAX_OBJECTS_PER_CHUNK,
    ChunkObjects,
    ObjectGroup,
    as_count,
    as_tuple,
    check_int,
)
from async_cache.prompt.origin import Origin, shared_origin

HASH_AT_ONCE_TOKENS = 32_768  # a quarter of a millisecond; a longer prompt is hashed when it is first used
MAX_NAME = 1024

_MAX_KNOWN_CONTEXT = 16_384  # bytes
_known_root = lru_cache(maxsize=1024)(keys.root)  # many chains have one
_known_segment_root = lru_cache(maxsize=256)(keys.segment_root)


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
            object.__setattr__(self, name, as_count(name, getattr(self, name)))
        groups = as_tuple("groups", self.groups)
        if not groups or not all(isinstance(g, ObjectGroup) for g in groups):
            raise ValueError("groups must be one or more ObjectGroup")
        if self.world_size * len(groups) > MAX_OBJECTS_PER_CHUNK:
            raise ValueError(f"world_size * groups must be at most {MAX_OBJECTS_PER_CHUNK}")
        for group in groups:
            if group.ranks is not None:
                check_ranks(group.ranks, self.world_size)
        object.__setattr__(self, "groups", groups)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # what was computed is not sent along

    def prompt(self, tokens: Any, *, salt: str = "", adapter: str = "", media: Media = ()) -> "Prompt":
        """The chunk hashes of `tokens` under this layout.

        `tokens`: integers of any kind (see `keys.pack_tokens`). `salt` separates tenants, `adapter` names a LoRA,
        `media` are (token offset, digest) of images and the like. A tail shorter than a chunk is not cached.
        """
        return self._of_tokens(tokens, None, salt, adapter, media)

    def segment(
        self, tokens: Any, *, context: Any = (), salt: str = "", adapter: str = "", media: Media = ()
    ) -> "Prompt":
        """The chunk hashes of `tokens` that stand in many prompts, wherever that is: a passage, the text of a tool.

        Their KV is what a model computes of them right behind the token ids of `context`, which is no part of it. No
        prompt ever finds it, nor a segment behind another context. Raises ValueError for a layout with windows.
        """
        if self.objects.windows:
            raise ValueError("a layout with windows has no segments: a window sees whatever stands before a segment")
        return self._of_tokens(tokens, keys.pack_tokens(context), salt, adapter, media)

    def _of_tokens(self, tokens: Any, context: bytes | None, salt: str, adapter: str, media: Media) -> "Prompt":
        packed = keys.pack_tokens(tokens)
        count = len(packed) // 4
        whole = count - count % self.chunk_tokens
        items = tuple(item for item in keys.check_media(media, count) if item[0] < whole) if media else ()
        source = TokenSource(packed[: whole * 4], items, context)
        root = self._token_root(context, salt, adapter)
        return Prompt(self, root, count, salt, adapter, source, base_tokens=len(context) // 4 if context else 0)

    def prompt_from_hashes(
        self, block_hashes: Sequence[bytes], block_tokens: int, *, salt: str = "", adapter: str = ""
    ) -> "Prompt":
        """A prompt known only by an engine's own chained block hashes, each for `block_tokens` tokens.

        It never meets a prompt made from tokens, nor one of another block size. Hashes that are seeded at random are
        never found again.
        """
        block_tokens = as_count("block_tokens", block_tokens)
        if self.chunk_tokens % block_tokens:
            raise ValueError(f"chunk_tokens {self.chunk_tokens} is not a multiple of block_tokens {block_tokens}")
        blocks = keys.check_blocks(block_hashes)
        root = self._root(f"blocks/{block_tokens}", salt, adapter)
        hashes = keys.chain_blocks(root, blocks, self.chunk_tokens // block_tokens)
        source = BlockSource(blocks, block_tokens)
        return Prompt(self, root, len(blocks) * block_tokens, salt, adapter, source, hashes)

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
        return Prompt(self, root, len(checked) * self.chunk_tokens, salt, adapter, DigestSource(checked), hashes)

    def _root(self, domain: str, salt: str, adapter: str) -> bytes:
        _check_labels(salt, adapter)
        return _known_root((domain, self.model, self.revision, adapter, salt), self._packed_shape)

    def _token_root(self, context: bytes | None, salt: str, adapter: str) -> bytes:
        """That of a chain over tokens: of a segment behind packed ids of a context, or of a prompt, which has none."""
        if context is None:
            return self._root("tokens", salt, adapter)
        _check_labels(salt, adapter)
        root_of = _known_segment_root if len(context) <= _MAX_KNOWN_CONTEXT else keys.segment_root
        return root_of(context, (self.model, self.revision, adapter, salt), self._packed_shape)

    @cached_property
    def _packed_shape(self) -> bytes:
        """What a root says of the shape of the bytes."""
        fields = [str(self.chunk_tokens), str(self.world_size)]
        for group in self.groups:
            fields += [group.dtype, ",".join(map(str, group.shape)), str(group.window_chunks or "")]
            fields.append(",".join(map(str, sorted(self.objects.ranks_of(group)))))
        return keys.pack_fields(fields)

    @cached_property
    def _bytes_digest(self) -> bytes:
        return self._root("tokens", "", "")

    def know_all(self) -> None:
        """Compute what is computed only once, which takes its time for thousands of objects."""
        self.objects.know_all()
        _ = self._bytes_digest, self._hash

    def same_bytes(self, other: "ModelLayout") -> bool:
        """Whether both lay chunks out alike, so that their hashes may meet. The number of readers does not matter."""
        return self is other or self._bytes_digest == other._bytes_digest

    @cached_property
    def objects(self) -> ChunkObjects:
        """The objects of each chunk, as the core numbers them."""
        return ChunkObjects(self.groups, self.world_size)

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """The bytes of a chunk, by rank."""
        return self.objects.block_bytes


class TokenSource(Struct, frozen=True, gc=False):
    """Token ids of the whole chunks, as packed little-endian uint32, and the media that begin in them.

    `context`: those of a segment's context; None for a prompt, which has none.
    """

    packed: bytes
    media: Media = ()
    context: bytes | None = None


class BlockSource(Struct, frozen=True, gc=False):
    """An engine's chained block hashes, each for `block_tokens` tokens."""

    blocks: tuple[bytes, ...]
    block_tokens: int


class DigestSource(Struct, frozen=True, gc=False):
    """An engine's digests of chunks, one for each."""

    digests: tuple[bytes, ...]


Source = TokenSource | BlockSource | DigestSource | None
"""What a prompt's hashes are made from, for those who have to make them again; None if only the hashes are known."""


class Prompt:
    """A layout, the chunk hashes of a prompt's tokens, and a salt: made once, used for every call.

    `tokens` counts the prompt's tokens, the tail that is not cached included. `len(prompt)` counts its whole chunks.
    `base_tokens` counts those of a segment's context, which lies before it; 0 for any other prompt.
    """

    __slots__ = ("adapter", "base_tokens", "chunks", "known_hashes", "layout", "root", "salt", "source", "tokens")

    known_hashes: list[bytes] | None
    """`chunk_hashes`, once they are computed."""
    chunks: int
    """How many whole chunks it has."""

    def __init__(
        self,
        layout: ModelLayout,
        root: bytes,
        tokens: int,
        salt: str,
        adapter: str,
        source: Source,
        hashes: list[bytes] | None = None,
        base_tokens: int = 0,
    ):
        self.layout, self.root, self.tokens, self.salt, self.adapter = layout, root, tokens, salt, adapter
        self.source, self.known_hashes, self.base_tokens = source, hashes, base_tokens
        self.chunks = tokens // layout.chunk_tokens
        if tokens <= HASH_AT_ONCE_TOKENS:
            self.hash()

    @property
    def hashed(self) -> bool:
        """Whether `chunk_hashes` is known: if not, asking for it takes milliseconds."""
        return self.known_hashes is not None

    def hash(self) -> None:
        """Compute the chunk hashes, once; may run in any thread."""
        if self.known_hashes is None:
            assert isinstance(self.source, TokenSource)  # all others come with their hashes
            self.known_hashes = keys.chain_tokens(
                self.root, self.source.packed, self.layout.chunk_tokens, self.source.media
            )

    @property
    def chunk_hashes(self) -> list[bytes]:
        """One 32-byte digest for each whole chunk."""
        if self.known_hashes is None:
            self.hash()
            assert self.known_hashes is not None
        return self.known_hashes

    @property
    def origin(self) -> Origin:
        """What its chunks are of."""
        return shared_origin(self.salt, self.layout.model, self.layout.revision, self.adapter)

    def __len__(self) -> int:
        return self.chunks

    @property
    def parts(self) -> "tuple[Prompt, ...]":
        """The prompts that are asked for with it: itself. See `Parts`."""
        return (self,)

    @property
    def runs(self) -> tuple[Sequence[int]]:
        """The numbers of its chunks: a single run. See `Parts`."""
        return (range(len(self)),)

    def before(self, number: int) -> bytes | None:
        """The hash of the chunk before one, if there is one."""
        return self.chunk_hashes[number - 1] if number else None

    def same_as(self, other: object) -> bool:
        """Whether both have the same chunks, by their hashes, or before either is known, by the ids."""
        if self is other:
            return True
        if not isinstance(other, Prompt) or self.root != other.root or self.tokens != other.tokens:
            return False
        if self.known_hashes is None and other.known_hashes is None:
            return self.source == other.source
        return self.chunk_hashes == other.chunk_hashes  # all: an engine's digests are not chained

    def under(self, layout: ModelLayout, adapter: str, most_chunks: int | None = None) -> "Prompt | None":
        """The same tokens as another layout and adapter cut and hash them, the first chunks of these if not all.

        None where that cannot be said: only the hashes are known, or an engine's do not fit the layout.
        """
        chunk_tokens = layout.chunk_tokens
        match self.source:
            case TokenSource(packed, media, context) if context is None or not layout.objects.windows:
                tokens = len(packed) // 4 // chunk_tokens * chunk_tokens
                if most_chunks is not None:
                    tokens = min(tokens, most_chunks * chunk_tokens)
                items = tuple(item for item in media if item[0] < tokens)
                source = TokenSource(packed[: tokens * 4], items, context)
                root = layout._token_root(context, self.salt, adapter)
                return Prompt(layout, root, tokens, self.salt, adapter, source, base_tokens=self.base_tokens)
            case BlockSource(blocks, block_tokens) if chunk_tokens % block_tokens == 0:
                most = None if most_chunks is None else most_chunks * chunk_tokens // block_tokens
                return layout.prompt_from_hashes(blocks[:most], block_tokens, salt=self.salt, adapter=adapter)
            case DigestSource(digests) if chunk_tokens == self.layout.chunk_tokens:
                return layout.prompt_from_digests(digests[:most_chunks], salt=self.salt, adapter=adapter)
        return None

    def __repr__(self) -> str:
        return f"<Prompt of {self.tokens} tokens, {len(self)} chunks, model {self.layout.model!r}>"


def _check_labels(salt: str, adapter: str) -> None:
    if adapter != "":
        keys.check_label("adapter", adapter)
    if salt != "":
        keys.check_label("salt", salt)


def check_ranks(ranks: Sequence[int], world_size: int) -> tuple[int, ...]:
    """Distinct ranks within the world, ascending. Raises TypeError or ValueError for anything else."""
    checked = as_tuple("ranks", ranks)
    for rank in checked:
        check_index("rank", rank, world_size)
    if not checked or len(set(checked)) != len(checked):
        raise ValueError(f"ranks must be one or more distinct ranks, not {ranks!r}")
    return tuple(sorted(checked))


def check_index(name: str, value: int, bound: int) -> None:
    """Check a rank, a reader, or another index below `bound`. Raises TypeError or ValueError."""
    check_int(name, value)
    if not 0 <= value < bound:
        raise ValueError(f"{name} {value} is not in 0..{bound - 1}")
