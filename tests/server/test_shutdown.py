"""A server that is told to end does so in time, whatever is under way, and leaves nothing behind."""

import asyncio
import gc
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, Popen

import psutil
import pytest
from contract.support import count_hits, fill, make_layout, make_prompt, verify
from faults.disk import places, rests
from soak import rounds

from async_cache import AsyncCacheError, BlockingClient, ConnectionLostError, ObjectGroup, connect

from .programs import TESTS, environment, serve_command, server, socket_in
from .support import MIB, wait_until

SHUTDOWN_SECONDS = 60  # those of a server that nothing holds up, on a busy machine
NEVER = {"server_shutdown_timeout_seconds": 600, "close_timeout_seconds": 200}  # is it ended by that, but by itself
LAYOUT = make_layout(ObjectGroup((512 * 1024,), "uint8"), ObjectGroup((100,), "uint8"))
CHUNKS = 4
SMALL_PROMPTS = [make_prompt(50, number) for number in range(3)]
PROMPTS = [make_prompt(CHUNKS, number, LAYOUT) for number in range(40)]


class Load:
    """Clients that store, prefetch, read and remove without a pause, until the server is gone; counts what they did."""

    def __init__(self):
        self.done = 0

    async def run(self, url, number):
        """One client; more than one thing at a time."""
        async with connect(url, f"client {number}", heartbeat_seconds=None) as cache, asyncio.TaskGroup() as tasks:
            for offset in range(3):
                tasks.create_task(self._go_on(cache, 7 * number + offset))

    async def _go_on(self, cache, number):
        with suppress(ConnectionLostError):
            while True:
                prompt = PROMPTS[number % len(PROMPTS)]
                with suppress_all_but_loss():
                    await fill(cache, prompt)
                    prefetch = cache.prefetch(prompt)
                    await prefetch.load_done
                    async with cache.read(prefetch.request_id) as lease:
                        verify(lease, prompt)
                    cache.prefetch(PROMPTS[(number + 3) % len(PROMPTS)])
                    if number % 5 == 0:
                        await cache.delete(prompt)
                    if number % 7 == 0:
                        await cache.clear("l1")
                    self.done += 1
                number += 1

    def block(self, url):
        """The same in a thread, with a client that is not asynchronous."""
        with suppress(ConnectionLostError), BlockingClient(url, heartbeat_seconds=None) as cache:
            number = 0
            while True:
                with suppress_all_but_loss():
                    prefetch = cache.prefetch(PROMPTS[number % len(PROMPTS)])
                    prefetch.load_done.result()
                    with cache.read(prefetch.request_id) as lease:
                        verify(lease, PROMPTS[number % len(PROMPTS)])
                number += 1


class suppress_all_but_loss(suppress):  # noqa: N801
    """What a request may end with when a server shuts down, or another client removes what it wants."""

    def __init__(self):
        super().__init__(AsyncCacheError)

    def __exit__(self, kind, error, trace):
        return not isinstance(error, ConnectionLostError) and super().__exit__(kind, error, trace)


def assert_nothing_is_left(directory, served):
    """No process, no socket, and nothing in the directory but what was stored there."""
    assert not psutil.pid_exists(served.pid)
    assert {path.name for path in directory.iterdir()} <= {"log", "l2"}
    l2 = directory / "l2"
    assert rests(l2) == []


