"""The power fails after any operation of a store, and any legal part of what was not synced is lost.

Nothing torn is served; with `durability=fsync` all that was told as stored is there; and what is left is a store like
any other.
"""

import os
import pickle
import random
from types import SimpleNamespace

import pytest
from soak import rounds

from .power import Disk, Recorder, images, put
from .story import STORED, Life, check
from .strikes import strike


def record(folder, durability, fail=0, manner="calm"):
    """The operations of a life on `folder / "kv"`, and how far it was in the end. `fail`: the sync that fails."""
    strike("record", folder, durability, fail, manner)
    return pickle.loads((folder / "ops").read_bytes())


def crashes(ops, end, rng, at_random):
    """What the disk may have, how many operations were done then, and what must be there."""
    disk, life, seen = Disk(), Life(), set()
    for number, (op, following) in enumerate(zip(ops, [*ops[1:], None], strict=True)):
        disk.apply(number, op)
        must = life.must(op.after) & life.must(following.before if following else end)
        for image in images(disk, rng, at_random):
            state = hash((frozenset(image.items()), frozenset(must)))
            if state not in seen:
                seen.add(state)
                yield number, image, must


async def survive(folder, crashes, durable):
    """Check each; the number of them."""
    survived = 0
    for number, image, must in crashes:
        directory = folder / f"state{survived}"
        put(image, folder / "kv", directory)
        try:
            await check(directory, range(STORED), must if durable else (), (), lost_writes=True)
        except BaseException as error:
            error.add_note(f"after operation {number} of {folder}")
            raise
        survived += 1
    return survived


def some(crashes, rng, count):
    """So many of them, anywhere."""
    crashes = list(crashes)
    return rng.sample(crashes, min(count, len(crashes)))


@pytest.mark.parametrize("manner", ["calm", "restless"])
@pytest.mark.parametrize("durability", ["none", "fsync"])
async def test_what_was_not_synced_is_lost(tmp_path, durability, manner, record_property):
    rng = random.Random(durability + manner)
    ops, end = record(tmp_path, durability, manner=manner)
    states = some(crashes(ops, end, rng, rounds(4, 40)), rng, rounds(100, 20_000))
    record_property("states", await survive(tmp_path, states, durable=durability == "fsync"))


def test_a_file_that_two_threads_open_at_once_is_made_once(tmp_path):
    """As the record has it: what was written to a file that it took for another would be lost with that."""
    path = str(tmp_path / "file")
    calls = [SimpleNamespace(name="openat", paths=[path], flags=os.O_CREAT, process=os.getpid()) for _ in range(2)]
    recorder = Recorder(bytes)
    for call in calls:
        recorder.enters(call)
    opened = [os.open(path, os.O_CREAT | os.O_RDWR) for _ in calls]
    for call, fd in zip(calls, opened, strict=True):
        recorder.leaves(call, fd)
        os.close(fd)
    assert [(op.name, op.where, op.what) for op in recorder.ops] == [("name", path, 1)]


@pytest.mark.parametrize("manner", ["calm", "restless"])
async def test_a_sync_that_failed_is_no_sync(tmp_path, manner, record_property):
    """Whatever it was for may be lost for ever, even if the next sync of the same file goes well."""
    rng, states = random.Random(0), 0
    for fail in range(1, rounds(4, 100)):
        folder = tmp_path / str(fail)
        folder.mkdir()
        ops, end = record(folder, "fsync", fail, manner)
        if not any(op.name == "sync failed" for op in ops):
            break
        states += await survive(folder, some(crashes(ops, end, rng, 4), rng, rounds(30, 500)), durable=True)
    record_property("states", states)
