"""Instructions of a request, counted by valgrind: `python benchmarks/instructions.py [REVISION]`; JSON, a few minutes.

The same for this tree and the other revision, however busy the machine is. Of a server: whole requests of 16 chunks in
L1, 64 at a time and one at a time, and a ping; without the thread that looks how long the loop is held, and in
`watching` without the looks of a watch twice a second: these cost by the time and not by the request. Of an embedded
cache: requests of what is in L1, the same with a read, and from L2.
`python benchmarks/instructions.py recording`: of this tree's server alone, without and with `record`;
`watching`: without and with metrics and a ledger of what left.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from revisions import CHUNKS, MARK, from_l2, request, whole_requests

SERVE = """
import runpy, sys
try:
    from async_cache.server.probe import Probe
    Probe.open = Probe.close = lambda self: None
except ImportError:
    pass
runpy.run_module("async_cache", run_name="__main__")
"""
WATCHED = """
import asyncio
from async_cache.metrics import Watch
async def looks_never(self):
    await asyncio.Event().wait()
Watch._run = looks_never
"""
UNWATCHED = """
from async_cache.metrics import Watch
Watch.open = lambda self: None
"""


class Counted:
    """A process whose instructions are counted, between two calls of `reset` and `count`."""

    def __init__(self, arguments, code, directory, **pipes):
        self._out = Path(directory, "counted")
        tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={self._out}"]
        environment = os.environ | {"PYTHONPATH": str(code), "PYTHONHASHSEED": "0"}
        if (code / MARK).exists():
            environment["ASYNC_CACHE_SERVER_HTTP"] = "127.0.0.1:0"
        command = [*tool, sys.executable, *arguments]
        self.process = subprocess.Popen(command, env=environment, cwd=directory, stderr=subprocess.DEVNULL, **pipes)

    def begin(self):
        self._control("-i", "on")

    def reset(self):
        self.count()

    def count(self):
        self._control("-d")
        dumps = list(self._out.parent.glob("counted*"))
        found = [int(n) for dump in dumps for n in re.findall(r"^totals: (\d+)", dump.read_text(), re.MULTILINE)]
        for dump in dumps:
            dump.unlink()
        return sum(found)

    def _control(self, *arguments):
        subprocess.run(["callgrind_control", *arguments, str(self.process.pid)], check=True, capture_output=True)


async def fill(holder, prompts):
    for prompt in prompts.values():
        async with holder.store(prompt) as writer:
            for chunk in writer:
                chunk.commit()
    await holder.flush()


def prompts_of(package):
    layout = package.ModelLayout("bench", (package.ObjectGroup((4096,), "uint8"),), chunk_tokens=4)
    return {count: layout.prompt([count, *range(count * 4 - 1)]) for count in CHUNKS}


async def served(code, url, counted):
    """The client runs with the same code as the server, and is not counted."""
    import async_cache

    prompts = prompts_of(async_cache)
    async with async_cache.connect(url, connect_timeout_seconds=1200, heartbeat_seconds=None) as client:
        await fill(client, prompts)

        async def pings(count):
            for _ in range(count):
                await client.ping()

        ways = {
            "whole_64": lambda count: whole_requests(client, prompts[16], 64, count),
            "whole_1": lambda count: whole_requests(client, prompts[16], 1, count),
            "ping": pings,
        }
        await ways["whole_64"](256)
        await asyncio.to_thread(counted.begin)
        for name, run in ways.items():
            await run(128)
            await asyncio.to_thread(counted.reset)
            await run(640)
            print(json.dumps({"what": name, "instructions": await asyncio.to_thread(counted.count) // 640}), flush=True)


async def embedded():
    """Runs in the counted process, and says on its output what it is about to do, or has done."""
    import async_cache

    prompts = prompts_of(async_cache)

    async def read(prompt):
        prefetch = cache.prefetch(prompt)
        await prefetch.load_done
        async with cache.read(prefetch.request_id) as lease:
            for chunk in lease:
                assert chunk.offset is not None

    async def times(call, prompt, count):
        for _ in range(count):
            await call(prompt)

    def say(name, count):
        print(name, count, flush=True)
        sys.stdin.readline()

    config = async_cache.CacheConfig(l1_bytes=2**24, l2=["memory://"])
    async with async_cache.AsyncCache(config) as cache:
        await fill(cache, prompts)
        say("begin", 1)
        for chunks, prompt in prompts.items():
            count = 6400 // chunks
            for name, call in (("l1", lambda prompt: request(cache, prompt)), ("read", read)):
                await times(call, prompt, 10)
                say("reset", 1)
                await times(call, prompt, count)
                say(f"{name}_{chunks}", count)
        for chunks, prompt in prompts.items():
            await from_l2(cache, prompt, 3)
            say("reset", 1)
            await from_l2(cache, prompt, 1600 // chunks)
            say(f"l2_{chunks}", 1600 // chunks)


def count_embedded(code, directory):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    counted = Counted([__file__, "embedded"], code, directory, **pipes)
    for line in counted.process.stdout:
        name, count = line.split()
        if name == "begin":
            counted.begin()
        elif (total := counted.count()) and name != "reset":
            print(json.dumps({"what": name, "instructions": total // int(count)}), flush=True)
        counted.process.stdin.write("\n")
        counted.process.stdin.flush()
    counted.process.wait()


@contextmanager
def serving(code, directory, serve=SERVE):
    arguments = ["-c", serve, "serve", "--listen", f"unix://{directory}/s", "--l1-bytes", "64MiB", "--l2", "memory://"]
    counted = Counted(arguments, code, directory, stdout=subprocess.DEVNULL)
    try:
        yield counted
    finally:
        counted.process.kill()
        counted.process.wait()


def one(code):
    """Count one revision; the process has its code already."""
    import uvloop

    with tempfile.TemporaryDirectory(prefix="kv-") as directory, serving(code, directory) as counted:
        uvloop.run(served(code, f"unix://{directory}/s", counted))
    with tempfile.TemporaryDirectory(prefix="kv-") as directory:
        count_embedded(code, directory)


def recording():
    """Count a server's requests without and with a recording, the thread that writes it included."""
    import uvloop

    for setting in ("", "recorded"):
        with tempfile.TemporaryDirectory(prefix="kv-") as directory:
            os.environ["ASYNC_CACHE_SERVER_RECORD"] = setting and f"{directory}/{setting}"
            print(json.dumps({"recording": bool(setting)}), flush=True)
            with serving(Path(__file__).parents[1], directory) as counted:
                uvloop.run(served(None, f"unix://{directory}/s", counted))


