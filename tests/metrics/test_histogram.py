"""A histogram counts each value once, at the first bound that it does not exceed."""

from async_cache.metrics.histogram import FAST_SECONDS, SLOW_SECONDS, Histogram


def test_values_are_counted_at_their_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    assert (histogram.counts, histogram.total) == ([2, 2, 1], 14.0)


def test_a_quantile_is_a_bound() -> None:
    histogram = Histogram((1.0, 2.0, 3.0))
    assert histogram.quantile(0.5) is None
    for value in (0.5, 0.6, 1.5, 9.0):
        histogram.observe(value)
    assert [histogram.quantile(part) for part in (0.5, 0.75, 1.0)] == [1.0, 2.0, 3.0]


def test_bounds_ascend() -> None:
    for bounds in (FAST_SECONDS, SLOW_SECONDS):
        assert list(bounds) == sorted(set(bounds))
