"""What the tests of faulty disks share: the files of a directory, and processes that end with their test."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from async_cache import ObjectGroup, ObjectKey
from contract.support import SMALL, make_layout

TESTS = Path(__file__).parents[1]

# A chunk is two objects, one smaller and one larger than a page, and takes three pages of L1.
LAYOUT = make_layout(SMALL, ObjectGroup((5000,), "uint8"))
CHUNK_PAGES = 3


def path_of(directory: Path, key: ObjectKey) -> Path:
    """The file of an object."""
    return directory / f"{key.chunk_hash.hex()}.{key.rank}.{key.group}.kv"


def rests(directory: Path) -> list[str]:
    """What is in the directory and no object."""
    return [name for name in os.listdir(directory) if not name.endswith(".kv")]


@contextmanager
def process(module: str, *arguments: Any) -> Iterator[Popen[str]]:
    """A module of the tests as a program, with pipes to it. It is killed at the end if it is still there."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with Popen(command, cwd=TESTS, stdin=PIPE, stdout=PIPE, text=True, bufsize=1) as child:
        try:
            yield child
        finally:
            child.kill()
