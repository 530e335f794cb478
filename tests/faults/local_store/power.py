"""What a disk may have after a power failure: any legal part of what was not synced yet.

A file's blocks, its size, and the names of a directory each have a last version that was synced, and newer ones. Any of
them may be the one that is on the disk, independently of all others: the kernel writes back in any order. A sync of a
file that failed says nothing: what it was for may be there or not, and a later sync does not change that, since the
kernel takes it for written. Names are no such matter: they are synced with the next one.
"""

import errno
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import tracing

BLOCK = 4096
SECTOR = 512
_PUNCH, _KEEP_SIZE, _ZERO = 0x02, 0x01, 0x10  # of fallocate

Place = tuple[Any, ...]
"""What has versions: ("name", path), ("size", file) or ("block", file, number)."""


@dataclass(frozen=True)
class Op:
    """A change that was made, and how far the program was before it began and when it was done."""

    name: str
    where: Any  # a path, or the number of a file
    what: Any = None
    before: bytes = b""
    after: bytes = b""
    began: int = 0  # so many operations were done then


class Recorder(tracing.Watcher):
    """Writes down what a program does to its directory. With `fail`, the sync of that number fails."""

    def __init__(self, so_far: Callable[[], bytes], fail: int = 0):
        self.ops: list[Op] = []
        self._so_far, self._fail = so_far, fail
        self._files: dict[int, int] = {}  # by inode
        self._numbers = 0
        self._begun: dict[int, tuple[bytes, int, Any]] = {}

    def enters(self, call: tracing.Call) -> int | None:
        aside: Any = None
        if call.name in ("open", "openat"):
            aside = Path(call.paths[0]).exists()
        elif call.writes:
            aside = call.offset, call.data
        elif "sync" in call.name:
            self._fail -= 1
            if not self._fail:
                self._note(call, ("sync failed", self._file(call)), self._so_far(), len(self.ops))
                return errno.EIO
        self._begun[id(call)] = self._so_far(), len(self.ops), aside
        return None

    def leaves(self, call: tracing.Call, result: int) -> None:
        before, began, aside = self._begun.pop(id(call))
        if result >= 0 and (op := self._op(call, result, aside, began)):
            self._note(call, op, before, began)

    def _note(self, call: tracing.Call, op: tuple[Any, ...], before: bytes, began: int) -> None:
        self.ops.append(Op(op[0], op[1], op[2] if len(op) > 2 else None, before, self._so_far(), began))

    def _file(self, call: tracing.Call) -> Any:
        path = call.paths[0]
        return path if Path(path).is_dir() else self._files[call.inode]

    def _was_made(self, path: str, inode: int, since: int) -> bool:
        """Whether another thread has made the file of this name since so many operations."""
        named = [op.what for op in self.ops[since:] if op.name == "name" and op.where == path]
        return bool(named) and named[-1] == self._files.get(inode)

    def _op(self, call: tracing.Call, result: int, aside: Any, began: int) -> tuple[Any, ...] | None:
        match call.name:
            case "open" | "openat":
                inode = Path(f"/proc/{call.process}/fd/{result}").stat().st_ino
                there = aside or self._was_made(call.paths[0], inode, began)
                if there and inode in self._files:  # else another thread has removed it meanwhile
                    return ("size", self._files[inode], 0) if call.flags & os.O_TRUNC else None
                self._numbers += 1
                self._files[inode] = self._numbers
                return "name", call.paths[0], self._numbers
            case "mkdir" | "mkdirat":
                return "name", call.paths[0], "directory"
            case "rename" | "renameat" | "renameat2":
                return "rename", tuple(call.paths)
            case "unlink" | "unlinkat" | "rmdir":
                return "name", call.paths[0]
            case "ftruncate":
                return "size", self._file(call), call.arguments[1]
            case "fallocate":
                return "allocate", self._file(call), call.arguments[1:4]
            case "fsync" | "fdatasync":
                return "sync", self._file(call)
            case "flock" | "fcntl" | "utimensat":
                return None
        assert call.writes, f"what does {call.name} do to a disk?"
        return "write", self._files[call.inode], (aside[0], aside[1][:result])


@dataclass(frozen=True)
class Body:
    """What is in a file: its blocks by number, and zeros in between."""

    size_bytes: int
    blocks: dict[int, bytes]

    def __hash__(self) -> int:
        return hash((self.size_bytes, frozenset(self.blocks.items())))


Image = dict[str, Body | None]
"""What a disk has: files by path; None is a directory."""


@dataclass
class Versions:
    """What a place may have on the disk: the first was synced, the others were not. Each with the number of its op."""

    of: list[tuple[int, Any]]

    def at(self, until: int) -> int:
        """Which was the newest after so many operations."""
        return max((at for at, (number, _) in enumerate(self.of) if number < until), default=0)

    def synced(self, until: int, doubtful: int) -> None:
        """A sync has ended that began after `until` operations; one that began after `doubtful` had failed."""
        newest = self.at(until)
        if self.of[newest][0] >= doubtful:
            del self.of[:newest]


