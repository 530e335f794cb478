"""A process that uses a directory which others use, too: it does as it is told, line by line, or what it likes.

`python -m faults.local_store.crowd DIRECTORY CAPACITY calm`. A line is a JSON list, such as `["store", 1, 2]`; so is
the answer. `["live", SEED, SECONDS]` is a life of its own, of which it says how often what came of it.
"""

import asyncio
import ctypes
import errno
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from async_cache.l2.backend import LoadOutcome
from async_cache.l2.filesystem import FileSystemBackend, files, following, journal, rewriting
from async_cache.l2.filesystem import backend as filesystem
from async_cache.testing.conformance import key
from faults.disk import process, say

from .story import Manner, found, load, store

OBJECTS = range(2400)
MOST_OBJECTS = 8  # of one call
CALLS = 3  # at a time


def some(rng: random.Random, most: int) -> list[int]:
    """Objects of one call: neighbours, as the chunks of a prefix are, or any."""
    if rng.random() < 0.5:
        begin = rng.choice(OBJECTS[:-most])
        return list(range(begin, begin + rng.randint(1, most)))
    return rng.sample(OBJECTS, rng.randint(1, most))


class Member:
    """One process, as its test sees it."""

    def __init__(self, child: Any):
        self.child = child

    def tell(self, *command: Any) -> None:
        self.child.stdin.write(json.dumps(command) + "\n")

    def hear(self) -> Any:
        """What it answers. Raises EOFError if it is dead."""
        line = self.child.stdout.readline()
        if not line.endswith("\n"):
            raise EOFError
        return json.loads(line)

    def do(self, *command: Any) -> Any:
        self.tell(*command)
        return self.hear()

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()


class Crowd:
    """Processes on one directory."""

    def __init__(self, directory: Path, capacity_bytes: int, manner: Manner, stack: ExitStack):
        self._arguments = directory, capacity_bytes, manner
        self._stack = stack
        self.members: list[Member] = []

    def join(self, count: int = 1) -> None:
        """So many more, who are there when this returns."""
        new = [Member(self._stack.enter_context(process(__spec__.name, *self._arguments))) for _ in range(count)]
        assert [member.hear() for member in new] == ["open"] * count
        self.members += new

    def lose(self, member: Member) -> None:
        """It is killed."""
        self.members.remove(member)
        member.kill()

    def leave(self) -> None:
        """All end, and in order."""
        for member in self.members:
            member.child.stdin.close()
        assert [member.child.wait() for member in self.members] == [0] * len(self.members)


@contextmanager
def crowd(directory: Path, capacity_bytes: int, members: int, manner: Manner = "calm") -> Iterator[Crowd]:
    with ExitStack() as stack:
        together = Crowd(directory, capacity_bytes, manner, stack)
        together.join(members)
        yield together
        together.leave()


async def obey(directory: str, capacity_bytes: str, manner: Manner) -> None:
    filesystem.CLOSE_SECONDS = 60  # a busy machine takes its time to leave all in order
    match manner:
        case "restless":
            rewriting.SPARE_BYTES, following.ADOPT_SECONDS = 2000, 0.5
        case "without holes":
            files._fallocate = lambda *_: ctypes.set_errno(errno.EOPNOTSUPP) or -1
        case "without locks":
            journal.lock = lambda fd: None
            following.BEAT_SECONDS, following.ADOPT_SECONDS, journal.DEAD_SECONDS = 0.5, 0.5, 10.0
    backend = FileSystemBackend(directory, capacity_bytes=int(capacity_bytes))
    await backend.open()
    say('"open"')
    while line := await asyncio.to_thread(sys.stdin.readline):
        say(json.dumps(await do(backend, *json.loads(line))))
    assert backend.pins == 0
    backend.check_integrity()
    await backend.close()


async def do(backend: FileSystemBackend, what: str, *numbers: int) -> Any:
    match what:
        case "store":
            return await store(backend, numbers)
        case "delete":
            return await backend.delete([key(number) for number in numbers])
        case "find":
            return await found(backend, numbers)
        case "load":
            return {number: outcome.value for number, outcome in (await load(backend, numbers)).items()}
        case "list":
            return len([each async for each in backend.keys()])
        case "live":
            return await live(backend, *numbers)
    raise AssertionError(what)


async def live(backend: FileSystemBackend, seed: int, seconds: float) -> Counter[str]:
    """Store, load, delete, several at a time. What a lookup found is right, or gone by now."""
    rng, told = random.Random(seed), Counter[str]()
    end = asyncio.get_running_loop().time() + seconds

    async def work() -> None:
        while asyncio.get_running_loop().time() < end:
            numbers = some(rng, MOST_OBJECTS)
            match rng.randrange(8):
                case 0 | 1 | 2:
                    told["stored"] += sum(await store(backend, numbers))
                case 3:
                    told["deleted"] += await backend.delete([key(number) for number in numbers[:3]])
                case _:
                    told.update(await _find_and_load(backend, numbers))
            told["calls"] += 1

    await asyncio.gather(*(work() for _ in range(CALLS)))
    return told


async def _find_and_load(backend: FileSystemBackend, numbers: Sequence[int]) -> list[str]:
    keys = [key(number) for number in numbers]
    present = await backend.lookup(keys)
    there = [number for number, found in zip(numbers, present, strict=True) if found]
    try:
        outcomes = await load(backend, there) if there else {}
    finally:
        backend.unpin([key(number) for number in there])
    assert LoadOutcome.FAILED not in outcomes.values()
    return [outcome.value for outcome in outcomes.values()]


if __name__ == "__main__":
    asyncio.run(obey(*sys.argv[1:]))
