"""What a chunk costs in the index of L1 and in that of the file backend, with few and with a million of them; and a
restart over a full directory: `python benchmarks/index.py`. Prints JSON.

A request looks 250 chunks up and leases them, at a random place; instructions are counted by callgrind, if valgrind is
there; memory is that of a fresh process, without the arena. Each row is from a process of its own.
"""

import asyncio
import gc
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from hashlib import blake2b
from itertools import cycle
from pathlib import Path

import uvloop

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, ObjectKey
from async_cache.l1.store import L1Store
from async_cache.l2.filesystem.format import MARKER, MARKER_LINE, VERSION, Kind, header, index_name, record
from async_cache.l2.index import Index
from async_cache.memory.arena import Arena
from async_cache.retention.lru import LeastRecentlyUsed

COUNTS = (1000, 1_000_000)
REQUEST_CHUNKS = 250
REQUESTS = 400
ROUNDS = 9
OBJECTS = 200_000
LAYOUT = ModelLayout("index", (ObjectGroup((8,), "uint8"),), chunk_tokens=1)
PAGE = LAYOUT.objects.room_bytes[0]


def chunk_hash(number):
    return blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


class Indices:
    """Both indices with as many chunks, and what a request does with them."""

    def __init__(self, chunks):
        self.l1 = L1Store(Arena(chunks * PAGE), LeastRecentlyUsed(), lambda entry: None)
        self.l2 = Index()
        before = None
        for number in range(chunks):
            digest = chunk_hash(number)
            (room,) = self.l1.reserve(LAYOUT, [(digest, 0)])
            self.l1.commit(room, LAYOUT.objects.full_mask, before)
            self.l2.put(ObjectKey(digest, 0, 0), 8)
            before = digest

    def lease(self, hashes):
        entries = list(map(self.l1.index.get, hashes))
        self.l1.lease(entries)
        return entries

    def release(self, entries):
        self.l1.release(reversed(entries))

    def pin(self, hashes):
        return self.l2.pin_chunks(hashes, ((0, 0),))

    def unpin(self, keys):
        self.l2.unpin(keys)


def requests(chunks):
    """Chunk hashes of so many requests, made before the clock runs."""
    rng = random.Random(1)
    begins = [rng.randrange(chunks - REQUEST_CHUNKS + 1) for _ in range(REQUESTS)]
    return [[chunk_hash(begin + number) for number in range(REQUEST_CHUNKS)] for begin in begins]


def timed(chunks):
    """Nanoseconds a chunk, medians of rounds, and how long a garbage collection takes that visits the indices."""
    gc.collect()
    gc.freeze()  # what Python has imported is not visited
    indices, hashes = Indices(chunks), requests(chunks)
    begin = time.thread_time()
    gc.collect()
    collection_ms = (time.thread_time() - begin) * 1e3
    keys = [[ObjectKey(digest, 0, 0) for digest in request] for request in hashes]
    rounds = [one_round(indices, hashes, keys) for _ in range(ROUNDS)]
    row = {name: round(statistics.median(each[name] for each in rounds)) for name in rounds[0]}
    return row | {"collection_ms": round(collection_ms, 1)}


def one_round(indices, hashes, keys):
    seconds = dict.fromkeys(("lookup_and_lease_ns", "release_ns", "pin_ns", "unpin_ns"), 0.0)

    def clocked(name, call, argument):
        begin = time.perf_counter()
        result = call(argument)
        seconds[name] += time.perf_counter() - begin
        return result

    for request in hashes:
        clocked("release_ns", indices.release, clocked("lookup_and_lease_ns", indices.lease, request))
    for request, its_keys in zip(hashes, keys, strict=True):
        clocked("pin_ns", indices.pin, request)
        clocked("unpin_ns", indices.unpin, its_keys)
    return {name: value * 1e9 / REQUESTS / REQUEST_CHUNKS for name, value in seconds.items()}


def memory(chunks):
    """Bytes of process memory a chunk, in both indices together."""
    before = resident_bytes()
    indices = Indices(chunks)
    row = {"bytes": round((resident_bytes() - before) / chunks)}
    del indices
    return row


