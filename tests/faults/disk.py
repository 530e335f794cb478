"""What the tests of faulty disks share: the files of a directory, and processes that end with their test."""

import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from contract.support import SMALL, make_layout

from async_cache import ObjectGroup, ObjectKey
from async_cache.l2 import Backend

TESTS = Path(__file__).parents[1]

# A chunk is two objects, one smaller and one larger than a page.
LAYOUT = make_layout(SMALL, ObjectGroup((5000,), "uint8"))
CHUNK_PAGES = 2
TRAILER_BYTES = 64  # of a file, behind its object


def path_of(directory: Path, key: ObjectKey) -> Path:
    """The file of an object."""
    return directory / f"{key.chunk_hash.hex()}.{key.rank}.{key.group}.kv"


async def listing(backend: Backend) -> dict[ObjectKey, int]:
    """What a backend knows once it has looked through its directory."""
    return {key: size async for key, size in backend.keys()}


def rests(directory: Path) -> list[str]:
    """What is in the directory and no object."""
    return [name for name in os.listdir(directory) if not name.endswith(".kv")]


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
