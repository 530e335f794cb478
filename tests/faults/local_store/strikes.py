"""A program that lives a store's life again and again, and strikes it at the next system call each time.

Run as a program of its own, since it forks: `python -m faults.local_store.strikes kill DIRECTORY fsync 1 calm`. It says
how often which call was struck.
"""

import asyncio
import errno
import json
import pickle
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import pytest

from async_cache.l2.backend import LoadOutcome
from async_cache.l2.filesystem import FileSystemBackend
from faults.disk import process, say

from . import tracing
from .power import Recorder
from .story import CAPACITY_BYTES, STORED, Durability, Life, Manner, check, disk_bytes, found, load, store

NOT_HERE = "not here"
LACKS = {
    "holes": {"fallocate": errno.EOPNOTSUPP},
    "flock": {"flock": errno.EOPNOTSUPP},
    "locks": {"flock": errno.ENOLCK, "fcntl": errno.ENOLCK},
    "locks and holes": {"flock": errno.ENOSYS, "fcntl": errno.ENOSYS, "fallocate": errno.ENOSYS},
    "times": {"utimensat": errno.EPERM},
}
"""What a file system may not have, and what it says then."""
FOR_MANY_BYTES = 4 * CAPACITY_BYTES
KILLS = 10  # one after the other
QUOTA_BYTES = 100 * 4096
BATCHES = [range(begin, begin + 4) for begin in range(0, 160, 4)]  # some 370 pages

KINDS = ("write", "sync", "other")
"""Of calls: where not all are struck, some of each kind are, whatever the order in which threads make them."""

CAN_WAIT = ("open", "openat", "fcntl", "flock", "fsync", "fdatasync", "ftruncate", "fallocate")
"""Calls that a signal may interrupt."""

FULL = (errno.ENOSPC, errno.EDQUOT)
ERRORS = (errno.EIO, *FULL)


class Strike(tracing.Watcher):
    """Waits for the nth call of a kind."""

    def __init__(self, kind: str, nth: int):
        self._kind, self._nth, self._left = kind, nth, nth
        self.struck = ""
        self.error = 0

    def enters(self, call: tracing.Call) -> int | None:
        if next((kind for kind in KINDS if kind in call.name), KINDS[-1]) != self._kind:
            return None
        self._left -= 1
        if self._left:
            return None
        self.struck = call.name
        return self.strike(call)

    def strike(self, call: tracing.Call) -> int | None:
        raise NotImplementedError