def segments(pid="self"):
    """The shared memory that a process has open or mapped: segments without a name, that end with the last of them."""
    gc.collect()
    opened = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            opened.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    mapped = [line.split(maxsplit=5)[5] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/" in line]
    return sorted(path for path in (*opened, *mapped) if path.startswith(("/memfd:", "/dev/shm/", "/SYSV")))


def whole(directory):
    """The objects that were stored are whole: one that was not finished is not there."""
    sizes = {place.size_bytes for place in places(directory / "l2").values()}
    return len(sizes) <= len(LAYOUT.groups)


async def test_a_shutdown_under_load(tmp_path, record_property):
    for round_ in range(rounds(3, 50)):
        number = signal.SIGINT if round_ % 3 == 2 else signal.SIGTERM
        directory = tmp_path / str(round_)
        directory.mkdir()
        urls = f"unix://{directory}/s", "tcp://127.0.0.1:0"
        before = segments()
        with server(directory, *urls, l1="48MiB", l2=[f"fs://{directory}/l2?capacity=64MiB"], **NEVER) as served:
            load = Load()
            clients = [asyncio.create_task(load.run(served.urls[n % 2], n)) for n in range(4)]
            thread = asyncio.create_task(asyncio.to_thread(load.block, served.url))

            async def is_busy(load=load):
                return load.done >= 20

            await wait_until(is_busy, 30)
            assert served.descendants() == []
            assert all(path.startswith("/memfd:") for path in segments(served.pid))
            began = time.monotonic()
            os.kill(served.pid, number)
            assert await asyncio.to_thread(served.child.wait, SHUTDOWN_SECONDS) == 0
            seconds = time.monotonic() - began
            await asyncio.wait_for(asyncio.gather(*clients, thread), SHUTDOWN_SECONDS)
            record_property("seconds", seconds)
            assert_nothing_is_left(directory, served)
            assert segments() == before
            assert whole(directory)


async def test_what_was_committed_before_is_in_storage_afterwards(tmp_path):
    with server(tmp_path, l2=[f"fs://{tmp_path}/l2"], **NEVER) as served:
        async with connect(served.url) as cache:
            for prompt in PROMPTS[:8]:
                await fill(cache, prompt)
            assert await count_hits(cache, PROMPTS[7]) == CHUNKS
            assert served.stop() == 0
    with server(tmp_path, l2=[f"fs://{tmp_path}/l2"]) as served:
        async with connect(served.url) as cache:
            for prompt in PROMPTS[:8]:
                assert await count_hits(cache, prompt) == CHUNKS


@pytest.mark.parametrize("then", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
async def test_further_signals_change_nothing_while_it_flushes_or_ends(tmp_path, first, then):
    """They come after its event loop has ended as well."""
    with server(tmp_path, l2=[f"fs://{tmp_path}/l2"], via=["server.odd", "slow"], **NEVER) as served:
        async with connect(served.url) as cache:
            for prompt in SMALL_PROMPTS:
                await fill(cache, prompt)
            os.kill(served.pid, first)
            sent = 0
            while psutil.Process(served.pid).status() != psutil.STATUS_STOPPED:
                os.kill(served.pid, then)
                sent += 1
                await asyncio.sleep(0.001)
            os.kill(served.pid, signal.SIGCONT)
            assert served.child.wait(SHUTDOWN_SECONDS) == 0 and sent > 10
            assert served.log.count("shutting down") == 1
    with server(tmp_path, l2=[f"fs://{tmp_path}/l2"]) as served:
        async with connect(served.url) as cache:
            assert [await count_hits(cache, prompt) for prompt in SMALL_PROMPTS] == [50] * len(SMALL_PROMPTS)


WAITS = {
    "load": lambda cache, prefetch: prefetch.load_done,
    "query_status": lambda cache, prefetch: cache.query_status(prefetch.request_id),
    "flush": lambda cache, prefetch: cache.flush(),
    "lookup": lambda cache, prefetch: cache.lookup(PROMPTS[9]),
}


@pytest.mark.parametrize(("kind", "timeout_seconds"), [("stuck", 0.5), ("stuck", 1.5), ("store", 50), ("lookup", 50)])
async def test_storage_that_never_ends_does_not_hold_up_a_shutdown(tmp_path, kind, timeout_seconds):
    """Its I/O is cancelled; where that does not help, the process ends with its threads, and its exit code tells."""
    settings = {
        "lookup_timeout_seconds": 600,
        "store_timeout_seconds": 600,
        "load_timeout_seconds": 600,
        "server_shutdown_timeout_seconds": timeout_seconds,
        "close_timeout_seconds": 0.4,
    }
    with server(tmp_path, l2=["memory://"], via=["server.odd", kind], **settings) as served:
        async with connect(served.url) as cache:
            await fill(cache, PROMPTS[0])
            prefetch = cache.prefetch(PROMPTS[1])
            waits = [asyncio.ensure_future(wait(cache, prefetch)) for wait in WAITS.values()]
            await asyncio.sleep(0)
            await cache.ping()
            began = time.monotonic()
            os.kill(served.pid, signal.SIGTERM)
            code = await asyncio.to_thread(served.child.wait, SHUTDOWN_SECONDS)
            assert kind != "stuck" or time.monotonic() - began >= timeout_seconds
            assert code == (1 if kind == "stuck" else 0)
            assert not (tmp_path / "s").exists()
            await asyncio.wait(waits, timeout=60)
            assert all(wait.done() for wait in waits)
            assert ("gave up waiting for storage" in served.log) == (kind == "stuck")


async def test_whoever_waits_is_told_of_the_shutdown(tmp_path):
    with server(tmp_path, via=["server.odd", "lookup"], lookup_timeout_seconds=600) as served:
        async with connect(served.url) as cache:
            prefetch = cache.prefetch(PROMPTS[0])
            waits = [
                asyncio.ensure_future(wait)
                for wait in (cache.lookup(PROMPTS[1]), cache.query_status(prefetch.request_id), prefetch.load_done)
            ]
            await asyncio.sleep(0)
            await cache.ping()
            assert await asyncio.to_thread(served.stop) == 0
            for outcome in await asyncio.gather(*waits, return_exceptions=True):
                assert isinstance(outcome, ConnectionLostError)
                assert "the server is shutting down" in str(outcome)


def test_a_signal_during_the_start_ends_it(tmp_path):
    """While the arena is being made, which takes a while."""
    command = serve_command(socket_in(tmp_path), l1=str(2048 * MIB), l2=["memory://"], config=None, via=["async_cache"])
    with Popen(command, cwd=TESTS, env=environment(), stdout=PIPE, stderr=PIPE, text=True) as child:
        try:
            assert child.stdout.readline().startswith("async-cache with")
            while not arena_of(child.pid):
                assert child.poll() is None
            child.terminate()
            assert child.wait(SHUTDOWN_SECONDS) == 0
            assert "Traceback" not in child.stderr.read()
        finally:
            child.kill()
    assert list(tmp_path.iterdir()) == []


def arena_of(pid):
    """Whether a process has made its arena: it listens to signals by then."""
    with suppress(OSError):
        directory = f"/proc/{pid}/fd"
        return any("memfd:async_cache" in os.readlink(f"{directory}/{fd}") for fd in os.listdir(directory))
    return False
