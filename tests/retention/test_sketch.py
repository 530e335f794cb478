"""The sketch counts what was seen of late: never less, hardly ever more, in memory that does not grow."""

import hashlib

from async_cache.retention.sketch import _PERIOD, Sketch


def digest(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "little")).digest()


def test_it_counts_each_digest() -> None:
    sketch = Sketch()
    assert sketch.count(digest(1)) == 0
    assert [sketch.add(digest(1)) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert (sketch.count(digest(1)), sketch.count(digest(2))) == (5, 0)


def test_it_hardly_ever_counts_what_was_not_seen() -> None:
    sketch = Sketch()
    for number in range(_PERIOD - 1):
        sketch.add(digest(number))
    wrong = sum(sketch.count(digest(number)) > 0 for number in range(_PERIOD, _PERIOD + 20_000))
    assert wrong < 20_000 * 0.005  # a period is a quarter of a row: (1 - exp(-1/4)) ** 4 is 0.0024
    assert all(sketch.count(digest(number)) >= 1 for number in range(0, _PERIOD - 1, 1000))


def test_it_forgets_what_was_seen_long_ago() -> None:
    sketch = Sketch()
    for _ in range(4):
        sketch.add(digest(0))
    counts = []
    for period in range(3):
        for number in range(_PERIOD):
            sketch.add(digest(1 + period * _PERIOD + number))
        counts.append(sketch.count(digest(0)))
    assert counts == [2, 1, 0]


def test_it_counts_no_further_than_a_cell_can() -> None:
    sketch = Sketch()
    assert max(sketch.add(digest(0)) for _ in range(400)) == 255
