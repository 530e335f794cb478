"""Layouts and prompts: what separates two roots, when a prompt is hashed, and where the objects of a chunk lie."""

import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref
from array import array
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from async_cache.prompt import keys
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import ModelLayout, Prompt, TokenSource, check_ranks
from async_cache.prompt.objects import ObjectGroup

GROUP = ObjectGroup((2, 4), "float16")
LAYOUT = ModelLayout("model", (GROUP,), chunk_tokens=4, world_size=2, revision="main")
IDS = list(range(8))
BLOCKS = [bytes([n]) * 32 for n in range(4)]

# Three ranks; everything on all of them, a window on two, and one group on a single rank.
MIXED = ModelLayout(
    "model",
    (
        ObjectGroup((3, 1000), "float16"),
        ObjectGroup((5,), "uint8", window_chunks=2, ranks=(2, 0)),
        ObjectGroup((1024,), "float32", ranks=(1,)),
    ),
    world_size=3,
)


# The root.

SEPARATED: dict[str, Callable[[], Prompt]] = {
    "itself": lambda: LAYOUT.prompt(IDS),
    "domain": lambda: LAYOUT.prompt_from_hashes(BLOCKS, 2),
    "block_tokens": lambda: LAYOUT.prompt_from_hashes(BLOCKS, 4),
    "digests": lambda: LAYOUT.prompt_from_digests(BLOCKS),
    "a segment": lambda: LAYOUT.segment(IDS),
    "a context": lambda: LAYOUT.segment(IDS, context=[7]),
    "a context of zeros": lambda: LAYOUT.segment(IDS, context=[0]),
    "a longer context of zeros": lambda: LAYOUT.segment(IDS, context=[0, 0]),
    "behind the same ids": lambda: LAYOUT.segment(IDS, context=IDS[:4]),
    "model": lambda: replace(LAYOUT, model="other").prompt(IDS),
    "revision": lambda: replace(LAYOUT, revision="other").prompt(IDS),
    "adapter": lambda: LAYOUT.prompt(IDS, adapter="a"),
    "salt": lambda: LAYOUT.prompt(IDS, salt="a"),
    "chunk_tokens": lambda: replace(LAYOUT, chunk_tokens=2).prompt(IDS),
    "world_size": lambda: replace(LAYOUT, world_size=3, groups=(replace(GROUP, ranks=(0, 1)),)).prompt(IDS),
    "dtype": lambda: replace(LAYOUT, groups=(replace(GROUP, dtype="bfloat16"),)).prompt(IDS),
    "shape": lambda: replace(LAYOUT, groups=(replace(GROUP, shape=(4, 2)),)).prompt(IDS),
    "window_chunks": lambda: replace(LAYOUT, groups=(replace(GROUP, window_chunks=1),)).prompt(IDS),
    "ranks": lambda: replace(LAYOUT, groups=(replace(GROUP, ranks=(1,)),)).prompt(IDS),
    "a second group": lambda: replace(LAYOUT, groups=(GROUP, GROUP)).prompt(IDS),
    "model and revision": lambda: replace(LAYOUT, model="modelm", revision="ain").prompt(IDS),
}


@pytest.mark.parametrize("field", SEPARATED)
def test_what_differs_in_one_field_never_meets(field: str) -> None:
    others = [made() for name, made in SEPARATED.items() if name != field]
    prompt = SEPARATED[field]()
    assert prompt.chunk_hashes
    assert prompt.root not in [other.root for other in others]
    assert not set(prompt.chunk_hashes) & {one for other in others for one in other.chunk_hashes}


