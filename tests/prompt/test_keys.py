"""Keys: the same ids give the same hashes however they came, and what is not a prompt is refused."""

import ctypes
import json
import re
import subprocess
import sys
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from struct import pack
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from async_cache.l2.record import file_name
from async_cache.prompt import keys
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import ModelLayout
from async_cache.prompt.objects import ObjectGroup

SMALL = [0, 1, 5, 127]
LARGE = [0, 1, 258, 2**31 - 1]
DOCUMENT = Path(__file__).parents[2] / "docs" / "keys.md"


# docs/keys.md, written down a second time: slowly, and without a look at the implementation.


def u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def reference_root(*fields: str) -> bytes:
    data = b"async_cache root 1\n"
    for text in fields:
        data += u32(len(text.encode())) + text.encode()
    return blake3(data).digest()


def reference_tokens(
    root: bytes, ids: Sequence[int], chunk_tokens: int, media: Sequence[tuple[int, bytes]] = ()
) -> list[bytes]:
    hashes = [root]
    for index in range(len(ids) // chunk_tokens):
        begin, end = index * chunk_tokens, (index + 1) * chunk_tokens
        data = hashes[-1]
        for token in ids[begin:end]:
            data += u32(token)
        for offset, digest in media:
            if begin <= offset < end:
                data += u32(offset - begin) + u32(len(digest)) + digest
        hashes.append(blake3(data).digest())
    return hashes[1:]


def reference_blocks(root: bytes, blocks: Sequence[bytes], blocks_per_chunk: int) -> list[bytes]:
    hashes = [root]
    for index in range(len(blocks) // blocks_per_chunk):
        data = hashes[-1]
        for block in blocks[index * blocks_per_chunk : (index + 1) * blocks_per_chunk]:
            data += u32(len(block)) + block
        hashes.append(blake3(data).digest())
    return hashes[1:]


# Token ids.

NUMPY = [np.dtype(order + kind) for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8") for order in "<>"]
TORCH = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


def packed(ids: Sequence[int]) -> bytes:
    return b"".join(map(u32, ids))


def narrow(dtype: Any) -> bool:
    return dtype.itemsize < 4


@pytest.mark.parametrize(
    "made", [list, tuple, deque, lambda ids: list(map(np.int64, ids)), lambda ids: array("I", ids)]
)
def test_any_sequence_of_int_gives_the_same_ids(made: Callable[[list[int]], Any]) -> None:
    assert keys.pack_tokens(made(LARGE)) == packed(LARGE)


def test_a_range_gives_the_same_ids() -> None:
    assert keys.pack_tokens(range(3, 400, 7)) == packed(list(range(3, 400, 7)))


@pytest.mark.parametrize("code", "bBhHiIlLqQ")
def test_an_array_and_a_cast_buffer_give_the_same_ids(code: str) -> None:
    ids = array(code, SMALL)
    assert keys.pack_tokens(ids) == packed(SMALL)
    assert keys.pack_tokens(memoryview(ids)[::-1]) == packed(SMALL[::-1])
    assert keys.pack_tokens(memoryview(ids.tobytes()).cast(code)) == packed(SMALL)


def test_a_view_of_bytes_gives_what_it_shows_and_not_what_lies_around_it() -> None:
    ids = list(range(1, 9))
    view = memoryview(packed(ids)).cast("I")
    for shown in (slice(None), slice(2, None), slice(-3), slice(None, None, -1), slice(None, None, 2), slice(0)):
        assert keys.pack_tokens(view[shown]) == packed(ids[shown])


@pytest.mark.parametrize("dtype", NUMPY, ids=lambda dtype: dtype.str)
def test_numpy_integers_of_either_byte_order_give_the_same_ids(dtype: np.dtype[Any]) -> None:
    ids = SMALL if narrow(dtype) else LARGE
    assert keys.pack_tokens(np.array(ids, dtype)) == packed(ids)
    assert keys.pack_tokens(np.array([ids, ids], dtype).T[::-1, 0]) == packed(ids[::-1])


@pytest.mark.parametrize("dtype", TORCH, ids=str)
def test_torch_integers_give_the_same_ids(dtype: torch.dtype) -> None:
    ids = SMALL if narrow(dtype) else LARGE
    assert keys.pack_tokens(torch.tensor(ids, dtype=dtype)) == packed(ids)
    assert keys.pack_tokens(torch.tensor([ids, ids], dtype=dtype).T[:, 0]) == packed(ids)


def test_torch_without_numpy_gives_the_same_ids() -> None:
    code = (
        "import sys, warnings; sys.modules['numpy'] = None; warnings.simplefilter('ignore')\n"
        "import torch; from async_cache.prompt.keys import pack_tokens\n"
        "assert pack_tokens(torch.tensor([1, 2])) == pack_tokens([1, 2])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("ctype", [ctypes.c_uint8, ctypes.c_int16, ctypes.c_int32, ctypes.c_int64])
def test_an_array_of_c_gives_the_same_ids(ctype: Any) -> None:
    assert keys.pack_tokens((ctype * len(SMALL))(*SMALL)) == packed(SMALL)


@pytest.mark.parametrize(
    "nothing", [[], (), range(0), array("q"), memoryview(b"").cast("i"), *(np.array([], dtype) for dtype in NUMPY)]
)
def test_no_ids_are_no_ids(nothing: Any) -> None:
    assert keys.pack_tokens(nothing) == b""


@pytest.mark.parametrize("dtype", TORCH, ids=str)
def test_an_empty_tensor_is_no_ids(dtype: torch.dtype) -> None:
    assert keys.pack_tokens(torch.tensor([], dtype=dtype)) == b""


@pytest.mark.parametrize("token", [-(2**63), -(2**31), -1, 2**31, 2**32 + 1, 2**40, 2**63 - 1])
@pytest.mark.parametrize(
    "made",
    [
        list,
        tuple,
        lambda ids: array("q", ids),
        lambda ids: np.array(ids, "<i8"),
        lambda ids: np.array(ids, ">i8"),
        lambda ids: torch.tensor(ids, dtype=torch.int64),
    ],
)
def test_an_id_out_of_bounds_is_refused(made: Callable[[list[int]], Any], token: int) -> None:
    with pytest.raises(ValueError, match="between 0 and 2147483647"):
        keys.pack_tokens(made([1, token, 2]))


@pytest.mark.parametrize(
    "ids",
    [
        [2**63],
        (2**200,),
        range(-1, 3),
        array("b", [-1]),
        array("h", [-1]),
        array("i", [-1]),
        array("I", [2**31]),
        array("Q", [2**64 - 1]),
        np.array([-1], ">i2"),
        np.array([2**31], "u4"),
        np.array([2**63], "u8"),
        torch.tensor([-1], dtype=torch.int8),
        torch.tensor([-1], dtype=torch.int32),
        torch.tensor([2**31], dtype=torch.uint32),
    ],
)
def test_an_id_out_of_bounds_of_any_width_is_refused(ids: Any) -> None:
    with pytest.raises(ValueError, match="between 0 and 2147483647"):
        keys.pack_tokens(ids)


NO_IDS = [
    None,
    7,
    1.5,
    "123",
    b"123",
    bytearray(b"123"),
    {1, 2},
    {1: 2},
    object(),
    (token for token in (1, 2)),
    [1.0, 2.0],
    [1, None],
    ["1"],
    [b"1"],
    [Decimal(1)],
    [[1, 2], [3, 4]],
    array("f", [1.0]),
    array("u", "ab"),
    memoryview(b"abcd").cast("c"),
    memoryview(b"abcd").cast("?"),
    memoryview(b"abcd").cast("B", (2, 2)),
    np.int64(3),
    np.array(3),
    np.zeros((2, 2), "i4"),
    np.array([1.0]),
    np.array([1.0], "f2"),
    np.array([1j]),
    np.array([True]),
    np.array([1, 2], object),
    np.array(["1"]),
    np.array(["2020-01-01"], "M8[D]"),
    np.zeros(2, "i4,i4"),
    torch.tensor(3),
    torch.zeros((2, 2), dtype=torch.int64),
    torch.zeros((2, 2), dtype=torch.uint8),
    torch.tensor([1.0]),
    torch.tensor([1.0], dtype=torch.bfloat16),
    torch.tensor([1j]),
    torch.tensor([True]),
]


@pytest.mark.parametrize("thing", NO_IDS, ids=repr)
def test_what_is_no_flat_sequence_of_integers_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"^token ids must be "):
        keys.pack_tokens(thing)


# Salts and adapters.


@pytest.mark.parametrize("text", ["", "tenant-1", "x" * 128, "é" * 64, "日本 \u2028"])
def test_a_label_is_text_of_up_to_128_bytes(text: str) -> None:
    assert keys.check_label("salt", text) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x" * 129, "129 bytes long"),
        ("é" * 65, "130 bytes long"),
        ("a\nb", "control characters"),
        ("a\0", "control characters"),
        ("\x7f", "control characters"),
        ("\x85", "control characters"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_a_label_that_is_too_long_or_not_printable_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^salt .*{reason}"):
        keys.check_label("salt", text)


@pytest.mark.parametrize("label", [None, b"salt", 7])
def test_a_label_that_is_no_text_is_refused(label: Any) -> None:
    with pytest.raises(TypeError, match="salt must be a str"):
        keys.check_label("salt", label)


# Media.


def test_media_may_come_from_any_iterable() -> None:
    items = ((0, b"a"), (3, b"b" * 64))
    assert keys.check_media(list(map(list, items)), 4) == items  # type: ignore[arg-type]
    assert keys.check_media((item for item in items), 4) == items  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "media",
    [
        [(-1, b"a")],
        [(4, b"a")],
        [(2, b"a"), (1, b"b")],
        [(1, b"a"), (1, b"b")],
        [(0, b"")],
        [(0, b"x" * 65)],
    ],
)
def test_media_out_of_order_or_bounds_are_refused(media: Any) -> None:
    with pytest.raises(ValueError, match="media"):
        keys.check_media(media, 4)


@pytest.mark.parametrize(
    "media", [[1], ["ab"], [(1,)], [(1, b"a", 2)], [("1", b"a")], [(1.0, b"a")], [(True, b"a")], [(1, "a")], [None]]
)
def test_media_that_are_no_pairs_are_refused(media: Any) -> None:
    with pytest.raises(TypeError, match="media must be pairs"):
        keys.check_media(media, 4)


@pytest.mark.parametrize(
    "media", [[(1, b"other")], [(2, b"image")], [(1, b"imag"), (2, b"e")], [(1, b"image"), (2, b"image")], []]
)
def test_media_change_the_hash_of_their_chunk_and_those_after_it(media: Any) -> None:
    chain = [keys.chain_tokens(b"", bytes(32), 2, items) for items in ([(2, b"start"), (3, b"image")], media)]
    assert chain[0][0] == chain[1][0] or any(offset < 2 for offset, _ in media)
    assert all(one != other for one, other in zip(chain[0][1:], chain[1][1:], strict=True))


# Blocks of an engine.


def test_blocks_are_bytes_of_8_to_64() -> None:
    blocks = (b"x" * 8, b"y" * 64)
    assert keys.check_blocks(list(blocks)) == blocks
    assert keys.check_blocks([]) == ()


@pytest.mark.parametrize("blocks", ["text", b"bytes", bytearray(8), [1], ["x" * 8], [None], None, 7])
def test_blocks_that_are_no_bytes_are_refused(blocks: Any) -> None:
    with pytest.raises(TypeError):
        keys.check_blocks(blocks)


@pytest.mark.parametrize("size", [0, 7, 65])
def test_blocks_of_another_size_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"8 to 64 bytes, not {size}"):
        keys.check_blocks([b"x" * 32, b"x" * size])


# The format.


@given(st.lists(st.text(max_size=5), max_size=5), st.lists(st.text(max_size=5), max_size=5))
def test_roots_are_equal_only_for_equal_fields(one: list[str], other: list[str]) -> None:
    assert (keys.root(one) == keys.root(other)) == (one == other)


@given(
    ids=st.lists(st.integers(0, 2**31 - 1), max_size=40),
    chunk_tokens=st.integers(1, 9),
    offsets=st.sets(st.integers(0, 39)),
    digest=st.binary(min_size=1, max_size=64),
)
def test_a_chain_of_tokens_is_that_of_the_reference(
    ids: list[int], chunk_tokens: int, offsets: set[int], digest: bytes
) -> None:
    root = keys.root(["any"])
    media = [(offset, digest) for offset in sorted(offsets) if offset < len(ids)]
    chain = keys.chain_tokens(root, keys.pack_tokens(ids), chunk_tokens, media)
    assert chain == reference_tokens(root, ids, chunk_tokens, media)


@given(st.lists(st.binary(min_size=8, max_size=64), max_size=12), st.integers(1, 5))
def test_a_chain_of_blocks_is_that_of_the_reference(blocks: list[bytes], blocks_per_chunk: int) -> None:
    root = keys.root(["any"])
    assert keys.chain_blocks(root, blocks, blocks_per_chunk) == reference_blocks(root, blocks, blocks_per_chunk)


VECTORS: list[dict[str, Any]] = json.loads(
    "".join(re.findall(r"^```json\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL))
)


def test_there_are_vectors_of_all_domains() -> None:
    kinds = {"tokens", "context", "blocks", "digests"}
    assert kinds == {kind for kind in kinds for vector in VECTORS if kind in vector}


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_the_reference_has_the_keys_of_the_document(vector: dict[str, Any]) -> None:
    root = reference_root(*vector["fields"])
    chunk_tokens = vector["layout"]["chunk_tokens"]
    if "context" in vector:
        digest = blake3(b"".join(map(u32, vector["context"]))).hexdigest()
        assert vector["fields"][0] == f"segment/{len(vector['context'])}/{digest}"
    if "tokens" in vector:
        media = [(offset, bytes.fromhex(digest)) for offset, digest in vector["media"]]
        hashes = reference_tokens(root, vector["tokens"], chunk_tokens, media)
    elif "digests" in vector:
        digests = [bytes.fromhex(digest) for digest in vector["digests"]]
        hashes = [blake3(root + pack("<I", len(digest)) + digest).digest() for digest in digests]
    else:
        blocks = [bytes.fromhex(block) for block in vector["blocks"]]
        hashes = reference_blocks(root, blocks, chunk_tokens // vector["block_tokens"])
    assert root.hex() == vector["root"]
    assert [chunk_hash.hex() for chunk_hash in hashes] == vector["chunk_hashes"]


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_a_prompt_has_the_keys_of_the_document(vector: dict[str, Any]) -> None:
    groups = tuple(ObjectGroup(**group) for group in vector["layout"]["groups"])
    layout = ModelLayout(**vector["layout"] | {"groups": groups})
    labels = {"salt": vector["salt"], "adapter": vector["adapter"]}
    if "tokens" in vector:
        media = [(offset, bytes.fromhex(digest)) for offset, digest in vector["media"]]
        if "context" in vector:
            prompt = layout.segment(vector["tokens"], context=vector["context"], media=media, **labels)
        else:
            prompt = layout.prompt(vector["tokens"], media=media, **labels)
    elif "digests" in vector:
        prompt = layout.prompt_from_digests([bytes.fromhex(digest) for digest in vector["digests"]], **labels)
    else:
        blocks = [bytes.fromhex(block) for block in vector["blocks"]]
        prompt = layout.prompt_from_hashes(blocks, vector["block_tokens"], **labels)
    assert prompt.root.hex() == vector["root"]
    assert [chunk_hash.hex() for chunk_hash in prompt.chunk_hashes] == vector["chunk_hashes"]
    assert file_name(ObjectKey(prompt.chunk_hashes[-1], *vector["last_object"])) == vector["last_file"]
