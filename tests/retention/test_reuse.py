"""What a kind of chunk is worth, whatever was learned of it."""

from array import array
from math import isfinite

import pytest

from async_cache.retention.reuse import BINS, NO_GAP, ReuseModel, octave_of, output_of


@pytest.mark.parametrize("weight", [0.0, 5.0, 40.0, 800.0, 1e11, -40.0, -1e11])
def test_what_is_sure_to_be_used_or_never_is_worth_something_in_each_bin(weight: float) -> None:
    model = ReuseModel()
    learned = model.learned()
    numbers = array("f", [weight]) * ((len(learned) - 8) // 4)
    model.recall(
        learned[:8] + array("f", map(abs, numbers)).tobytes() if weight < 0 else learned[:8] + numbers.tobytes()
    )
    if weight < 0:
        for weights in model._of_groups:
            weights[:] = array("d", [weight]) * len(weights)
    kind = model.kind(1, False, 0, octave_of(100), *output_of(10), 0, NO_GAP)
    worths = [model.worth(kind, bin) for bin in range(BINS)]
    assert all(isfinite(worth) and worth >= 0 for worth in worths)
    for used in (True, False):
        model.learn([(kind, 1.0)], 5, used)
    assert all(isfinite(number) for weights in model._of_groups for number in weights)


def test_what_comes_back_after_some_seconds_is_worth_most_just_before() -> None:
    model = ReuseModel()
    kind = model.kind(1, False, 0, octave_of(100), *output_of(None), 0, NO_GAP)
    for _ in range(2000):
        for bin in range(9):
            model.learn([(kind, 1.0)], bin, bin == 8)
    kind.worths = None
    worths = [model.worth(kind, bin) for bin in range(BINS)]
    assert worths[:8] == sorted(worths[:8]) and worths[7] > 2 * worths[0]