def watching():
    """Count a server's requests without metrics and a ledger of what left, and with them."""
    import uvloop

    for name, before in (("unwatched", UNWATCHED), ("watched", WATCHED)):
        os.environ["ASYNC_CACHE_EXPLAIN_CHUNKS"] = "1" if before is UNWATCHED else "65536"
        with tempfile.TemporaryDirectory(prefix="kv-") as directory:
            print(json.dumps({"server": name}), flush=True)
            with serving(Path(__file__).parents[1], directory, before + SERVE) as counted:
                uvloop.run(served(None, f"unix://{directory}/s", counted))


def main(revision="8453ff3"):
    here = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory(prefix="kv-revision-") as there:
        archive = subprocess.run(["git", "archive", revision, "async_cache"], cwd=here, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", there], input=archive.stdout, check=True)
        counts = {}
        for name, code in (("here", here), (revision, Path(there))):
            environment = os.environ | {"PYTHONPATH": str(code)}
            command = [sys.executable, __file__, "one", str(code)]
            told = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            counts[name] = {row["what"]: row["instructions"] for row in map(json.loads, told.splitlines())}
    for what, other in counts[revision].items():
        mine = counts["here"][what]
        print(json.dumps({"what": what, "ratio": round(mine / other, 3), "here": mine, revision: other}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["embedded"]:
        import uvloop

        uvloop.run(embedded())
    elif sys.argv[1:2] == ["one"]:
        one(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["recording"]:
        recording()
    elif sys.argv[1:2] == ["watching"]:
        watching()
    else:
        main(*sys.argv[1:])
