"""A store is struck at every system call that changes its directory: killed, also in the middle of a write; refused;
interrupted, or done in part; or another process does all that one can do in the same directory while the call waits.

What it had told as stored is there afterwards, what it had told as deleted is not, nothing is torn, and what is left
over does not add up. A call that fails costs what it was for, and nothing else.
"""

import pytest
from soak import rounds

from .strikes import strike


@pytest.mark.parametrize("manner", ["calm", "restless"])
@pytest.mark.parametrize("durability", ["none", "fsync"])
@pytest.mark.parametrize("what", ["kill", "kill again", "fail", "hinder", "visit"])
def test_a_store_is_struck(tmp_path, what, durability, manner, record_property):
    struck = strike(what, tmp_path, durability, rounds(5 if manner == "calm" else 13, 1), manner)
    assert sum(struck.values()) >= 5
    assert sum(count for name, count in struck.items() if "write" in name) >= 2
    assert durability == "none" or sum(count for name, count in struck.items() if "sync" in name) >= 2
    record_property("struck", struck)
