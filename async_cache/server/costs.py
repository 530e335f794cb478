"""What a message costs: known from it alone, before anything is done for it. A unit is a microsecond or so."""

from async_cache.prompt.layout import ModelLayout
from async_cache.protocol.messages import (
    DIGEST_BYTES,
    Blocks,
    Digests,
    EngineDigests,
    Layout,
    SegmentDigests,
    SegmentIds,
    TokenIds,
    WirePrompt,
)

AT_ONCE_CHUNKS = 512
"""A prompt of more of them is made in a thread."""
_PROMPT = 20
_OF_CHUNK = 2  # to hash it, and to find it
_TOKENS_IN_A_UNIT = 128
_OF_LAYOUT_OBJECT = 4
_READ_IN_A_UNIT = 8  # chunks
_COPIED_IN_A_UNIT = 8 * 1024  # bytes
_SENT_IN_A_UNIT = 2 * 1024
_TAKEN_APART_IN_A_UNIT = 128  # bytes
_FRAME = 20  # to send one, however small


def chunks_of(wire: WirePrompt, layout: ModelLayout) -> int:
    """How many chunks a prompt has."""
    match wire:
        case Digests() | SegmentDigests():
            return len(wire.chunk_hashes) // DIGEST_BYTES
        case TokenIds() | SegmentIds():
            return len(wire.ids) // 4 // layout.chunk_tokens
        case Blocks():
            return min(len(wire.blocks) * wire.block_tokens // layout.chunk_tokens, len(wire.blocks))
        case EngineDigests():
            return len(wire.digests)


def objects_of(layout: ModelLayout) -> int:
    """How many objects a chunk has."""
    return layout.objects.full_mask.bit_count()


def of_prompt(wire: WirePrompt, chunks: int, objects: int) -> int:
    """What it costs to find the chunks of a prompt, of so many objects each, if all are there."""
    return _PROMPT + chunks * (_OF_CHUNK + objects) + tokens_of(wire) // _TOKENS_IN_A_UNIT


def tokens_of(wire: WirePrompt) -> int:
    """How many token ids are to be hashed, those of a context among them."""
    match wire:
        case TokenIds():
            return len(wire.ids) // 4
        case SegmentIds():
            return (len(wire.ids) + len(wire.context)) // 4
        case _:
            return 0


def of_large(size_bytes: int) -> int:
    """What it costs to take a request apart that is so large."""
    return size_bytes // _TAKEN_APART_IN_A_UNIT


def of_layout(description: Layout) -> int:
    """What it costs to make a layout."""
    return _OF_LAYOUT_OBJECT * len(description.groups) * description.world_size


def of_reading(chunks: int) -> int:
    """What it costs to say where so many chunks are."""
    return chunks // _READ_IN_A_UNIT


def of_bytes(size_bytes: int) -> int:
    """What it costs to copy so much."""
    return size_bytes // _COPIED_IN_A_UNIT


def of_sending(size_bytes: int) -> int:
    """What it costs to send a frame of so much."""
    return _FRAME + size_bytes // _SENT_IN_A_UNIT
