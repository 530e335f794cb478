"""A program forks while it has a cache and clients open: the child has its own, and the parent notices nothing."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .servers import serve_in_process, short_directory

HERE = Path(__file__).parent
SECONDS = 100


@contextmanager
def forking(child: str, loop: str, url: str, directory: Path) -> Iterator[str]:
    arguments = [sys.executable, "-W", "error", str(HERE / "forking.py"), child, loop, url, str(directory)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    yield done.stdout


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("child", ["exits", "collects", "is_a_process_of_multiprocessing", "opens_its_own"])
def test_a_forked_child_does_no_harm_to_its_parents_cache_and_clients(child: str, loop: str) -> None:
    with short_directory() as directory:
        url = f"unix://{directory}/s"
        with serve_in_process(url), forking(child, loop, url, directory) as said:
            assert said == "parent ok\n"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_what_was_opened_before_a_fork_says_so_in_the_child(loop: str) -> None:
    with short_directory() as directory:
        url = f"unix://{directory}/s"
        with serve_in_process(url), forking("uses_its_parents", loop, url, directory) as said:
            refused = "was opened before a fork: open another one in the child"
            assert said.splitlines() == [
                *(f"RuntimeError: the cache {refused}" for _ in range(3)),
                *(f"RuntimeError: the client {refused}" for _ in range(3)),
                *(f"CacheClosedError: the client {refused}" for _ in range(2)),
                "parent ok",
            ]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_what_was_begun_before_a_fork_neither_waits_nor_commits_in_the_child(loop: str) -> None:
    with short_directory() as directory:
        url = f"unix://{directory}/s"
        with serve_in_process(url), forking("waits_for_its_parents", loop, url, directory) as said:
            refused = "was opened before a fork: open another one in the child"
            assert said.splitlines() == [
                *(f"CacheClosedError: the writer {refused}" for _ in range(3)),
                *(f"CacheClosedError: the client {refused}" for _ in range(2)),
                "nothing is said",
                str([False] * 9),
                "parent ok",
            ]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_prefetch_that_was_pending_at_a_fork_is_done_in_the_child_with_an_error(loop: str) -> None:
    with short_directory() as directory:
        url = f"unix://{directory}/s"
        with serve_in_process(url), forking("waits_for_a_prefetch", loop, url, directory) as said:
            refused = "the prefetch was begun before a fork: begin another one in the child"
            assert said.splitlines() == ["True CacheClosedError", f"CacheClosedError: {refused}"] * 2 + ["parent ok"]
