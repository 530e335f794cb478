"""What a prefix holds, counted while it is listed and changed at the same time."""

import random

import pytest

from async_cache.l2.object_store import holdings
from async_cache.l2.object_store.holdings import Holdings
from async_cache.values import BackendUsage


@pytest.mark.parametrize("seed", range(20))
def test_what_changes_during_the_listing_is_counted_once(seed: int) -> None:
    chance = random.Random(seed)
    bucket = {f"{number:03}": number for number in chance.sample(range(500), 200)}
    counted, place = Holdings(), ""
    while True:
        page = sorted(path for path in bucket if path > place)[:20]
        if not counted.listed([(path, bucket[path]) for path in page]) or not page:
            break
        place = page[-1]
        for _ in range(10):
            path = f"{chance.randrange(500):03}"
            if path in bucket:
                counted.removed(path, bucket.pop(path))
            else:
                bucket[path] = int(path)
                counted.stored(path, int(path))
    counted.listing_ended()
    assert counted.usage() == BackendUsage(len(bucket), sum(bucket.values()))
    counted.stored("new", 7)
    assert counted.usage() == BackendUsage(len(bucket) + 1, sum(bucket.values()) + 7)


def test_what_is_not_ours_is_not_counted() -> None:
    counted = Holdings()
    assert counted.listed([("a", 5), ("b", None), ("c", 7)])
    assert counted.usage() == BackendUsage(2, 12)


def test_a_listing_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdings, "MOST_LISTED", 3)
    counted = Holdings()
    assert counted.listed([("a", 1), ("b", 1)])
    assert not counted.listed([("c", 1)])


def test_what_others_have_stored_and_we_delete_makes_nothing_less_than_zero() -> None:
    counted = Holdings()
    counted.listing_ended()
    counted.removed("a", 5)
    assert counted.usage() == BackendUsage(0, 0)
