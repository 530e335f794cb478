"""The circuit breaker: its states, by a clock that the test moves."""

import pytest

from async_cache.l2.guard.breaker import Breaker, BreakerState

CLOSED, OPEN, HALF_OPEN = BreakerState


def opened(failures: int = 3) -> Breaker:
    """A breaker that was opened at 100, and may be tried from 105 on."""
    breaker = Breaker(failures, 5.0)
    for _ in range(failures):
        breaker.failed(100.0)
    assert breaker.state is OPEN
    return breaker


@pytest.mark.parametrize("failures", [1, 2, 7])
def test_so_many_failures_in_a_row_open_it(failures: int) -> None:
    breaker = Breaker(failures, 5.0)
    for _ in range(failures):
        assert breaker.state is CLOSED
        assert breaker.allows(100.0) and breaker.begin(100.0)
        breaker.failed(100.0)
    assert breaker.state is OPEN
    assert not breaker.allows(104.9) and not breaker.begin(104.9)


def test_a_success_begins_the_count_anew() -> None:
    breaker = Breaker(2, 5.0)
    for _ in range(5):
        breaker.failed(100.0)
        breaker.succeeded()
    assert breaker.state is CLOSED


def test_a_call_that_was_given_up_counts_neither_way() -> None:
    breaker = Breaker(2, 5.0)
    breaker.failed(100.0)
    breaker.abandoned(100.0)
    assert breaker.state is CLOSED
    breaker.failed(100.0)
    assert breaker.state is OPEN
    breaker.abandoned(100.0)  # one that had begun before
    assert not breaker.allows(104.9)


def test_to_ask_whether_a_call_is_allowed_takes_no_trial() -> None:
    breaker = opened()
    assert breaker.allows(105.0) and breaker.allows(105.0)
    assert breaker.state is OPEN
    assert breaker.begin(105.0)


def test_one_trial_is_made_and_no_other_call_beside_it() -> None:
    breaker = opened()
    assert breaker.begin(105.0)
    assert breaker.state is HALF_OPEN
    assert not breaker.allows(109.9) and not breaker.begin(109.9)


def test_a_trial_that_succeeds_closes_it() -> None:
    breaker = opened()
    assert breaker.begin(105.0)
    breaker.succeeded()
    assert breaker.state is CLOSED
    assert breaker.begin(105.0) and breaker.begin(105.0)
    breaker.failed(106.0)
    assert breaker.state is CLOSED, "its failures are counted from the beginning"


def test_a_trial_that_fails_opens_it_for_as_long_again() -> None:
    breaker = opened()
    assert breaker.begin(105.0)
    breaker.failed(107.0)
    assert breaker.state is OPEN
    assert not breaker.allows(111.9)
    assert breaker.begin(112.0)


def test_a_trial_that_was_given_up_lets_the_next_call_try() -> None:
    breaker = opened()
    assert breaker.begin(105.0)
    breaker.abandoned(106.0)
    assert breaker.state is OPEN
    assert breaker.begin(106.0)
    assert not breaker.begin(106.0)


def test_a_trial_that_says_nothing_is_followed_by_another() -> None:
    breaker = opened()
    for trial in (105.0, 110.0, 115.0):
        assert breaker.begin(trial)
        assert breaker.state is HALF_OPEN
        assert not breaker.begin(trial + 4.9)
    breaker.succeeded()
    assert breaker.state is CLOSED


def test_a_call_from_before_that_succeeds_closes_it() -> None:
    breaker = opened()
    breaker.succeeded()
    assert breaker.state is CLOSED


def test_it_can_be_printed() -> None:
    breaker = Breaker(3, 5.0)
    breaker.failed(100.0)
    assert repr(breaker) == "<Breaker closed, 1 failures in a row of 3>"
    assert repr(opened()) == "<Breaker open, 3 failures in a row of 3>"