def resident_bytes():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def counted(chunks, repeats):
    """Look up, lease and release, while callgrind counts; then end at once."""
    indices, hashes = Indices(chunks), requests(chunks)
    command = ("callgrind_control", "-i", "on", str(os.getpid()))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for _ in range(repeats):
        for request in hashes:
            indices.release(indices.lease(request))
    os._exit(0)


def instructions(chunks):
    """Instructions a chunk to look up, lease and release: the difference between one time and two times."""
    totals = []
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        valgrind = ("valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}")
        for repeats in ("1", "2"):
            command = (*valgrind, sys.executable, __file__, "counted", str(chunks), repeats)
            environment = {**os.environ, "PYTHONHASHSEED": "0"}
            subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL, timeout=3600)
            (line,) = [line for line in out.read_text().splitlines() if line.startswith("totals:")]
            totals.append(int(line.split()[1]))
    return {"instructions": round((totals[1] - totals[0]) / REQUESTS / REQUEST_CHUNKS)}


# A restart.


def fill(directory, prompts):
    """A store whose index tells of them all; nobody reads the bodies."""
    (directory / MARKER).write_bytes(MARKER_LINE % VERSION)
    digests = (digest for prompt in prompts for digest in prompt.chunk_hashes)
    records = [record(Kind.PUT, (digest, 0, 0), (1, 0, page), 8, 0) for page, digest in enumerate(digests)]
    (directory / index_name(1, 0)).write_bytes(header(1) + b"".join(records))


class Lag:
    """How long the loop was held at most, as a task sees it that ticks: its thread's CPU time, and wall time."""

    cpu_ms = wall_ms = 0.0

    async def tick(self):
        while True:
            cpu, wall = time.thread_time(), time.perf_counter()
            await asyncio.sleep(0.001)
            self.cpu_ms = max(self.cpu_ms, (time.thread_time() - cpu) * 1e3)
            self.wall_ms = max(self.wall_ms, (time.perf_counter() - wall) * 1e3 - 1)


async def restart(objects):
    """From a directory of so many objects: when the cache is open, when it answers, when recovery is done."""
    prompts = [LAYOUT.prompt([number] * REQUEST_CHUNKS) for number in range(objects // REQUEST_CHUNKS)]
    with tempfile.TemporaryDirectory() as directory:
        fill(Path(directory), prompts)
        lag, begin = Lag(), time.perf_counter()
        ticking = asyncio.create_task(lag.tick())
        async with AsyncCache(CacheConfig(l1_bytes=PAGE, l2=[f"fs://{directory}?capacity=none"])) as cache:
            opened = time.perf_counter()
            answers, complete = [], 0
            for prompt in cycle(prompts):
                asked = time.perf_counter()
                complete += (await cache.lookup(prompt)).chunks == REQUEST_CHUNKS
                answers.append(time.perf_counter() - asked)
                (usage,) = (await cache.stats()).backends.values()
                if usage.objects == objects:
                    break
                await asyncio.sleep(0.02)
            recovered = time.perf_counter()
            ticking.cancel()
    return {
        "objects": objects,
        "open_s": round(opened - begin, 3),
        "first_answer_s": round(opened - begin + answers[0], 3),
        "slowest_answer_s": round(max(answers), 3),
        "answers": len(answers),
        "complete": complete,
        "recovered_s": round(recovered - begin, 3),
        "held_cpu_ms": round(lag.cpu_ms, 1),
        "held_wall_ms": round(lag.wall_ms, 1),
    }


def alone(what, *numbers):
    """A row from a process of its own."""
    command = (sys.executable, __file__, what, *map(str, numbers))
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=3600).stdout)


def main():
    rows = [{"chunks": chunks} | alone("timed", chunks) for chunks in COUNTS]
    rows[-1] |= alone("memory", COUNTS[-1])
    if shutil.which("callgrind_control"):
        for row in rows:
            row |= instructions(row["chunks"])
    print(json.dumps({"index": rows, "restart": alone("restart", OBJECTS)}))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        mode = {"timed": timed, "memory": memory, "counted": counted, "restart": lambda n: uvloop.run(restart(n))}
        print(json.dumps(mode[sys.argv[1]](*map(int, sys.argv[2:]))))
