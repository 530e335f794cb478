"""What a kind of chunk is worth, whatever was learned of it."""

from array import array
from math import exp, isfinite
from random import Random

import pytest

from async_cache.retention.reuse import (
    BIN_ENDS,
    BINS,
    NO_GAP,
    RANKS,
    Kind,
    ReuseModel,
    octave_of,
    output_of,
    rank_of,
)


def numbers_of(model: ReuseModel) -> "array[float]":
    """The weights that it has learned, and the squares of their gradients."""
    return array("f", model.learned()[8:])


def knows(model: ReuseModel, numbers: "array[float]") -> None:
    model.recall(bytes(8) + numbers.tobytes())


@pytest.mark.parametrize("weight", [0.0, 5.0, 40.0, 800.0, 1e11, -40.0, -1e11])
def test_what_is_sure_to_be_used_or_never_is_worth_something_in_each_bin(weight: float) -> None:
    model = ReuseModel()
    knows(model, array("f", [weight]) * len(numbers_of(model)))
    kind = model.kind(1, False, 0, octave_of(100), *output_of(10), 0, NO_GAP)
    assert all(RANKS <= model.rank(kind, bin) < 2 * RANKS for bin in range(BINS))
    for used in (True, False):
        model.learn([(kind, 1)], 5, used=used)
    assert all(map(isfinite, numbers_of(model)))


def test_what_comes_back_after_some_seconds_is_worth_most_just_before() -> None:
    model = ReuseModel()
    kind = model.kind(1, False, 0, octave_of(100), *output_of(None), 0, NO_GAP)
    for _ in range(2000):
        for bin in range(9):
            model.learn([(kind, 1)], bin, used=bin == 8)
    ranks = [model.rank(kind, bin) for bin in range(BINS)]
    assert ranks[:8] == sorted(ranks[:8]) and ranks[7] > ranks[0] + 16, "twice as much"


def some_kinds(model: ReuseModel, count: int) -> list[Kind]:
    dice = Random(count)
    return [
        model.kind(
            dice.randrange(1, 80),
            dice.random() < 0.5,
            dice.randrange(4),
            dice.randrange(17),
            *output_of(dice.choice([None, dice.randrange(4000)])),
            dice.randrange(20),
            dice.randrange(NO_GAP + 1),
        )
        for _ in range(count)
    ]


def learned_at_random(seed: int) -> ReuseModel:
    """A model that knows something of all kinds."""
    model, dice = ReuseModel(), Random(seed)
    size = len(numbers_of(model)) // 2
    knows(model, array("f", [dice.gauss(0, 0.5) for _ in range(size)]) + array("f", [1.0]) * size)
    return model


def hazards(model: ReuseModel, kind: Kind) -> list[float]:
    """What it takes as the chance of a use in each bin: the logit is the sum of the weights that a lesson changes."""
    weights = numbers_of(model)
    found = []
    for bin in range(BINS):
        probe = ReuseModel()
        probe.learn([(kind, 1)], bin, used=True)
        changed = [place for place, weight in enumerate(numbers_of(probe)[: len(weights) // 2]) if weight]
        found.append(1 / (1 + exp(3.0 - sum(weights[place] for place in changed))))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_rank_is_that_of_the_best_ratio_of_uses_to_time_over_all_horizons(seed: int) -> None:
    """Against a slow model, bin by bin."""
    model = learned_at_random(seed)
    for kind in some_kinds(model, 4):
        unused, spent = [1.0], [0.0]
        for chance, begin, end in zip(hazards(model, kind), [0.0, *BIN_ENDS], BIN_ENDS, strict=False):
            unused.append(unused[-1] * (1 - chance))
            spent.append(spent[-1] + (unused[-2] + unused[-1]) / 2 * (end - begin))
        best = [
            max((unused[now] - unused[then]) / (spent[then] - spent[now]) for then in range(now + 1, BINS + 1))
            for now in range(BINS)
        ]
        for bin in range(BINS):
            worth = (best[bin] + best[min(bin + 1, BINS - 1)]) / 2
            assert abs(model.rank(kind, bin) - rank_of(worth)) <= 1, "but for rounding"


@pytest.mark.parametrize("count", [1, 11, 12, 13, 40])
def test_kinds_that_are_judged_together_are_worth_what_each_is_alone(count: int) -> None:
    together, alone = learned_at_random(0), learned_at_random(0)
    kinds, same = some_kinds(together, count), some_kinds(alone, count)
    together.judge(kinds)
    for kind, other in zip(kinds, same, strict=True):
        alone._new.clear()
        assert [together.rank(kind, bin) for bin in range(BINS)] == [alone.rank(other, bin) for bin in range(BINS)]


def test_lessons_count_before_they_are_learned() -> None:
    model = ReuseModel()
    kind = model.kind(1, False, 0, 5, *output_of(10), 0, NO_GAP)
    for _ in range(3):
        model.learn([(kind, 4), (kind, 1)], 2, used=False)
    assert model.lessons == 6
    after = ReuseModel()
    after.recall(model.learned())
    assert after.lessons == 6 and numbers_of(after) == numbers_of(model) != numbers_of(ReuseModel())
