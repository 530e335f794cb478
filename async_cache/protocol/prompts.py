"""Prompts and layouts as they travel."""

from async_cache.prompt.layout import BlockSource, DigestSource, ModelLayout, Prompt, TokenSource
from async_cache.prompt.objects import ObjectGroup
from async_cache.protocol.messages import (
    DIGEST_BYTES,
    Blocks,
    Digests,
    EngineDigests,
    Group,
    Layout,
    SegmentDigests,
    SegmentIds,
    TokenIds,
    WirePrompt,
)

_MAX_DIFFERENCE = 300  # characters


def describe(layout: ModelLayout) -> Layout:
    """A layout to send."""
    groups = [
        Group(list(group.shape), group.dtype, group.window_chunks, None if group.ranks is None else list(group.ranks))
        for group in layout.groups
    ]
    return Layout(
        layout.model, groups, layout.chunk_tokens, layout.world_size, layout.readers_per_rank, layout.revision
    )


def layout_of(description: Layout) -> ModelLayout:
    """The layout that was sent. Raises ValueError or TypeError if it is impossible."""
    groups = tuple(
        ObjectGroup(
            tuple(group.shape),
            group.dtype,
            window_chunks=group.window_chunks,
            ranks=None if group.ranks is None else tuple(group.ranks),
        )
        for group in description.groups
    )
    return ModelLayout(
        description.model,
        groups,
        chunk_tokens=description.chunk_tokens,
        world_size=description.world_size,
        readers_per_rank=description.readers_per_rank,
        revision=description.revision,
    )


def difference(ours: Layout, theirs: Layout) -> str:
    """A text for people: in what two layouts of a model differ."""
    parts = []
    for name in ("chunk_tokens", "world_size", "readers_per_rank", "revision"):
        here, there = getattr(ours, name), getattr(theirs, name)
        if here != there:
            parts.append(f"{name} is {here!r} here and {there!r} there")
    if ours.groups != theirs.groups:
        parts.append(f"its groups are {_shapes(ours)} here and {_shapes(theirs)} there")
    text = ", ".join(parts)
    return text if len(text) <= _MAX_DIFFERENCE else text[:_MAX_DIFFERENCE] + " ..."


def _shapes(layout: Layout) -> str:
    return " + ".join(f"{'x'.join(map(str, group.shape))} {group.dtype}" for group in layout.groups)


def pack(prompt: Prompt, layout: int, *, trusted: bool) -> WirePrompt:
    """A prompt to send: its digests if the client is trusted, else what they are made from.

    Raises ValueError for a prompt of which only the digests are known, without trust.
    """
    if trusted:
        return _pack_digests(prompt, layout)
    match prompt.source:
        case TokenSource(packed, media, context):
            if context is None:
                return TokenIds(layout, prompt.salt, prompt.adapter, packed, list(media))
            return SegmentIds(layout, prompt.salt, prompt.adapter, packed, context, list(media))
        case BlockSource(blocks, block_tokens):
            return Blocks(layout, prompt.salt, prompt.adapter, block_tokens, list(blocks))
        case DigestSource(digests):
            return EngineDigests(layout, prompt.salt, prompt.adapter, list(digests))
        case None:
            raise ValueError("a prompt of which only the hashes are known cannot be sent without trust")


def unpack(wire: WirePrompt, layout: ModelLayout) -> Prompt:
    """The prompt that was sent. Raises ValueError or TypeError if it is impossible."""
    if isinstance(wire, Digests | SegmentDigests):
        hashes = _split(wire.chunk_hashes)
        if wire.tokens // layout.chunk_tokens != len(hashes):
            raise ValueError(f"{wire.tokens} tokens do not make {len(hashes)} chunks of {layout.chunk_tokens}")
        base_tokens = wire.base_tokens if isinstance(wire, SegmentDigests) else 0
        return Prompt(layout, wire.root, wire.tokens, wire.salt, wire.adapter, None, hashes, base_tokens)
    if isinstance(wire, Blocks):
        return layout.prompt_from_hashes(wire.blocks, wire.block_tokens, salt=wire.salt, adapter=wire.adapter)
    if isinstance(wire, EngineDigests):
        return layout.prompt_from_digests(wire.digests, salt=wire.salt, adapter=wire.adapter)
    ids = _token_ids(wire.ids)
    if isinstance(wire, SegmentIds):
        context = _token_ids(wire.context)
        return layout.segment(ids, context=context, salt=wire.salt, adapter=wire.adapter, media=wire.media)
    return layout.prompt(ids, salt=wire.salt, adapter=wire.adapter, media=wire.media)


def _pack_digests(prompt: Prompt, layout: int) -> WirePrompt:
    hashes = b"".join(prompt.chunk_hashes)
    if prompt.base_tokens:
        return SegmentDigests(
            layout, prompt.root, prompt.tokens, prompt.salt, hashes, prompt.base_tokens, prompt.adapter
        )
    return Digests(layout, prompt.root, prompt.tokens, prompt.salt, hashes, prompt.adapter)


def _token_ids(packed: bytes) -> memoryview:
    if len(packed) % 4:
        raise ValueError(f"{len(packed)} bytes are no token ids of 4 bytes each")
    return memoryview(packed).cast("I")


def _split(digests: bytes) -> list[bytes]:
    if len(digests) % DIGEST_BYTES:
        raise ValueError(f"{len(digests)} bytes are no digests of {DIGEST_BYTES} bytes each")
    return [digests[begin : begin + DIGEST_BYTES] for begin in range(0, len(digests), DIGEST_BYTES)]
