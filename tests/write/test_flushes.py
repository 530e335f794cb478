"""Flushes: each waits for what was there before it, of its owners; and a chunk costs the same however many wait."""

import random
import sys
from collections import Counter

from async_cache.write.flushes import Flushes


def test_each_flush_is_over_when_what_was_there_before_it_is_as_by_looking_at_all():
    for seed in range(30):
        rng, flushes = random.Random(seed), Flushes()
        waiting, expected = [], {}  # (owner, epoch); by flush, the chunks that it waits for
        for _ in range(300):
            match rng.choice(("begin", "end", "flush", "leave")):
                case "begin":
                    owner = rng.choice("abc")
                    waiting.append((owner, flushes.began(owner), object()))
                case "end" if waiting:
                    chunk = waiting.pop(rng.randrange(len(waiting)))
                    flushes.ended(*chunk[:2])
                    for left in expected.values():
                        left.discard(chunk)
                case "flush":
                    owners = rng.choice((None, ["a"], ["a", "b"], ["d"]))
                    flush = flushes.begin(owners)
                    expected[flush] = {chunk for chunk in waiting if owners is None or chunk[0] in owners}
                case "leave" if expected:
                    flush = rng.choice(list(expected))
                    del expected[flush]
                    flushes.leave(flush)
            assert flushes.chunks == len(waiting)
            for flush, left in expected.items():
                assert flush.done.is_set() == (not left) and flushes.left(flush) == len(left)
            assert len(flushes) == sum(not flush.done.is_set() for flush in expected)


def test_what_is_stored_costs_the_same_however_many_wait_for_it():
    calls = Counter()
    for count in (10, 5000):
        flushes = Flushes()
        epochs = [(flushes.began("a"), flushes.begin(["a"]), flushes.begin(None))[0] for _ in range(count)]
        sys.setprofile(lambda frame, event, _, count=count: calls.update((count,)))
        flushes.ended("a", epochs[1])
        sys.setprofile(None)
    assert calls[5000] <= calls[10]


def test_nobody_waits_when_nothing_is_stored_any_more():
    flushes = Flushes()
    flushes.began("a")
    flush = flushes.begin(None)
    flushes.end_all()
    assert flush.done.is_set() and not len(flushes)
    flushes.leave(flush)