def test_ten_thousand_pairs_that_differ_in_one_thing_share_no_chunk_and_equal_ones_share_all() -> None:
    random = Random(18)
    halves = replace(LAYOUT, chunk_tokens=2)
    for n in range(10_000):
        ids, context = ([random.randrange(9) for _ in range(size)] for size in (12, random.randrange(6)))
        salt, adapter = random.choice("ab"), random.choice("ab")
        labels = {"salt": salt, "adapter": adapter}
        one = LAYOUT.segment(ids, context=context, **labels)
        assert LAYOUT.segment(ids, context=context, **labels).same_as(one)
        match n % 7:
            case 0:
                other = LAYOUT.segment(ids, context=context, salt=salt + "c", adapter=adapter)
            case 1:
                other = LAYOUT.segment(ids, context=context, salt=salt, adapter=adapter + "c")
            case 2:
                other = LAYOUT.segment(ids, context=[*context, 0], **labels)
            case 3:
                other = LAYOUT.segment(ids, context=[token + 1 for token in context] or [1], **labels)
            case 4:
                other = halves.segment(ids, context=context, **labels)
            case 5:
                other = LAYOUT.prompt(ids, **labels)
            case _:
                other = LAYOUT.prompt(context + ids, **labels)
        assert not other.same_as(one) and not one.same_as(other)
        assert not set(one.chunk_hashes) & set(other.chunk_hashes)


def test_a_segment_counts_its_context_apart() -> None:
    segment = LAYOUT.segment(np.arange(9), context=array("i", [5, 6, 7]))
    assert (segment.tokens, len(segment), segment.base_tokens) == (9, 2, 3)
    assert LAYOUT.segment(range(9)).base_tokens == LAYOUT.prompt(range(9)).base_tokens == 0


@pytest.mark.parametrize("tokens", [0, 5, 4096, 4097], ids=lambda tokens: f"{tokens} tokens")
def test_a_context_is_the_same_whatever_it_came_as_and_only_as_a_whole(tokens: int) -> None:
    context = list(range(tokens))
    ways = [context, tuple(context), array("q", context), memoryview(array("i", context).tobytes()).cast("i")]
    domain = f"segment/{tokens}/{blake3(array('I', context).tobytes()).hexdigest()}"
    root = keys.root([domain, LAYOUT.model, LAYOUT.revision, "", ""], LAYOUT._packed_shape)
    for way in (*ways, *ways):  # computed, and known
        assert LAYOUT.segment([1], context=way).root == root
    for other in (context[1:], context[:-1], context[::-1]) if tokens else ():
        assert LAYOUT.segment([1], context=other).root != root


def test_a_segment_is_chained_within_itself() -> None:
    one, other = LAYOUT.segment([1, 2, 3, 4, 5, 6, 7, 8]), LAYOUT.segment([1, 2, 3, 4, 9, 9, 9, 9])
    assert one.chunk_hashes[0] == other.chunk_hashes[0] and one.chunk_hashes[1] != other.chunk_hashes[1]


def test_what_can_be_no_segment_is_refused() -> None:
    with pytest.raises(ValueError, match="a layout with windows has no segments"):
        MIXED.segment(IDS)
    with pytest.raises(TypeError, match="token ids must be"):
        LAYOUT.segment(IDS, context="text")
    with pytest.raises(ValueError, match="token ids must be between"):
        LAYOUT.segment(IDS, context=[-1])


def test_a_segment_under_another_layout_has_the_same_context() -> None:
    segment = LAYOUT.segment([1, 2, 3, 4, 5, 6], context=[7])
    two = replace(LAYOUT, chunk_tokens=2)
    under = segment.under(two, "a")
    assert under is not None and under.same_as(two.segment([1, 2, 3, 4], context=[7], adapter="a"))
    assert under.base_tokens == 1 and segment.under(MIXED, "") is None


@pytest.mark.parametrize(
    "layout",
    [
        replace(LAYOUT, readers_per_rank=8),
        replace(LAYOUT, groups=[GROUP]),  # type: ignore[arg-type]
        replace(LAYOUT, groups=(replace(GROUP, shape=[2, 4]),)),  # type: ignore[arg-type]
        replace(LAYOUT, groups=(replace(GROUP, ranks=(1, 0)),)),
    ],
)
def test_what_does_not_change_the_bytes_does_not_change_the_keys(layout: ModelLayout) -> None:
    assert layout.prompt(IDS).chunk_hashes == LAYOUT.prompt(IDS).chunk_hashes