@dataclass
class Disk:
    """A disk that was given operations: `choices` are the places that may have one of several versions."""

    places: dict[Place, Versions] = field(default_factory=dict)
    doubtful: dict[Any, int] = field(default_factory=dict)

    def apply(self, number: int, op: Op) -> None:
        match op.name:
            case "name":
                self._add(number, ("name", op.where), op.what)
            case "rename":
                old, new = op.where
                self._add(number, ("name", new), self._newest(("name", old)))
                self._add(number, ("name", old), None)
            case "size":
                self._cut(number, op.where, op.what)
            case "write":
                self._write(number, op.where, *op.what)
            case "allocate":
                mode, offset, length = op.what
                if mode & (_PUNCH | _ZERO):
                    end = min(offset + length, self._newest(("size", op.where)) or 0)
                    self._write(number, op.where, offset, bytes(max(0, end - offset)))
                elif not mode & _KEEP_SIZE:
                    self._add(number, ("size", op.where), max(self._newest(("size", op.where)) or 0, offset + length))
            case "sync":
                for place, versions in self.places.items():
                    if _belongs(place, op.where):
                        versions.synced(op.began, self.doubtful.get(op.where, -1))
            case "sync failed" if not isinstance(op.where, str):
                self.doubtful[op.where] = number

    def _add(self, number: int, place: Place, version: Any) -> None:
        self.places.setdefault(place, Versions([(-1, None)])).of.append((number, version))

    def _newest(self, place: Place) -> Any:
        return self.places[place].of[-1][1] if place in self.places else None

    def _write(self, number: int, file: int, offset: int, data: bytes) -> None:
        if not data:
            return
        end = offset + len(data)
        for block in range(offset // BLOCK, -(-end // BLOCK)):
            begin = block * BLOCK
            old = self._newest(("block", file, block)) or bytes(BLOCK)
            low, high = max(offset, begin), min(end, begin + BLOCK)
            new = old[: low - begin] + data[low - offset : high - offset] + old[high - begin :]
            self._add(number, ("block", file, block), new)
        if end > (self._newest(("size", file)) or 0):
            self._add(number, ("size", file), end)

    def _cut(self, number: int, file: int, size: int) -> None:
        self._add(number, ("size", file), size)
        for place in [place for place in self.places if place[:2] == ("block", file)]:
            begin = place[2] * BLOCK
            if begin + BLOCK > size and (old := self._newest(place)):
                self._add(number, place, old[: max(0, size - begin)].ljust(BLOCK, b"\0"))

    @property
    def choices(self) -> dict[Place, int]:
        """The places of which it is open what the disk has, and of how many versions."""
        return {place: len(versions.of) for place, versions in self.places.items() if len(versions.of) > 1}

    def image(self, chosen: dict[Place, int], tear: random.Random | None = None) -> Image:
        """The files by path with these versions. `tear`: blocks may be torn between sectors."""
        have = {place: versions.of[chosen.get(place, 0)][1] for place, versions in self.places.items()}
        if tear:
            for place, at in chosen.items():
                if place[0] == "block" and at and tear.random() < 0.3:
                    old, new = (self.places[place].of[each][1] or bytes(BLOCK) for each in (at - 1, at))
                    cut = tear.randrange(BLOCK // SECTOR) * SECTOR
                    have[place] = new[:cut] + old[cut:] if tear.random() < 0.5 else old[:cut] + new[cut:]
        bodies: dict[int, dict[int, bytes]] = {}
        for (kind, *which), block in have.items():
            if kind == "block" and block is not None:
                bodies.setdefault(which[0], {})[which[1]] = block
        return {
            path[0]: None if file == "directory" else Body(have.get(("size", file)) or 0, bodies.get(file, {}))
            for (kind, *path), file in have.items()
            if kind == "name" and file is not None and self._can_be_reached(path[0], have)
        }

    def _can_be_reached(self, path: str, have: dict[Place, Any]) -> bool:
        """Whether the directories that lead to a path are there."""
        above = ("name", path.rpartition("/")[0])
        return above not in have or (have[above] is not None and self._can_be_reached(above[1], have))


def _belongs(place: Place, to: Any) -> bool:
    """Whether a sync of this file, or of the directory with this path, is about a place."""
    if place[0] == "name":
        return place[1].rpartition("/")[0] == to
    return place[1] == to


def images(disk: Disk, rng: random.Random, at_random: int) -> Iterator[Image]:
    """What the disk may have: everything, nothing, all but one place, only one place, prefixes, and any mixture."""
    choices = disk.choices
    newest = {place: count - 1 for place, count in choices.items()}
    yield disk.image(newest)
    yield disk.image({})
    for place, version in newest.items():
        yield disk.image(newest | {place: 0})
        yield disk.image({place: version})
    for _ in range(at_random):
        share = rng.random()
        lost = {place: rng.randrange(count) for place, count in choices.items() if rng.random() < share}
        yield disk.image(newest | lost, rng)
        until = rng.choice([number for place in choices for number, _ in disk.places[place].of] or [0])
        yield disk.image({place: disk.places[place].at(until) for place in choices})


def put(image: Image, root: Path, directory: Path) -> None:
    """Make the files of an image, whose paths are below `root`, below `directory`."""
    for path, body in sorted(image.items()):
        place = directory / Path(path).relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        if body is None:
            place.mkdir(exist_ok=True)
        else:
            with place.open("wb") as file:
                for number, block in body.blocks.items():
                    if any(block):
                        file.seek(number * BLOCK)
                        file.write(block)
                file.truncate(body.size_bytes)
