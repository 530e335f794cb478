"""Names that clients make up are shown up to a bound; whoever has the most traffic is among those shown."""

from async_cache.metrics.names import OTHER, Names


def test_the_first_are_shown_and_the_rest_is_other() -> None:
    names = Names(2)
    assert [names.show(name) for name in ("a", "b", "c", "a", OTHER)] == ["a", "b", OTHER, "a", OTHER]


def test_a_long_name_is_cut() -> None:
    names = Names(2)
    assert names.show("x" * 1000) == names.show("x" * 1000) == "x" * 128


def test_much_more_traffic_takes_the_place_of_the_least() -> None:
    names = Names(2)
    for name in "abc":
        names.show(name)
    assert not names.rank({"a": 10, "b": 5, "c": 10}), "twice as much is not much more"
    assert names.rank({"a": 10, "b": 5, "c": 11})
    assert [names.show(name) for name in "abc"] == ["a", OTHER, "c"]


def test_other_never_takes_a_place() -> None:
    names = Names(1)
    names.show("a")
    assert not names.rank({"a": 1, OTHER: 100})


def test_nobody_goes_while_there_is_room():
    names = Names(2)
    assert not names.rank({"a": 5.0})  # counted, and not shown yet
    names.show("a")
    assert not names.rank({"a": 1.0, "b": 5.0})
    assert names.show("a") == "a" and names.show("b") == "b"
