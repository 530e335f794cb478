"""Roots: which others there are of a model and salt, and in what they differ."""

import pytest

from async_cache import ModelLayout, ObjectGroup
from async_cache.ledger.roots import Roots, differences

GROUP = ObjectGroup((16,), "uint8")
LAYOUT = ModelLayout("m", (GROUP,), chunk_tokens=4)
TOKENS = list(range(8))


def test_those_of_the_same_model_and_salt_are_beside_it_the_newest_first():
    roots = Roots()
    ours = LAYOUT.prompt(TOKENS, salt="a")
    others = [LAYOUT.prompt(TOKENS, salt="a", adapter=adapter) for adapter in ("x", "y")]
    for prompt in (
        ours,
        *others,
        LAYOUT.prompt(TOKENS, salt="b", adapter="x"),
        ModelLayout("n", (GROUP,)).prompt([1], salt="a"),
    ):
        roots.note(prompt)
    assert [root.adapter for root in roots.beside(ours)] == ["y", "x"]
    roots.note(others[0])
    assert [root.adapter for root in roots.beside(ours)] == ["x", "y"]


def test_the_oldest_are_forgotten():
    roots = Roots(most=3)
    ours = LAYOUT.prompt(TOKENS)
    for number in range(5):
        roots.note(LAYOUT.prompt(TOKENS, adapter=str(number)))
    assert [root.adapter for root in roots.beside(ours)] == ["4", "3", "2"]


def test_who_has_most_loses_his_own():
    roots = Roots(most=4)
    theirs = LAYOUT.prompt(TOKENS, salt="blue")
    roots.note(theirs)
    for number in range(20):
        roots.note(LAYOUT.prompt(TOKENS, adapter=str(number), salt="red"))
    assert [root.salt for root in roots] == ["red"] * 3 + ["blue"]
    assert [root.adapter for root in roots] == ["19", "18", "17", ""]


@pytest.mark.parametrize(
    ("layout", "adapter", "differs"),
    [
        (LAYOUT, "lora", ("adapter",)),
        (ModelLayout("m", (GROUP,), chunk_tokens=8, revision="2"), "", ("revision", "chunk_tokens")),
        (ModelLayout("m", (GROUP, GROUP), chunk_tokens=4, world_size=2), "", ("world_size", "groups")),
        (ModelLayout("m", (ObjectGroup((8,), "int16", ranks=(0,)),), chunk_tokens=4), "", ("dtype", "shape", "ranks")),
    ],
)
def test_the_fields_in_which_they_differ_are_named(layout, adapter, differs):
    roots = Roots()
    roots.note(layout.prompt(TOKENS, adapter=adapter))
    ours = LAYOUT.prompt(TOKENS)
    (root,) = roots.beside(ours)
    assert differences(ours, root) == differs
