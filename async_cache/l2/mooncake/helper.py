"""The helper's program: `python -m async_cache.l2.mooncake.helper SOCKET FILE:BYTES ...`, with numbers of descriptors.

It ends when the socket does: so it never outlives the process that started it.
"""

import os
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from mmap import mmap
from threading import Lock
from typing import Any

import msgspec

from async_cache.l2.mooncake.calls import (
    LENGTH,
    Answer,
    Close,
    Find,
    ListAll,
    Load,
    Page,
    Remove,
    Request,
    Setup,
    Store,
)

try:
    from mooncake.store import MooncakeDistributedStore

    from async_cache.l2.mooncake.pool import Pool, address
except ImportError as error:  # told to who waits: a library of the system is missing more often than not
    MISSING: str | None = str(error)
else:
    MISSING = None

CONNECT_SECONDS = 2.0


class UsageError(Exception):
    """The configuration cannot work, whatever the pool does."""


class Helper:
    """Reads calls from the socket, and lets threads carry them out; answers come in any order."""

    def __init__(self, connection: socket.socket, files: list[mmap | None]):
        self._connection = connection
        self._reader = connection.makefile("rb")
        self._sending = Lock()
        self._decode = msgspec.msgpack.Decoder(Request).decode
        self._files = files

    def run(self) -> None:
        """Serve until the socket ends."""
        while (request := self._next()) is not None:
            call = request.call
            if isinstance(call, Setup):
                self._answer(request.number, self._set_up, call)
            elif isinstance(call, Close):
                self._answer(request.number, self._close)
            elif isinstance(call, Find):
                self._finds.submit(self._answer, request.number, self._pool.find, call.keys)
            elif isinstance(call, Load):
                self._loads.submit(
                    self._answer, request.number, self._pool.load, call.keys, call.places, call.may_be_shorter
                )
            elif isinstance(call, Store):
                self._changes.submit(
                    self._answer, request.number, self._pool.store, call.keys, call.places, call.replaced
                )
            elif isinstance(call, Remove):
                self._changes.submit(self._answer, request.number, self._pool.remove, call.keys)
            elif isinstance(call, ListAll):
                self._listings.submit(self._answer, request.number, self._pool.list_all, self._url)
            elif isinstance(call, Page):
                self._listings.submit(
                    self._answer, request.number, self._pool.page, call.listing, call.begin, call.count
                )

    def _next(self) -> Request | None:
        length = self._reader.read(LENGTH.size)
        if len(length) < LENGTH.size:
            return None
        return self._decode(self._reader.read(*LENGTH.unpack(length)))

    def _answer(self, number: int, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            answer = Answer(number, function(*arguments))
        except Exception as error:  # the root of a call: whoever waits for it gets it
            text = " ".join(str(error).split()) or type(error).__name__
            answer = Answer(number, error=text, usage=isinstance(error, UsageError))
        frame = msgspec.msgpack.encode(answer)
        with self._sending:
            self._connection.sendall(LENGTH.pack(len(frame)) + frame)

    def _set_up(self, setup: Setup) -> list[bool]:
        if MISSING is not None:
            raise UsageError(
                f"Mooncake cannot be imported: {MISSING}; it needs async-kv-cache[mooncake], and libibverbs1 of "
                "the system (apt-get install libibverbs1)"
            )
        host = self._own_host(setup)
        files = self._files
        self._client = MooncakeDistributedStore()
        # With a port of its own the library tries once; without, twenty times. It uses the number as a name only.
        code = self._client.setup(
            f"{host}:{10_000 + os.getpid() % 50_000}",
            setup.metadata,
            setup.segment_bytes,
            0,
            setup.protocol,
            setup.devices,
            setup.master,
        )
        if code:
            raise ConnectionError(
                f"Mooncake's client cannot be set up (code {code}): check that the master {setup.master} is healthy, "
                f"that protocol={setup.protocol} works here, and that {host} is an address of this host"
            )
        for file in files:
            if file is not None and self._client.register_buffer(address(file), len(file)):
                raise ConnectionError("memory cannot be registered: check the limit of locked memory (ulimit -l)")
        self._pool = Pool(self._client, setup.namespace, files, setup.replicas)
        self._url = f"http://{setup.master.rpartition(':')[0]}:{setup.metrics_port}/get_all_keys"
        self._finds = ThreadPoolExecutor(2)
        self._loads = ThreadPoolExecutor(setup.threads)
        self._changes = ThreadPoolExecutor(setup.threads)
        self._listings = ThreadPoolExecutor(1)
        return [file is not None for file in files]

    def _close(self) -> None:
        if hasattr(self, "_client"):
            self._client.close()

    def _own_host(self, setup: Setup) -> str:
        """The address of this host that others reach it by: the one from which it reaches the master."""
        master, _, port = setup.master.rpartition(":")
        try:
            with socket.create_connection((master.strip("[]"), int(port)), CONNECT_SECONDS) as probe:
                return setup.host or str(probe.getsockname()[0])
        except OSError as error:
            raise ConnectionError(
                f"no master answers at {setup.master} ({error}): check that mooncake_master runs there, with this "
                "--rpc_port"
            ) from error


def _map(descriptor: int, size_bytes: int) -> mmap | None:
    """A memory file, mapped; None where it is sealed against new writers."""
    try:
        return mmap(descriptor, size_bytes)
    except PermissionError:
        return None


def main() -> None:
    """Serve the socket that was inherited, with the memory files.

    What a terminal or a supervisor signals to the whole group is for the cache, which has to flush before this ends.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    files = [_map(*map(int, file.split(":"))) for file in sys.argv[2:]]
    with suppress(OSError):  # the other end is gone
        Helper(connection, files).run()
    os._exit(0)  # threads may wait for a dead master


if __name__ == "__main__":
    main()
