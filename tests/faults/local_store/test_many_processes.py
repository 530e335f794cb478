"""Two and eight processes on one directory: store, evict, delete, and are killed.

Each finds what the others stored, none serves what was deleted, or anything but the bytes of the object; and the
directory keeps within its capacity as seen from outside, whoever fills it.
"""

import os
import random
import threading
import time
from collections import Counter

import pytest
from soak import rounds

from .crowd import CALLS, MOST_OBJECTS, OBJECTS, crowd
from .story import SLACK_BYTES, disk_bytes, pages_of

LIFE_SECONDS = 1
ROOMY = 2**30
FEW = OBJECTS[:96]
PAGE = 4096
CAPACITY_BYTES = sum(map(pages_of, OBJECTS)) * PAGE // 3
IN_FLIGHT_BYTES = CALLS * MOST_OBJECTS * max(map(pages_of, OBJECTS)) * PAGE  # of a process

few_and_many = pytest.mark.parametrize(
    ("members", "manner"),
    [(2, "calm"), (8, "calm"), (2, "restless"), (8, "restless"), (4, "without holes"), (4, "without locks")],
)


@few_and_many
def test_each_finds_what_the_others_did(tmp_path, members, manner):
    """One call at a time, by any of them: what it says follows from all calls before."""
    rng, there = random.Random(members), set()
    with crowd(tmp_path, ROOMY, members, manner) as processes:
        for turn in range(rounds(60, 5000)):
            member, numbers = rng.choice(processes.members), rng.sample(FEW, rng.randint(1, 6))
            match rng.randrange(10):
                case 0 | 1 | 2:
                    assert all(member.do("store", *numbers))
                    there |= set(numbers)
                case 3 | 4:
                    deleted = member.do("delete", *numbers)
                    assert deleted == len(there & set(numbers)), (turn, numbers)
                    there -= set(numbers)
                case 5 if turn % 5 == 0:
                    processes.lose(member)
                    processes.join()
                    processes.members[-1].do("list")  # before it has recovered it says what it knows
                case _:
                    outcomes = look(member, numbers)
                    assert {number for number, outcome in outcomes.items() if outcome == "loaded"} == there & set(
                        numbers
                    )
                    assert set(outcomes.values()) <= {"loaded", "gone"}, (turn, outcomes)
        for member in processes.members:
            assert {number for number, outcome in look(member, FEW).items() if outcome == "loaded"} == there


def look(member, numbers):
    """What a process has of objects. One that it knew of, and is gone, it does not find the next time."""
    found = member.do("find", *numbers)
    outcomes = member.do("load", *found) if found else {}
    outcomes = {int(number): outcome for number, outcome in outcomes.items()}
    again = [number for number, outcome in outcomes.items() if outcome != "loaded"]
    if again:
        found = member.do("find", *again)
        outcomes |= {int(n): outcome for n, outcome in (member.do("load", *found) if found else {}).items()}
    return outcomes


class Sampler(threading.Thread):
    """Watches how much a directory takes on the disk."""

    def __init__(self, directory):
        super().__init__()
        self._directory, self._end = directory, threading.Event()
        self.most_bytes = self.samples = 0

    def run(self):
        while not self._end.wait(0.002):
            self.most_bytes = max(self.most_bytes, disk_bytes(self._directory))
            self.samples += 1

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self.join()


@few_and_many
def test_a_crowd_in_little_room(tmp_path, members, manner, record_property):
    """All at once, and one after the other is killed and replaced."""
    rng, told = random.Random(members), Counter()
    with crowd(tmp_path, CAPACITY_BYTES, members, manner) as processes, Sampler(tmp_path) as sampler:
        for killed in range(rounds(1, 40)):
            for number, member in enumerate(processes.members):
                member.tell("live", 100 * killed + number, LIFE_SECONDS)
            time.sleep(rng.uniform(0, LIFE_SECONDS))
            processes.lose(rng.choice(processes.members))
            for member in processes.members:
                told.update(member.hear())
            processes.join()
        assert told.keys() <= {"calls", "stored", "deleted", "loaded", "gone"}
        assert told["loaded"] and told["stored"] and told["deleted"]
        for member in processes.members:
            member.do("find", *OBJECTS)
    slack = members * (IN_FLIGHT_BYTES + SLACK_BYTES)
    record_property("came of it", dict(told) | {"bytes": sampler.most_bytes, "samples": sampler.samples})
    assert sampler.samples > 50
    assert sampler.most_bytes <= CAPACITY_BYTES + slack
    for index in tmp_path.glob("*.idx"):
        os.utime(index, (0, 0))  # much later: without locks nobody is dead before
    with crowd(tmp_path, CAPACITY_BYTES, 1, manner) as processes:
        [last] = processes.members
        look(last, OBJECTS)
        last.do("list")
        assert disk_bytes(tmp_path) <= CAPACITY_BYTES + SLACK_BYTES
        last.do("delete", *OBJECTS)
        assert last.do("find", *OBJECTS) == []
    assert disk_bytes(tmp_path) <= SLACK_BYTES
