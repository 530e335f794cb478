"""Servers for the tests of clients: in the test's own loop, in a thread, or as a process that can be stopped."""

import asyncio
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from async_cache import AsyncCache, CacheConfig, ServerConfig
from async_cache.l2 import Backend
from async_cache.server import Server

T = TypeVar("T")

SECONDS = 60
"""What no wait of a test takes."""
L1_BYTES = 2**20


@contextmanager
def short_directory() -> Iterator[Path]:
    """One whose name is short enough for sockets in it."""
    with tempfile.TemporaryDirectory(prefix="cl") as directory:
        yield Path(directory)


def make_cache(*backends: Backend) -> AsyncCache:
    return AsyncCache(CacheConfig(l1_bytes=L1_BYTES, l2=()), list(backends))


@asynccontextmanager
async def serve(url: str, *backends: Backend, **settings: Any) -> AsyncIterator[tuple[AsyncCache, Server]]:
    """A cache and its server, in this loop."""
    async with (
        make_cache(*backends) as cache,
        Server(cache, ServerConfig(listen=(url,), **settings)) as server,
    ):
        yield cache, server


class ThreadedServer:
    """A server in a thread: `run` has its loop run something."""

    def __init__(self, url: str, cache: AsyncCache, loop: asyncio.AbstractEventLoop):
        self.url, self.cache = url, cache
        self._loop = loop

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(SECONDS)

    def call(self, call: Callable[..., T], *arguments: Any) -> T:
        async def run() -> T:
            return call(*arguments)

        return self.run(run())


@contextmanager
def serve_in_thread(*backends: Backend, **settings: Any) -> Iterator[ThreadedServer]:
    """A server in another thread, at a socket of its own."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        with short_directory() as directory:
            url = f"unix://{directory}/s"
            serving = serve(url, *backends, **settings)
            cache, _ = asyncio.run_coroutine_threadsafe(serving.__aenter__(), loop).result(SECONDS)
            try:
                yield ThreadedServer(url, cache, loop)
            finally:
                asyncio.run_coroutine_threadsafe(serving.__aexit__(None, None, None), loop).result(SECONDS)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def serve_in_process(url: str) -> Iterator[subprocess.Popen[str]]:
    """A server process, which may be stopped (`stopped`) or killed."""
    arguments = ["serve", "--listen", url, "--l1-bytes", "1MiB", "--l2", "memory://", "--log-level", "error"]
    process = subprocess.Popen([sys.executable, "-m", "async_cache", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert any(line.startswith("serving at ") for line in process.stdout)
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.communicate(timeout=SECONDS)


@contextmanager
def stopped(process: subprocess.Popen[str]) -> Iterator[None]:
    """While a process does not run."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


async def until(holds: Callable[[], bool]) -> None:
    """Return once something holds that nobody tells of: what the kernel, or a client's inside, has come to."""
    async with asyncio.timeout(SECONDS):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
