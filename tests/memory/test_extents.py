"""What is free of the arena: no overlap, no leak, neighbours merged, against a naive model."""

import itertools
import random

from async_cache.memory.extents import Extents


def test_blocks_of_one_size_come_back_to_back_until_there_is_no_room():
    extents = Extents(100)
    assert extents.allocate(30, 5) == [0, 30, 60]
    assert extents.free_bytes == 10
    assert extents.allocate(11, 1) == []


def test_a_hole_is_taken_again_by_what_fits_it_best():
    extents = Extents(100)
    extents.allocate(10, 10)
    for begin, size in ((10, 10), (40, 30)):
        extents.free(begin, size)
    assert extents.allocate(10, 1) == [10]
    assert extents.allocate(20, 1) == [40]


def test_a_range_grows_by_the_free_ones_that_touch_it():
    extents = Extents(100)
    extents.allocate(10, 10)
    extents.free(0, 10)
    extents.free(30, 20)
    assert extents.around(10, 30) == (0, 50)
    assert extents.around(60, 70) == (60, 70)


def test_churn_of_mixed_sizes_loses_nothing_and_merges_all_in_the_end():
    dice = random.Random(1)
    extents, used = Extents(4096), {}
    for _ in range(5000):
        if used and dice.random() < 0.5:
            begin = dice.choice(list(used))
            extents.free(begin, used.pop(begin))
        else:
            size = dice.choice((1, 2, 3, 7, 64))
            used |= dict.fromkeys(extents.allocate(size, dice.randint(1, 9)), size)
        blocks = sorted(used.items())
        assert all(begin + size <= after for (begin, size), (after, _) in itertools.pairwise(blocks))
        assert extents.free_bytes == 4096 - sum(used.values())
    extents.check_integrity()
    for begin, size in used.items():
        extents.free(begin, size)
    assert extents.allocate(4096, 1) == [0]
