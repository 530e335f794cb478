"""This working tree beside another revision, in turns: `python benchmarks/revisions.py [REVISION] [TURNS]`; JSON.

Each has a server and a client in processes of their own, and an embedded cache in the client's. A ratio is the median
over the turns of this tree's figure over the other's in the same turn: of requests a second, or of microseconds.
"""

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

CHUNKS = (16, 256)
MARK = Path("async_cache/server/http")  # a revision that has it would serve HTTP at a port of its own
now = time.perf_counter


class Revision:
    """A server and a driver of one revision, whose code is in a directory."""

    def __init__(self, code, directory, stack):
        self.url = f"unix://{directory}/s"
        environment = os.environ | {"PYTHONPATH": str(code)}
        served = environment | ({"ASYNC_CACHE_SERVER_HTTP": "127.0.0.1:0"} if (code / MARK).exists() else {})
        serve = ["-m", "async_cache", "serve", "--listen", self.url, "--l1-bytes", "256MiB", "--l2", "memory://"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.server = subprocess.Popen([sys.executable, *serve], env=served, cwd=directory, **quiet)
        stack.callback(self._stop)
        l2 = f"fs://{directory}/kv?capacity=none"
        drive = [sys.executable, __file__, "drive", self.url, str(self.server.pid), l2]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.driver = subprocess.Popen(drive, env=environment, cwd=directory, **pipes)
        stack.callback(self.driver.wait)
        stack.callback(self.driver.stdin.close)

    def _stop(self):
        self.server.send_signal(signal.SIGTERM)
        self.server.wait(10)

    def turn(self):
        self.driver.stdin.write("turn\n")
        self.driver.stdin.flush()
        return json.loads(self.driver.stdout.readline())


def main(revision="8453ff3", turns="9"):
    here = Path(__file__).parents[1]
    with ExitStack() as stack:
        there = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-revision-")))
        archive = subprocess.run(["git", "archive", revision, "async_cache"], cwd=here, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", there], input=archive.stdout, check=True)
        directories = [stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-")) for _ in range(2)]
        ours, theirs = (Revision(code, where, stack) for code, where in zip((here, there), directories, strict=True))
        rows = []
        for turn in range(int(turns) + 1):
            pair = {name.url: name.turn() for name in ((ours, theirs) if turn % 2 else (theirs, ours))}
            rows.append((pair[ours.url], pair[theirs.url]))
        rows = rows[1:]  # the first is to get warm
        for figure in rows[0][0]:
            ratio = statistics.median(mine[figure] / other[figure] for mine, other in rows)
            mine, other = (statistics.median(row[which][figure] for row in rows) for which in (0, 1))
            print(json.dumps({"figure": figure, "ratio": round(ratio, 3), "here": mine, revision: other}))
        print(json.dumps({"load": os.getloadavg()}))


# In a process with the code of one revision.


async def drive(url, server, l2):
    """Measure once for each line that comes."""
    from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, connect

    layout = ModelLayout("bench", (ObjectGroup((4096,), "uint8"),), chunk_tokens=4)
    prompts = {count: layout.prompt([count, *range(count * 4 - 1)]) for count in CHUNKS}
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    config = CacheConfig(l1_bytes=2**25, l2=[l2])
    async with connect(url, connect_timeout_seconds=30) as client, AsyncCache(config) as cache:
        for holder in (client, cache):
            for prompt in prompts.values():
                async with holder.store(prompt) as writer:
                    for chunk in writer:
                        chunk.views[0][:] = bytes([chunk.index % 251]) * 4096
                        chunk.commit()
            await holder.flush()
        while await lines.readline():
            before = cpu_us(server)
            figures = {
                "whole_requests_per_s_64": await whole_requests(client, prompts[16], 64, 4000),
                "server_cpu_us_64": (cpu_us(server) - before) / 4000,
                "whole_requests_per_s_1": await whole_requests(client, prompts[16], 1, 1000),
                "ping_us": await times(client.ping, 2000),
            }
            for count, prompt in prompts.items():
                figures[f"l1_{count}_us"] = await times(lambda prompt=prompt: request(cache, prompt), 16_000 // count)
                figures |= await from_l2(cache, prompt, 4000 // count)
            print(json.dumps(figures), flush=True)


def cpu_us(process):
    """What a process has computed so far, in microseconds."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") * 1e6


async def whole_requests(client, prompt, depth, total):
    """Prefetch, both answers, read, end: how many a second."""
    left = iter(range(total))

    async def worker():
        for _ in left:
            prefetch = client.prefetch(prompt)
            assert (await prefetch.lookup_done).chunks == len(prompt)
            await prefetch.load_done
            async with client.read(prefetch.request_id) as lease:
                assert len(lease) == len(prompt)
            await client.end_request(prefetch.request_id)

    began = now()
    await asyncio.gather(*(worker() for _ in range(depth)))
    return total / (now() - began)


async def request(cache, prompt):
    prefetch = cache.prefetch(prompt)
    await prefetch.load_done
    await cache.end_request(prefetch.request_id)


async def times(call, count):
    """The median, in microseconds."""
    seconds = []
    for _ in range(count):
        began = now()
        await call()
        seconds.append(now() - began)
    return statistics.median(seconds) * 1e6


async def from_l2(cache, prompt, count):
    """Medians until the promise of what is in L2, and until it is in memory, in microseconds."""
    known, loaded = [], []
    for _ in range(count):
        await cache.clear("l1")
        began = now()
        prefetch = cache.prefetch(prompt)
        assert (await prefetch.lookup_done).l2_chunks == len(prompt)
        known.append(now() - began)
        await prefetch.load_done
        loaded.append(now() - began)
        await cache.end_request(prefetch.request_id)
    name = f"l2_{len(prompt)}"
    return {f"{name}_promise_us": statistics.median(known) * 1e6, f"{name}_loaded_us": statistics.median(loaded) * 1e6}


if __name__ == "__main__":
    if sys.argv[1:2] == ["drive"]:
        import uvloop

        uvloop.run(drive(*sys.argv[2:]))
    else:
        main(*sys.argv[1:])