class Kill(Strike):
    """Kills before the nth call, or with a part of it written."""

    def strike(self, call: tracing.Call) -> int | None:
        chance = random.Random(self._nth)
        if call.writes and chance.random() < 0.7:
            size = len(call.data)
            call.write_some(chance.choice((1, size // 2, size // 4096 * 4096, max(size - 64, 0), size - 1)))
        raise tracing.Killed


class Never(Strike):
    """Waits for no call."""

    def __init__(self) -> None:
        super().__init__("none", 0)


class Fail(Strike):
    """Has the nth call fail: the disk has a fault, or is full."""

    def strike(self, call: tracing.Call) -> int | None:
        errors = (*ERRORS, errno.EMFILE) if "open" in call.name else ERRORS
        self.error = errors[self._nth % len(errors)]
        return self.error


class Hinder(Strike):
    """Has the nth call be interrupted by a signal, or write a part only."""

    def strike(self, call: tracing.Call) -> int | None:
        if not call.name.startswith("pwrite"):
            return errno.EINTR if call.name in CAN_WAIT else None
        count = random.Random(self._nth).choice((1, len(call.data) // 2, max(len(call.data) - 1, 1)))
        call.write_some(count)
        return -count


class Visit(Strike):
    """Has another process live a life in the same directory, from its opening to its close, before the nth call."""

    def __init__(self, kind: str, nth: int, guest: Life, directory: Path, durability: Durability):
        super().__init__(kind, nth)
        self._living = lambda: asyncio.run(guest.live(directory, durability))

    def strike(self, call: tracing.Call) -> int | None:
        tracing.run_alone(self._living)
        return None


class Lack(tracing.Watcher):
    """A file system that never does some calls."""

    def __init__(self, refused: dict[str, int]):
        self._refused = refused
        self.struck: Counter[str] = Counter()

    def enters(self, call: tracing.Call) -> int | None:
        if call.name not in self._refused:
            return None
        self.struck[call.name] += 1
        return self._refused[call.name]


class Quota(tracing.Watcher):
    """A file system that is full when its files take so much, and then has room for nothing."""

    def __init__(self, root: Path, error: int):
        self._root, self._error = root, error
        self.struck: Counter[str] = Counter()

    def enters(self, call: tracing.Call) -> int | None:
        if not call.writes or disk_bytes(self._root) + len(call.data) <= QUOTA_BYTES:
            return None
        self.struck[call.name] += 1
        return self._error


def live(life: Life, directory: Path, durability: Durability, strike: Strike) -> bool:
    """Live until the strike; False if life was over before."""
    status = tracing.run(lambda: asyncio.run(life.live(directory, durability)), directory, strike)
    assert not status, f"the life ended with an error after {strike.struck} was struck"
    assert len(life.failed) <= isinstance(strike, Fail), f"after {strike.struck} failed, so did {life.failed}"
    return bool(strike.struck)


def look(
    directory: Path, numbers: Sequence[int], must: set[int], must_not: set[int], capacity_bytes: int = CAPACITY_BYTES
) -> None:
    """Check what was left, where no thread is left behind: this process is to fork again."""
    tracing.run_alone(lambda: asyncio.run(check(directory, numbers, must, must_not, capacity_bytes=capacity_bytes)))


def each_anew(
    folder: Path, durability: Durability, step: int, manner: Manner, strike: Callable[[str, int], Strike]
) -> Counter[str]:
    """A new directory for every call."""
    struck: Counter[str] = Counter()
    for kind in KINDS:
        for nth in count(1, step):
            life, directory, blow = Life(manner=manner), folder / f"{kind}{nth}", strike(kind, nth)
            if not live(life, directory, durability, blow):
                break
            struck[blow.struck] += 1
            so_far = life.so_far()
            must = life.must(so_far)
            if blow.error in FULL:  # what is older may have made room
                must &= life.newest
            try:
                look(directory, range(STORED), must, life.must_not(so_far))
            except ChildProcessError as error:
                raise AssertionError(f"{blow.struck}, {kind} {nth}, so far {list(so_far)}") from error
            shutil.rmtree(directory)
    return struck


def visits(folder: Path, durability: Durability, step: int, manner: Manner) -> Counter[str]:
    """A new directory for every call, and another process in it while the call waits."""
    struck: Counter[str] = Counter()
    for kind in KINDS:
        for nth in count(1, step):
            host, guest = (Life(number, FOR_MANY_BYTES, manner) for number in range(2))
            directory = folder / f"{kind}{nth}"
            blow = Visit(kind, nth, guest, directory, durability)
            if not live(host, directory, durability, blow):
                break
            struck[blow.struck] += 1
            assert not guest.failed
            must = host.must(host.so_far()) | guest.must(guest.so_far())
            must_not = host.must_not(host.so_far()) | guest.must_not(guest.so_far())
            try:
                look(directory, range(2 * STORED), must, must_not, FOR_MANY_BYTES)
            except ChildProcessError as error:
                raise AssertionError(f"visit at {blow.struck}, {kind} {nth}") from error
            shutil.rmtree(directory)
    return struck


def one_after_the_other(folder: Path, durability: Durability, step: int, manner: Manner) -> Counter[str]:
    """All kills in one directory, each in a life with objects of its own: what they leave does not add up.

    Now and then one lives to its end: a start may take more calls than the next kill lets it have.
    """
    struck: Counter[str] = Counter()
    lives = count()
    for kind in KINDS:
        for nth in count(1, step):
            life, blow = Life(next(lives), FOR_MANY_BYTES, manner), Kill(kind, nth)
            if not live(life, folder, durability, blow):
                break
            struck[blow.struck] += 1
            if struck.total() % KILLS == 0:
                live(Life(next(lives), FOR_MANY_BYTES, manner), folder, durability, Never())
    so_far = life.so_far()
    numbers = range(next(lives) * STORED)
    look(folder, numbers, life.must(so_far), life.must_not(so_far), FOR_MANY_BYTES)
    return struck


def lack(folder: Path, durability: Durability, which: str, manner: Manner) -> Counter[str]:
    """A life, and a look at what it left, without what a file system need not have."""
    life, watcher = Life(manner=manner), Lack(LACKS[which])
    assert tracing.run(lambda: asyncio.run(life.live(folder, durability)), folder, watcher) == 0
    assert not life.failed
    so_far = life.so_far()
    looking = check(folder, range(STORED), life.must(so_far), life.must_not(so_far))
    assert tracing.run(lambda: asyncio.run(looking), folder, watcher) == 0
    return watcher.struck


def overfill(folder: Path, durability: Durability, error: str) -> Counter[str]:
    """A store on a disk that is smaller than its capacity."""
    watcher = Quota(folder, int(error))
    assert tracing.run(lambda: asyncio.run(store_too_much(folder, durability)), folder, watcher) == 0
    return watcher.struck


async def store_too_much(directory: Path, durability: Durability) -> None:
    """What is new takes the place of what is old, and nothing fails."""
    backend = FileSystemBackend(directory, durability=durability)
    await backend.open()
    for batch in BATCHES:
        assert await store(backend, batch) == [True] * len(batch), f"at {batch[0]}"
        assert set((await load(backend, batch)).values()) == {LoadOutcome.LOADED}
    newest = [number for batch in BATCHES[-6:] for number in batch]
    assert await found(backend, newest) == newest
    backend.check_integrity()
    await backend.close()


def record(folder: Path, durability: Durability, fail: int, manner: Manner) -> None:
    """Write down what a life does to its directory."""
    life, directory = Life(manner=manner), folder / "kv"
    recorder = Recorder(life.so_far, fail)
    assert tracing.run(lambda: asyncio.run(life.live(directory, durability)), folder, recorder) == 0
    with (folder / "ops").open("wb") as file:
        pickle.dump((recorder.ops, life.so_far()), file)


def strike(what: str, folder: Path, durability: Durability, which: object, manner: Manner = "calm") -> Counter[str]:
    """Run this program: how often which call was struck. The test is skipped where it cannot run."""
    with process(__spec__.name, what, folder, durability, which, manner) as child:
        said, _ = child.communicate()
    if said.strip() == NOT_HERE:
        pytest.skip("cannot trace a program")
    assert child.returncode == 0
    return Counter(json.loads(said))


def main(what: str, folder: str, durability: Durability, which: str, manner: Manner) -> None:
    if not tracing.is_supported():
        say(NOT_HERE)
        return
    struck = Counter[str]()
    match what:
        case "kill":
            struck = each_anew(Path(folder), durability, int(which), manner, Kill)
        case "fail":
            struck = each_anew(Path(folder), durability, int(which), manner, Fail)
        case "hinder":
            struck = each_anew(Path(folder), durability, int(which), manner, Hinder)
        case "visit":
            struck = visits(Path(folder), durability, int(which), manner)
        case "kill again":
            struck = one_after_the_other(Path(folder), durability, int(which), manner)
        case "lack":
            struck = lack(Path(folder), durability, which, manner)
        case "overfill":
            struck = overfill(Path(folder), durability, which)
        case "record":
            record(Path(folder), durability, int(which), manner)
    say(json.dumps(struck))


if __name__ == "__main__":
    main(*sys.argv[1:])