def test_the_hash_seed_of_the_process_does_not_change_the_keys() -> None:
    code = (
        "from async_cache import ModelLayout, ObjectGroup\n"
        "layout = ModelLayout('m', (ObjectGroup((2,), 'uint8', ranks=(1, 0)),), chunk_tokens=2, world_size=2)\n"
        "print(layout.prompt(range(4), salt='s', media=[(1, b'x')]).chunk_hashes)"
    )
    outputs = {
        subprocess.check_output([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed})
        for seed in ("0", "1", "4294967295")
    }
    assert len(outputs) == 1


# Prompts.


@pytest.mark.parametrize(("tokens", "chunks"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2)])
def test_a_tail_shorter_than_a_chunk_has_no_hash(tokens: int, chunks: int) -> None:
    prompt = LAYOUT.prompt(range(tokens))
    assert (prompt.tokens, len(prompt), len(prompt.chunk_hashes)) == (tokens, chunks, chunks)
    assert prompt.chunk_hashes == LAYOUT.prompt(range(8)).chunk_hashes[:chunks]


def test_a_million_tokens_are_hashed_when_they_are_first_used() -> None:
    ids = np.arange(1_000_000)
    prompt = ModelLayout("model", (GROUP,)).prompt(ids)
    assert not prompt.hashed
    previous, expected = prompt.root, []
    for begin in range(0, 1_000_000 // 256 * 256, 256):
        previous = blake3(previous + ids[begin : begin + 256].astype("<u4").tobytes()).digest()
        expected.append(previous)
    assert prompt.chunk_hashes == expected
    assert prompt.hashed


def test_two_threads_that_hash_a_prompt_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    together, chain = threading.Barrier(2), keys.chain_tokens

    def chain_together(*arguments: Any) -> list[bytes]:
        together.wait(timeout=100)
        return chain(*arguments)

    prompt = LAYOUT.prompt(range(40_000))
    expected = chain(prompt.root, keys.pack_tokens(range(40_000)), 4)
    monkeypatch.setattr(keys, "chain_tokens", chain_together)
    threads = [threading.Thread(target=prompt.hash) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert prompt.chunk_hashes == expected


def test_a_thread_that_comes_while_another_finishes_does_not_undo_it() -> None:
    class Overtaken(Prompt):
        """Its root is asked for after `hash` has seen that there are no hashes: there, another thread finishes."""

        overtaken = False

        def __getattribute__(self, name: str) -> Any:
            if name == "root" and not type(self).overtaken:
                type(self).overtaken = True
                self.hash()
            return super().__getattribute__(name)

    packed = keys.pack_tokens(range(40_000))
    prompt = Overtaken(LAYOUT, b"root", 40_000, "", "", TokenSource(packed))
    assert prompt.chunk_hashes == keys.chain_tokens(b"root", packed, 4)


def test_media_in_the_tail_do_not_count() -> None:
    assert LAYOUT.prompt(range(6), media=[(5, b"x")]).same_as(LAYOUT.prompt(range(6)))
    with pytest.raises(ValueError, match="within 6 tokens"):
        LAYOUT.prompt(range(6), media=[(6, b"x")])


@pytest.mark.parametrize("tokens", [5, 8, 40_001], ids=["hashed", "hashed, no tail", "not hashed"])
def test_prompts_are_the_same_if_their_chunks_are(tokens: int) -> None:
    prompt = LAYOUT.prompt(range(tokens))
    assert prompt.same_as(prompt)
    assert prompt.same_as(LAYOUT.prompt(list(range(tokens))))
    assert not prompt.same_as(LAYOUT.prompt(range(1, tokens + 1)))
    assert not prompt.same_as(LAYOUT.prompt(range(tokens + 1)))
    assert not prompt.same_as(LAYOUT.prompt(range(tokens), salt="other"))
    assert not prompt.same_as(LAYOUT.prompt(range(tokens), media=[(2, b"x")]))


def test_a_long_prompt_is_compared_without_hashing_it() -> None:
    one, other = (LAYOUT.prompt([*range(40_000), tail], media=[(40_000, bytes([tail]))]) for tail in (1, 2))
    assert one.same_as(other)
    assert not one.hashed and not other.hashed
    other.hash()
    assert one.same_as(other)


def test_an_adapter_or_a_salt_that_can_not_be_used_is_refused() -> None:
    for label in ("adapter", "salt"):
        with pytest.raises(ValueError, match=f"{label} contains control characters"):
            LAYOUT.prompt(IDS, **{label: "a\n"})
        with pytest.raises(ValueError, match=f"{label} is 129 bytes long"):
            LAYOUT.prompt_from_hashes(BLOCKS, 2, **{label: "x" * 129})


# Prompts from an engine's hashes.


@pytest.mark.parametrize(("blocks", "block_tokens", "chunks"), [(0, 2, 0), (1, 2, 0), (3, 2, 1), (4, 2, 2), (3, 4, 3)])
def test_blocks_that_fill_no_chunk_have_no_hash(blocks: int, block_tokens: int, chunks: int) -> None:
    prompt = LAYOUT.prompt_from_hashes(BLOCKS[:blocks], block_tokens)
    assert (prompt.tokens, len(prompt), len(prompt.chunk_hashes)) == (blocks * block_tokens, chunks, chunks)
    assert prompt.hashed


def test_a_run_of_digests_has_the_hashes_of_its_chunks_wherever_it_begins() -> None:
    whole = LAYOUT.prompt_from_digests(BLOCKS)
    assert (whole.tokens, len(whole), whole.hashed) == (16, 4, True)
    assert LAYOUT.prompt_from_digests(BLOCKS[2:]).chunk_hashes == whole.chunk_hashes[2:]
    assert LAYOUT.prompt_from_digests(BLOCKS[:1], salt="x").chunk_hashes != whole.chunk_hashes[:1]
    assert len(LAYOUT.prompt_from_digests([])) == 0


def test_runs_of_digests_are_the_same_only_if_all_digests_are() -> None:
    one, other = LAYOUT.prompt_from_digests(BLOCKS[:2]), LAYOUT.prompt_from_digests([BLOCKS[3], BLOCKS[1]])
    assert one.same_as(LAYOUT.prompt_from_digests(BLOCKS[:2]))
    assert not one.same_as(other)


def test_a_digest_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="a digest is there twice"):
        LAYOUT.prompt_from_digests(BLOCKS + BLOCKS[:1])


@pytest.mark.parametrize("block_tokens", [3, 8])
def test_a_chunk_that_is_no_multiple_of_the_block_is_refused(block_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"chunk_tokens 4 is not a multiple of block_tokens {block_tokens}"):
        LAYOUT.prompt_from_hashes(BLOCKS, block_tokens)


@pytest.mark.parametrize(
    ("block_tokens", "error"), [(0, ValueError), (-4, ValueError), (2.0, TypeError), (None, TypeError)]
)
def test_a_block_size_that_is_no_count_is_refused(block_tokens: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="block_tokens must be"):
        LAYOUT.prompt_from_hashes(BLOCKS, block_tokens)


# Layouts that can not be.


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"model": ""}, ValueError),
        ({"model": None}, TypeError),
        ({"model": "\ud800"}, ValueError),
        ({"revision": 1}, TypeError),
        ({"revision": "\udfff"}, ValueError),
        ({"groups": ()}, ValueError),
        ({"groups": ("float16",)}, ValueError),
        ({"groups": (GROUP,) * 2049}, ValueError),
        ({"groups": (replace(GROUP, ranks=()),)}, ValueError),
        ({"groups": (replace(GROUP, ranks=(0, 0)),)}, ValueError),
        ({"groups": (replace(GROUP, ranks=(2,)),)}, ValueError),
        ({"groups": (replace(GROUP, ranks=(-1,)),)}, ValueError),
        ({"groups": (replace(GROUP, ranks=("0",)),)}, TypeError),  # type: ignore[arg-type]
        ({"chunk_tokens": 0}, ValueError),
        ({"chunk_tokens": 256.0}, TypeError),
        ({"world_size": -1}, ValueError),
        ({"world_size": True}, TypeError),
        ({"world_size": None}, TypeError),
        ({"readers_per_rank": 0}, ValueError),
    ],
    ids=str,
)
def test_a_layout_that_can_not_be_is_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments)).removesuffix("s") + "|rank"):
        replace(LAYOUT, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"shape": ()}, ValueError),
        ({"shape": (2, 0)}, ValueError),
        ({"shape": (2, -1)}, ValueError),
        ({"shape": (2.0,)}, ValueError),
        ({"dtype": "float17"}, ValueError),
        ({"window_chunks": 0}, ValueError),
        ({"window_chunks": 1.0}, TypeError),
    ],
    ids=str,
)
def test_a_group_that_can_not_be_is_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        replace(GROUP, **arguments)


