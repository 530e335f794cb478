"""Coverage: the lengths of a prefix that the found objects can serve, against their definition."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_cache.prompt import coverage
from async_cache.prompt.layout import ModelLayout
from async_cache.prompt.objects import ObjectGroup


def layout_of(*groups: tuple[int | None, tuple[int, ...] | None], world_size: int = 1) -> ModelLayout:
    """Groups given as (window_chunks, ranks)."""
    made = (ObjectGroup((1,), "uint8", window_chunks=window, ranks=ranks) for window, ranks in groups)
    return ModelLayout("model", tuple(made), world_size=world_size)


@st.composite
def layouts(draw: st.DrawFn) -> ModelLayout:
    world_size = draw(st.integers(1, 3))
    ranks = st.none() | st.sets(st.integers(0, world_size - 1), min_size=1).map(tuple)
    groups = st.lists(st.tuples(st.none() | st.integers(1, 4), ranks), min_size=1, max_size=3)
    return layout_of(*draw(groups), world_size=world_size)


@st.composite
def finds(draw: st.DrawFn) -> tuple[ModelLayout, list[int]]:
    """A layout, and for each chunk what was found of it: often all, or all but one object."""
    layout = draw(layouts())
    full = layout.objects.full_mask
    bits = [1 << bit for bit in range(full.bit_length()) if full >> bit & 1]
    mask = st.just(full) | st.sampled_from(bits).map(lambda bit: full & ~bit) | st.integers(0, full)
    return layout, draw(st.lists(mask, max_size=8))


def serves(layout: ModelLayout, found: list[int], length: int) -> bool:
    """The definition: every rank of every group has each chunk of the prefix, or the last ones if it has a window."""
    for g, group in enumerate(layout.groups):
        for rank in range(layout.world_size) if group.ranks is None else group.ranks:
            first = 0 if group.window_chunks is None else max(0, length - group.window_chunks)
            if not all(found[chunk] >> layout.objects.bit(rank, g) & 1 for chunk in range(first, length)):
                return False
    return True


@given(finds())
def test_the_lengths_are_those_of_the_definition(case: tuple[ModelLayout, list[int]]) -> None:
    layout, found = case
    assert list(coverage.lengths(layout, found)) == [n for n in range(len(found) + 1) if serves(layout, found, n)]


@given(finds(), st.integers(0, 9))
def test_the_largest_length_is_stepped_down_to(case: tuple[ModelLayout, list[int]], at_most: int) -> None:
    layout, found = case
    largest = coverage.largest(coverage.lengths(layout, found), at_most)
    assert largest == max(n for n in range(min(at_most, len(found)) + 1) if serves(layout, found, n))


@given(layouts(), st.integers(0, 8))
def test_what_is_needed_serves_and_nothing_less_does(layout: ModelLayout, length: int) -> None:
    needed = list(coverage.needed(layout, length))
    assert len(needed) == length
    assert serves(layout, needed, length)
    for chunk, mask in enumerate(needed):
        for bit in range(mask.bit_length()):
            if mask >> bit & 1:
                assert not serves(layout, [*needed[:chunk], mask & ~(1 << bit), *needed[chunk + 1 :]], length)


def test_a_gap_ends_a_prefix_with_full_attention() -> None:
    assert list(coverage.lengths(layout_of((None, None)), [1, 1, 0, 1])) == [0, 1, 2]


def test_a_window_leaves_gaps_between_the_lengths() -> None:
    full_and_window = layout_of((None, None), (2, None))
    assert list(coverage.lengths(full_and_window, [0b11, 0b01, 0b11, 0b11, 0b01])) == [0, 1, 4]


def test_only_the_window_of_a_prefix_without_full_attention_is_needed() -> None:
    assert list(coverage.lengths(layout_of((1, None)), [0, 0, 1])) == [0, 3]


def test_a_window_that_reaches_before_the_first_chunk_is_cut_there() -> None:
    assert list(coverage.lengths(layout_of((5, None)), [1, 1])) == [0, 1, 2]


def test_a_chunk_that_one_rank_lacks_is_no_hit() -> None:
    assert list(coverage.lengths(layout_of((None, None), world_size=3), [0b111, 0b101, 0b111])) == [0, 1]


def test_a_rank_that_does_not_hold_a_group_is_not_waited_for() -> None:
    assert list(coverage.lengths(layout_of((None, (1,)), world_size=2), [0b10, 0b10])) == [0, 1, 2]


def test_more_than_what_is_needed_does_no_harm() -> None:
    assert list(coverage.lengths(layout_of((None, (1,)), world_size=2), [0b11])) == [0, 1]


@pytest.mark.parametrize("window", [None, 1])
def test_nothing_found_serves_the_empty_prefix(window: int | None) -> None:
    layout = layout_of((window, None))
    assert list(coverage.lengths(layout, [])) == list(coverage.lengths(layout, [0, 0])) == [0]
    assert list(coverage.needed(layout, 0)) == []


# Several prompts.


def test_of_each_run_a_prefix_is_needed_whatever_is_of_the_others() -> None:
    layout = layout_of((None, None))
    runs = [range(3), range(3, 5), [0, 1, 5]]
    assert [list(coverage.run_of(run, [1, 2, 3, 4, 5, 6])) for run in runs] == [[1, 2, 3], [4, 5], [1, 2, 6]]
    assert list(coverage.needed_of(layout, runs, [1, 2, 2])) == [1, 1, 0, 1, 1]
    assert list(coverage.covered(runs, [1, 2, 2])) == [1, 1, 0, 1, 1]
    assert list(coverage.numbers_of(runs, [1, 2, 2])) == [0, 3, 4, 0, 1]
    assert list(coverage.needed_of(layout, runs, [0, 0, 0])) == list(coverage.covered(runs, [0, 0, 0])) == []


def test_a_cut_falls_into_each_run_where_its_numbers_reach_it() -> None:
    runs = [range(3), range(3, 5), [0, 1, 5]]
    assert [[coverage.before(run, cut) for run in runs] for cut in (0, 2, 4, 9)] == [
        [0, 0, 0],
        [2, 0, 2],
        [3, 1, 2],
        [3, 2, 3],
    ]


def test_a_chunk_that_two_runs_have_needs_what_either_needs() -> None:
    full_and_window = layout_of((None, None), (1, None))
    assert list(coverage.needed_of(full_and_window, [[0, 1, 2], [0, 1, 3]], [3, 1])) == [0b11, 0b01, 0b11]
