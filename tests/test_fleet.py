"""Several servers share a store: the example does what it says, and what both have deleted neither serves."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from contract.support import fill, make_layout, make_prompt, pattern
from l2.valkey.servers import running
from server.programs import server
from soak import rounds

from async_cache import CacheClient, ObjectGroup, Prompt, connect

EXAMPLE = Path(__file__).parents[1] / "examples" / "fleet" / "fleet.py"
LAYOUT = make_layout(ObjectGroup((1000,), "uint8"))
CHUNKS = 4
WORKERS = 8
VERSIONS = 250  # the version of a prompt's bytes is a byte: they return after so many, long after they were deleted


# The example.


def start_example(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("store", "steps"), [("valkey", 17), ("directory", 11)])
def test_the_example_finds_what_it_must(store: str, steps: int) -> None:
    with start_example("--store", store) as child:
        told, errors = child.communicate(timeout=50)
    assert child.returncode == 0, told + errors
    assert len(told.splitlines()) == 1 + steps
    assert " b  " in next(line for line in told.splitlines() if line.startswith("what a stored"))


def test_two_servers_that_run_are_only_asked(tmp_path: Path) -> None:
    with two_servers(tmp_path, f"fs://{tmp_path}/store") as urls:
        with start_example("--connect", *urls) as child:
            told, errors = child.communicate(timeout=50)
        assert child.returncode == 0, told + errors
        assert "what both deleted" in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_example_that_is_stopped_stops_what_it_started(number: signal.Signals) -> None:
    with start_example() as child:
        example = psutil.Process(child.pid)
        started: list[psutil.Process] = []
        while len(started) < 2 and child.poll() is None:  # Valkey and a server, which is still starting
            started = example.children(recursive=True)
        os.kill(child.pid, number)
        _, errors = child.communicate(timeout=50)
    assert child.returncode == 130, errors
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in started)


def test_what_cannot_be_a_store_is_one_line() -> None:
    with start_example("--store", "nope://x") as child:
        told, errors = child.communicate(timeout=50)
    assert (child.returncode, told) == (1, "")
    assert len(errors.splitlines()) == 1
    assert "unknown scheme 'nope'" in errors


# Two servers against a model.


@contextmanager
def two_servers(directory: Path, l2: str) -> Iterator[list[str]]:
    """Their addresses."""
    with ExitStack() as stack:
        urls = []
        for name in ("a", "b"):
            folder = directory / name
            folder.mkdir()
            urls.append(stack.enter_context(server(folder, l2=[l2], l1="8MiB")).url)
        yield urls


@pytest.fixture(params=["valkey", "directory"])
async def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[CacheClient, CacheClient]]:
    """Clients of two servers that share one store."""
    with ExitStack() as stack:
        if request.param == "valkey":
            l2 = f"valkey://127.0.0.1:{stack.enter_context(running(tmp_path / 'valkey')).port}"
        else:
            l2 = f"fs://{tmp_path}/store"
        urls = stack.enter_context(two_servers(tmp_path, l2))
        async with connect(urls[0]) as a, connect(urls[1]) as b:
            yield a, b


async def find(cache: CacheClient, prompt: Prompt) -> list[bytes]:
    """The bytes that a server has of a prompt, by chunk."""
    prefetch = cache.prefetch(prompt)
    await prefetch.load_done
    async with cache.read(prefetch.request_id) as lease:
        found = [bytes(chunk.views[0]) for chunk in lease]
    await cache.end_request(prefetch.request_id)
    return found


class Model:
    """What may be served of one prompt, which one worker at a time stores, deletes and finds through both servers.

    Whoever stores it writes bytes of a new version. What one server deleted the other may serve, from its own L1; what
    both deleted neither may.
    """

    def __init__(self, number: int, told: Counter[str]):
        self.prompt = make_prompt(CHUNKS, number, LAYOUT)
        self.told = told
        self.version = 0
        self.alive: set[int] = set()  # versions that were stored since both deleted
        self.everywhere = False  # it is in L2, and nothing was deleted since: both must find all of it

    def allowed(self, versions: set[int]) -> list[set[bytes]]:
        """By chunk, what may be served."""
        return [{pattern(self.prompt, i, version=version) for version in versions} for i in range(CHUNKS)]

    async def find(self, cache: CacheClient, *, must: bool = False) -> int:
        """Look at what is there, and return how many chunks that is."""
        found = await find(cache, self.prompt)
        for served, allowed in zip(found, self.allowed(self.alive), strict=False):
            assert served in allowed, "bytes that were deleted"
        assert not must or len(found) == CHUNKS, "what one stored the other did not find"
        self.told["found" if len(found) == CHUNKS else "found a part" if found else "found nothing"] += 1
        return len(found)

    async def store(self, *caches: CacheClient) -> None:
        """Store it through these, at the same time; each has bytes of its own."""
        versions = [(self.version + n) % VERSIONS for n in range(len(caches))]
        self.version += len(caches)
        self.alive |= set(versions)
        async with asyncio.TaskGroup() as tasks:
            for cache, version in zip(caches, versions, strict=True):
                tasks.create_task(fill(cache, self.prompt, version=version))
        self.told["stored"] += len(caches)

    async def delete_everywhere(self, caches: tuple[CacheClient, CacheClient], *, together: bool) -> None:
        """Delete it through both; afterwards nothing of it may be served."""
        if together:
            await asyncio.gather(*(cache.delete(self.prompt) for cache in caches))
        else:
            for cache in caches:
                await cache.delete(self.prompt)
        self.alive.clear()
        self.everywhere = False
        self.told["deleted by both"] += 1


async def play(model: Model, caches: tuple[CacheClient, CacheClient], rng: random.Random) -> None:
    """One round: an action, and what both serve after it."""
    one, other = rng.sample(caches, 2)
    how = rng.random()
    if how < 0.3:
        await model.store(one)
        if rng.random() < 0.7:
            await one.flush()
            model.everywhere = model.everywhere or len(model.alive) == 1
    elif how < 0.4:
        await model.store(one, other)
    elif how < 0.5:
        await one.clear("l1")
    elif how < 0.6:
        await one.delete(model.prompt)
        model.everywhere = False
        model.told["deleted by one"] += 1
    elif how < 0.7:  # asked for while it is deleted: nothing waits to be written, so it does not return
        await asyncio.gather(one.flush(), other.flush())
        asking = asyncio.gather(*(find(cache, model.prompt) for cache in caches for _ in range(3)))
        await model.delete_everywhere((one, other), together=True)
        await asking
    elif how < 0.85:
        await model.delete_everywhere((one, other), together=rng.random() < 0.5)
    for cache in rng.sample(caches, 2):
        await model.find(cache, must=model.everywhere)


async def test_what_both_deleted_none_serves_and_what_one_stored_the_other_finds(
    fleet: tuple[CacheClient, CacheClient],
) -> None:
    told: Counter[str] = Counter()

    async def work(number: int) -> None:
        rng = random.Random(number)
        models = [Model(10 * number + n, told) for n in range(3)]
        for _ in range(rounds(200, 10_000) // WORKERS):
            await play(rng.choice(models), fleet, rng)

    async with asyncio.TaskGroup() as tasks:
        for number in range(WORKERS):
            tasks.create_task(work(number))
    assert min(told[what] for what in ("found", "found nothing", "stored", "deleted by both", "deleted by one")) > 10