def test_a_layout_that_was_used_can_be_sent_to_another_process() -> None:
    assert LAYOUT.objects.sizes[LAYOUT.objects.full_mask] == 32
    assert pickle.loads(pickle.dumps(LAYOUT)) == LAYOUT


def test_ranks_are_distinct_and_ascending() -> None:
    assert check_ranks([2, 0], 3) == (0, 2)
    for ranks in ((), (1, 1), (3,)):
        with pytest.raises(ValueError, match="rank"):
            check_ranks(ranks, 3)


# The objects of a chunk.


def test_an_object_is_the_bit_of_its_rank_and_group() -> None:
    held = [(0, 0), (0, 1), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert MIXED.objects.full_mask == sum(1 << rank * 3 + group for rank, group in held)
    assert MIXED.objects.members[MIXED.objects.full_mask] == tuple(held)
    assert MIXED.objects.ranks[MIXED.objects.full_mask] == (0, 1, 2)
    assert MIXED.objects.keys([(b"one", MIXED.objects.full_mask), (b"none", 0), (b"two", 0b10)]) == [
        *(ObjectKey(b"one", *place) for place in held),
        ObjectKey(b"two", 0, 1),
    ]


def test_masks_say_what_each_rank_holds_and_what_a_prefix_needs() -> None:
    assert MIXED.objects.rank_masks == (0b011, 0b101 << 3, 0b011 << 6)
    assert MIXED.objects.mask_of_ranks((0, 2)) == 0b011_000_011
    assert MIXED.objects.mask_of_ranks((0, 1, 2)) == MIXED.objects.full_mask
    assert MIXED.objects.windows == ((2, 0b010_000_010),)
    assert MIXED.objects.prefix_mask == 0b001_101_001


def test_groups_of_one_window_share_its_mask() -> None:
    groups = tuple(replace(GROUP, window_chunks=window) for window in (4, 1, 4))
    assert ModelLayout("model", groups).objects.windows == ((1, 0b010), (4, 0b101))


def test_sizes_are_those_of_the_objects() -> None:
    assert [group.size_bytes for group in MIXED.groups] == [6000, 5, 4096]
    assert MIXED.objects.sizes[MIXED.objects.full_mask] == 3 * 6000 + 2 * 5 + 4096
    assert MIXED.objects.sizes[0] == 0


def test_the_objects_of_a_rank_lie_one_after_the_other() -> None:
    assert MIXED.objects.spans == (
        ((0, 6000), (6000, 6005), None),
        ((0, 6000), None, (6000, 10096)),
        ((0, 6000), (6000, 6005), None),
    )
    assert MIXED.block_bytes == (6005, 10096, 6005)


def test_the_room_of_a_rank_is_whole_pages() -> None:
    assert MIXED.objects.room_bytes == (8192, 12288, 8192)
    page = replace(LAYOUT, groups=(ObjectGroup((4096,), "uint8", ranks=(1,)),))
    assert page.objects.room_bytes == (0, 4096)


def test_what_is_known_of_masks_goes_with_its_layout_and_waits_for_no_collection() -> None:
    gc.collect()
    gc.disable()
    try:
        layout = ModelLayout("model", (ObjectGroup((2,), "int8"), ObjectGroup((3,), "int8")), world_size=3)
        objects = layout.objects
        full = objects.full_mask
        known = (objects.members[full], objects.places[full], objects.sizes[full], objects.ranks[full])
        assert all(known)
        gone = weakref.ref(objects)
        del layout, objects
        assert gone() is None
    finally:
        gc.enable()


def test_prompts_of_one_origin_have_it_in_common() -> None:
    """A collection of garbage looks at each object: of a million chunks, at one."""
    first, second = (LAYOUT.prompt(range(8), salt="one", adapter="a") for _ in range(2))
    assert first.origin is second.origin
