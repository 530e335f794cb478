"""Prompts as they travel: whatever the form, the same chunks come out, and what can not be is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_cache import ModelLayout, ObjectGroup, Prompt
from async_cache.prompt.layout import HASH_AT_ONCE_TOKENS
from async_cache.protocol import messages as m
from async_cache.protocol.messages import Decoder, encode
from async_cache.protocol.prompts import describe, layout_of, pack, unpack

LAYOUT = ModelLayout("tiny", (ObjectGroup((2, 4, 8), "bfloat16"),), chunk_tokens=4)
GROUPS = st.builds(
    ObjectGroup,
    st.lists(st.integers(1, 150), min_size=1, max_size=4).map(tuple),
    st.sampled_from(["uint8", "float16", "bfloat16", "float64"]),
    window_chunks=st.none() | st.integers(1, 2**32 - 1),
    ranks=st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True).map(tuple),
)
LAYOUTS = st.builds(
    ModelLayout,
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    st.lists(GROUPS, min_size=1, max_size=4).map(tuple),
    chunk_tokens=st.integers(1, 2**32 - 1),
    world_size=st.integers(3, 8),
    readers_per_rank=st.integers(1, 2**32 - 1),
    revision=st.text(st.characters(codec="utf-8"), max_size=20),
)


def travelled(message: Any) -> Any:
    """What comes out at the other end."""
    return Decoder(type(message)).decode(encode(message))


def sent(prompt: Prompt, *, trusted: bool) -> Prompt:
    return unpack(travelled(pack(prompt, 0, trusted=trusted)), prompt.layout)


@given(LAYOUTS)
def test_a_layout_comes_back_as_it_was(layout: ModelLayout) -> None:
    assert layout_of(travelled(describe(layout))) == layout


@pytest.mark.parametrize("trusted", [True, False], ids=["digests", "token ids"])
@given(
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=30),
    salt=st.sampled_from(["", "tenant-1", "é" * 64]),
    adapter=st.sampled_from(["", "lora-é"]),
    offsets=st.sets(st.integers(0, 29), max_size=4),
    digest=st.binary(min_size=1, max_size=64),
)
def test_a_prompt_of_tokens_has_the_same_chunks_at_the_other_end(
    trusted: bool, tokens: list[int], salt: str, adapter: str, offsets: set[int], digest: bytes
) -> None:
    media = [(offset, digest) for offset in sorted(offsets) if offset < len(tokens)]
    prompt = LAYOUT.prompt(tokens, salt=salt, adapter=adapter, media=media)
    there = sent(prompt, trusted=trusted)
    assert there.chunk_hashes == prompt.chunk_hashes and there.root == prompt.root
    assert (there.salt, len(there)) == (prompt.salt, len(prompt))


@pytest.mark.parametrize("trusted", [True, False], ids=["digests", "blocks"])
@given(blocks=st.lists(st.binary(min_size=8, max_size=64), max_size=9), block_tokens=st.sampled_from([1, 2, 4]))
def test_a_prompt_of_blocks_has_the_same_chunks_at_the_other_end(
    trusted: bool, blocks: list[bytes], block_tokens: int
) -> None:
    prompt = LAYOUT.prompt_from_hashes(blocks, block_tokens, salt="tenant-1", adapter="lora")
    there = sent(prompt, trusted=trusted)
    assert there.chunk_hashes == prompt.chunk_hashes and there.root == prompt.root


def test_a_prompt_that_is_not_hashed_yet_is_hashed_at_the_other_end() -> None:
    prompt = LAYOUT.prompt(range(HASH_AT_ONCE_TOKENS + 7))
    assert not prompt.hashed
    there = sent(prompt, trusted=False)
    assert not prompt.hashed
    assert there.chunk_hashes == prompt.chunk_hashes


def test_the_form_of_a_prompt_is_that_for_which_its_sender_is_trusted() -> None:
    tokens, blocks = LAYOUT.prompt([1, 2, 3, 4]), LAYOUT.prompt_from_hashes([bytes(8)], 4)
    assert [type(pack(prompt, 0, trusted=True)) for prompt in (tokens, blocks)] == [m.Digests, m.Digests]
    assert [type(pack(prompt, 0, trusted=False)) for prompt in (tokens, blocks)] == [m.TokenIds, m.Blocks]


IDS = b"".join(n.to_bytes(4, "little") for n in range(8))


@pytest.mark.parametrize(
    "wire",
    [
        m.Digests(0, bytes(32), 4, "", b""),
        m.Digests(0, bytes(32), 0, "", bytes(32)),
        m.Digests(0, bytes(32), 4, "", bytes(31)),
        m.Digests(0, bytes(32), 4, "", bytes(64)),
        m.Digests(0, bytes(32), 2**63 - 1, "", bytes(32)),
        m.TokenIds(0, "", "", IDS[:-1]),
        m.TokenIds(0, "", "", b"\0\0\0\x80" * 4),
        m.TokenIds(0, "", "", b"\xff" * 16),
        m.TokenIds(0, "\n", "", IDS),
        m.TokenIds(0, "é" * 65, "", IDS),
        m.TokenIds(0, "", "\x7f", IDS),
        m.TokenIds(0, "", "", IDS, [(8, b"x")]),
        m.TokenIds(0, "", "", IDS, [(1, b"x"), (1, b"x")]),
        m.TokenIds(0, "", "", IDS, [(2, b"x"), (1, b"x")]),
        m.TokenIds(0, "", "", IDS, [(1, b"")]),
        m.TokenIds(0, "", "", IDS, [(1, bytes(65))]),
        m.Blocks(0, "", "", 3, [bytes(8)]),
        m.Blocks(0, "", "", 8, [bytes(8)]),
        m.Blocks(0, "", "", 4, [bytes(7)]),
        m.Blocks(0, "", "", 4, [bytes(65)]),
        m.Blocks(0, "\0", "", 4, [bytes(8)]),
    ],
    ids=lambda wire: repr(wire)[:50],
)
def test_a_prompt_that_can_not_be_is_refused(wire: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        unpack(travelled(wire), LAYOUT)


@pytest.mark.parametrize(
    "description",
    [
        m.Layout("", [m.Group([1], "uint8")], 1, 1, 1, ""),
        m.Layout("m", [m.Group([1], "int4")], 1, 1, 1, ""),
        m.Layout("m", [m.Group([1], "")], 1, 1, 1, ""),
        m.Layout("m", [m.Group([1], "uint8", None, [1])], 1, 1, 1, ""),
        m.Layout("m", [m.Group([1], "uint8", None, [0, 0])], 1, 1, 1, ""),
        m.Layout("m", [m.Group([1], "uint8", None, [])], 1, 1, 1, ""),
        m.Layout("m", [m.Group([1], "uint8")] * 2, 1, 4096, 1, ""),
    ],
    ids=lambda layout: repr(layout)[:60],
)
def test_a_layout_that_can_not_be_is_refused(description: m.Layout) -> None:
    with pytest.raises((ValueError, TypeError)):
        layout_of(travelled(description))
