"""Prompts and layouts, as they travel in messages."""

from typing import Annotated

from msgspec import Meta, field

from async_cache.protocol.messages.base import DIGEST_BYTES, MAX_CHUNKS, Count, Digest, Index, Label, Message, Name


class Group(Message):
    """A group of a layout: shape and dtype of an object, its window in chunks, the ranks that hold it (None: all)."""

    shape: Annotated[list[Annotated[int, Meta(ge=1, lt=2**48)]], Meta(min_length=1, max_length=32)]
    dtype: Annotated[str, Meta(max_length=32)]
    window_chunks: Annotated[int, Meta(ge=1, lt=2**32)] | None = None
    ranks: Annotated[list[Index], Meta(max_length=4096)] | None = None


class Layout(Message):
    """What fixes the bytes of a model's chunks: its groups, tokens in a chunk, ranks, readers of each rank."""

    model: Name
    groups: Annotated[list[Group], Meta(min_length=1, max_length=4096)]
    chunk_tokens: Annotated[int, Meta(ge=1, lt=2**32)]
    world_size: Annotated[int, Meta(ge=1, le=4096)]
    readers_per_rank: Annotated[int, Meta(ge=1, lt=2**32)]
    revision: Name


class Digests(Message):
    """A prompt by its chunk hashes, one after the other."""

    layout: Index
    root: Digest
    tokens: Count
    salt: Label
    chunk_hashes: Annotated[bytes, Meta(max_length=DIGEST_BYTES * MAX_CHUNKS)]
    adapter: Label = ""


class TokenIds(Message):
    """A prompt by the ids of its whole chunks, as little-endian uint32."""

    layout: Index
    salt: Label
    adapter: Label
    ids: bytes
    media: Annotated[list[tuple[Index, bytes]], Meta(max_length=2**14)] = field(default_factory=list)


class Blocks(Message):
    """A prompt by an engine's chained block hashes."""

    layout: Index
    salt: Label
    adapter: Label
    block_tokens: Annotated[int, Meta(ge=1, lt=2**32)]
    blocks: Annotated[list[bytes], Meta(max_length=2**17)]


class EngineDigests(Message):
    """A run of chunks by an engine's own digests of them."""

    layout: Index
    salt: Label
    adapter: Label
    digests: Annotated[list[bytes], Meta(max_length=MAX_CHUNKS)]


class SegmentIds(Message):
    """A segment by the ids of its whole chunks and of its context, as little-endian uint32."""

    layout: Index
    salt: Label
    adapter: Label
    ids: bytes
    context: bytes
    media: Annotated[list[tuple[Index, bytes]], Meta(max_length=2**14)] = field(default_factory=list)


class SegmentDigests(Message):
    """A segment by its chunk hashes, one after the other; its context has so many tokens."""

    layout: Index
    root: Digest
    tokens: Count
    salt: Label
    chunk_hashes: Annotated[bytes, Meta(max_length=DIGEST_BYTES * MAX_CHUNKS)]
    base_tokens: Count
    adapter: Label = ""


WirePrompt = Digests | TokenIds | Blocks | EngineDigests | SegmentIds | SegmentDigests
NEWER_PROMPTS: tuple[type[Message], ...] = (SegmentIds, SegmentDigests)
"""Those that came after the first servers of this version."""
