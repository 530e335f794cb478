"""What the tests of faulty disks share: the files of a directory, and processes that end with their test."""

import gc
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, NamedTuple

from contract.support import SMALL, make_layout

from async_cache import ObjectGroup, ObjectKey
from async_cache.l2 import Backend
from async_cache.l2.filesystem.format import (
    MARKER,
    MARKER_LINE,
    RECORD_BYTES,
    VERSION,
    Kind,
    header,
    index_name,
    record,
    records,
    segment_name,
)

TESTS = Path(__file__).parents[1]

# A chunk is two objects, one smaller and one larger than a page.
LAYOUT = make_layout(SMALL, ObjectGroup((5000,), "uint8"))
CHUNK_PAGES = 2
PAGE_BYTES = 4096  # bodies begin at multiples of it


class Place(NamedTuple):
    """Where the bytes of an object lie."""

    path: Path
    offset: int
    size_bytes: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size_bytes)

    def write(self, data: bytes) -> None:
        """Put other bytes there, no more than there were."""
        assert len(data) <= self.size_bytes
        with self.path.open("r+b") as file:
            file.seek(self.offset)
            file.write(data)


def places(directory: Path) -> dict[ObjectKey, Place]:
    """Where the objects lie of which the index files of a directory say that they are there."""
    found, dropped = [], set()
    for path in directory.glob("*.idx"):
        for each in records(path.read_bytes()[RECORD_BYTES:]):
            kind, rank, group, segment, writer, page, _, size_bytes, chunk_hash, _, _ = each
            place = Place(directory / segment_name(writer, segment), page * PAGE_BYTES, size_bytes)
            if kind == Kind.DROP:
                dropped.add(place)
            else:
                found.append((ObjectKey(chunk_hash, rank, group), place))
    return {key: place for key, place in found if place not in dropped}


def place_of(directory: Path, key: ObjectKey) -> Place:
    """Where the bytes of an object lie."""
    return places(directory)[key]


def damage_record(directory: Path, key: ObjectKey) -> None:
    """Have no index say any more that an object is there."""
    for path in directory.glob("*.idx"):
        data = bytearray(path.read_bytes())
        for at in range(RECORD_BYTES, len(data), RECORD_BYTES):
            for _, rank, group, *_, chunk_hash, _, _ in records(bytes(data[at : at + RECORD_BYTES])):
                if ObjectKey(chunk_hash, rank, group) == key:
                    data[at] ^= 1
        path.write_bytes(data)


def claim(directory: Path, keys: Iterable[ObjectKey]) -> None:
    """Make a store whose index says that it has objects: they are found there, and can not be loaded."""
    directory.mkdir(exist_ok=True)
    (directory / MARKER).write_bytes(MARKER_LINE % VERSION)
    claims = [record(Kind.PUT, key, (1, 0, page), 80, 0) for page, key in enumerate(keys)]
    (directory / index_name(1, 0)).write_bytes(header(1) + b"".join(reversed(claims)))


async def listing(backend: Backend) -> dict[ObjectKey, int]:
    """What a backend knows once it has looked through its directory."""
    return {key: size async for key, size in backend.keys()}


def rests(directory: Path) -> list[str]:
    """What is in the directory and tells of no object, has none, and is not what says whose directory it is."""
    used = {place.path.name for place in places(directory).values()} | {"FORMAT", ".origins"}
    begun = [path.name for path in directory.glob(".origins/tmp.*")]
    return [name for name in os.listdir(directory) if not name.endswith(".idx") and name not in used] + begun


def allocated(directory: Path) -> int:
    """The bytes on the disk that the files of a directory take."""
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


def held_by_process() -> tuple[int, int]:
    """File descriptors, and threads beside those that the loop keeps for whoever wants one."""
    gc.collect()
    threads = [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
    return len(os.listdir("/proc/self/fd")), len(threads)


def say(line: Any) -> None:
    """To whoever started this program."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@contextmanager
def process(module: str, *arguments: Any) -> Iterator[Popen[str]]:
    """A module of the tests as a program, with pipes to it. It is killed at the end if it is still there."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with Popen(command, cwd=TESTS, stdin=PIPE, stdout=PIPE, text=True, bufsize=1) as child:
        try:
            yield child
        finally:
            child.kill()
