"""The Mooncake backend beside Mooncake's own client, over TCP on loopback, with the pool's memory in a process of its
own: `python benchmarks/l2/mooncake_tcp.py`. Prints JSON.

A load is of 64 objects of 1 MiB into registered memory, verified, by ours; `batch_get_into` of the same records to the
same memory, by theirs, in a process of its own. A lookup is of 256 objects. Medians, taken in turns.
"""

import asyncio
import ctypes
import json
import mmap
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path

from async_cache import ObjectKey
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.record import TRAILER_BYTES, file_name
from async_cache.l2.urls.registry import from_url
from async_cache.memory.arena import Arena

OBJECTS, OBJECT_BYTES = 64, 2**20
RECORD_BYTES = OBJECT_BYTES + TRAILER_BYTES
LOOKUP = 256
ROUNDS = int(os.environ.get("ROUNDS", "41"))
NAMESPACE = "bench"


def keys():
    return [ObjectKey(blake2b(n.to_bytes(8, "little"), digest_size=32).digest(), 0, 0) for n in range(OBJECTS)]


def bare(master, segment_bytes, descriptor, size_bytes):
    """A client of Mooncake's own, which does what it is told by lines, and says how many seconds it took."""
    from mooncake.store import MooncakeDistributedStore

    client = MooncakeDistributedStore()
    assert client.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, 0, "tcp", "", master) == 0
    memory = mmap.mmap(descriptor, size_bytes)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert client.register_buffer(base, size_bytes) == 0
    names = [f"{NAMESPACE}/{file_name(key)}" for key in keys()]
    places = [base + n * RECORD_BYTES for n in range(OBJECTS)]
    print("ready", flush=True)
    for line in sys.stdin:
        begin, cpu = time.perf_counter(), time.process_time()
        if line.strip() == "load":
            result = client.batch_get_into(names, places, [RECORD_BYTES] * OBJECTS)
            assert result == [RECORD_BYTES] * OBJECTS, result
        else:
            assert sum(client.batch_is_exist(names * (LOOKUP // OBJECTS))) == LOOKUP
        print(time.perf_counter() - begin, time.process_time() - cpu, flush=True)


class Bare:
    def __init__(self, *arguments):
        fds = (arguments[2],)
        self.process = subprocess.Popen(
            [sys.executable, __file__, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=fds,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, what):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return tuple(map(float, self.process.stdout.readline().split()))

    def kill(self):
        self.process.kill()
        self.process.communicate()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_master():
    port, metrics_port = free_port(), free_port()
    program = str(Path(sys.executable).with_name("mooncake_master"))
    command = [program, "--rpc_port", str(port), "--metrics_port", str(metrics_port), "--default_kv_lease_ttl=600s"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process, port, metrics_port
        except OSError:
            time.sleep(0.05)


async def measure(backend, client, buffers):
    wanted, found = keys(), keys() * (LOOKUP // OBJECTS)
    assert await backend.store(wanted, buffers) == [True] * OBJECTS
    times = {"load": [], "bare load": [], "lookup": [], "bare lookup": []}
    cpu = {"bare load": []}
    for _ in range(ROUNDS):
        seconds, cpu_seconds = client.ask("load")
        times["bare load"].append(seconds)
        cpu["bare load"].append(cpu_seconds)
        begin = time.perf_counter()
        assert await backend.load(wanted, buffers) == [LoadOutcome.LOADED] * OBJECTS
        times["load"].append(time.perf_counter() - begin)
        times["bare lookup"].append(client.ask("lookup")[0])
        begin = time.perf_counter()
        assert all(await backend.lookup(found))
        times["lookup"].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


async def main():
    arena = Arena(-(-OBJECTS * RECORD_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE)
    master, port, metrics_port = start_master()
    address = f"127.0.0.1:{port}"
    clients = []
    try:
        clients.append(Bare(address, 2 * OBJECTS * RECORD_BYTES, arena.fd, arena.size_bytes))
        clients.append(Bare(address, 0, arena.fd, arena.size_bytes))
        backend = from_url(f"mooncake://{address}?namespace={NAMESPACE}&metrics_port={metrics_port}")
        backend.register(arena.fd, arena.view)
        await backend.open()
        arena.view[:] = os.urandom(arena.size_bytes)
        buffers = [arena.view[n * OBJECT_BYTES : (n + 1) * OBJECT_BYTES] for n in range(OBJECTS)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        medians = await measure(backend, clients[1], buffers)
        own = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
        await backend.close()
    finally:
        for client in clients:
            client.kill()
        master.kill()
        master.wait()
    mib = OBJECTS * OBJECT_BYTES / 2**20
    rows = [
        {
            "what": f"load of {OBJECTS} x 1 MiB",
            "ms": round(medians["load"] * 1e3, 1),
            "bare_ms": round(medians["bare load"] * 1e3, 1),
            "of_bare": round(medians["bare load"] / medians["load"], 2),
            "mib_per_s": round(mib / medians["load"]),
        },
        {
            "what": f"lookup of {LOOKUP} keys",
            "ms": round(medians["lookup"] * 1e3, 2),
            "bare_ms": round(medians["bare lookup"] * 1e3, 2),
            "times_bare": round(medians["lookup"] / medians["bare lookup"], 2),
        },
        {"what": "CPU of the caller's own process, all rounds, s", "seconds": round(own, 2)},
    ]
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        bare(sys.argv[1], *map(int, sys.argv[2:]))
    else:
        asyncio.run(main())
