"""Whatever the order in which the loop runs what is ready: every byte that is read is right, promises are kept, nothing
is loaded twice or handed out twice, what was deleted stays away, and in the end nothing is held."""

import logging
from collections import Counter

import pytest

from .interleaving import REPLAY, run, seeds
from .program import Program


def test_in_whatever_order_callbacks_run_the_cache_keeps_its_word(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    reached: Counter[str] = Counter()
    for seed in seeds(quick=150, long=40_000):
        run(seed, lambda loop: Program(loop, reached).main())
        assert not caplog.records, f"{REPLAY}={seed}: what went wrong was only logged"
    print(reached)
