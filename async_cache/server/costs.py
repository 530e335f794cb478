"""What a message costs: known from it alone, before anything is done for it. A unit is a microsecond or so."""

from async_cache.prompt.layout import ModelLayout
from async_cache.protocol.messages import DIGEST_BYTES, Blocks, Digests, EngineDigests, Layout, TokenIds, WirePrompt

AT_ONCE_CHUNKS = 512
"""A prompt of more of them is made in a thread."""
_PROMPT = 20
_OF_CHUNK = 2  # to hash it, and to find it
_TOKENS_IN_A_UNIT = 128
_OF_LAYOUT_OBJECT = 4
_COPIED_IN_A_UNIT = 8 * 1024  # bytes
_SENT_IN_A_UNIT = 2 * 1024


def chunks_of(wire: WirePrompt, layout: ModelLayout) -> int:
    """How many chunks a prompt has."""
    match wire:
        case Digests():
            return len(wire.chunk_hashes) // DIGEST_BYTES
        case TokenIds():
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
    tokens = len(wire.ids) // 4 if isinstance(wire, TokenIds) else 0
    return _PROMPT + chunks * (_OF_CHUNK + objects) + tokens // _TOKENS_IN_A_UNIT


def of_layout(description: Layout) -> int:
    """What it costs to make a layout."""
    return _OF_LAYOUT_OBJECT * len(description.groups) * description.world_size


def of_bytes(size_bytes: int) -> int:
    """What it costs to copy so much."""
    return size_bytes // _COPIED_IN_A_UNIT


def of_sending(size_bytes: int) -> int:
    """What it costs to send so much."""
    return size_bytes // _SENT_IN_A_UNIT
