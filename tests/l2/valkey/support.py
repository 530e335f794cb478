"""What the tests of this backend share: an open backend that leaves nothing behind, and waiting for what must come."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from async_cache.errors import BackendError
from async_cache.l2.urls.registry import from_url
from async_cache.l2.valkey.backend import ValkeyBackend
from async_cache.testing.conformance import key

PATIENCE_SECONDS = 100.0  # on a busy machine
NOBODY = key(10**9)


def sockets() -> int:
    """The sockets that this process has."""
    gc.collect()
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return sum("socket:" in link for link in links)


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """No socket and no task is left of what is done inside."""
    before, tasks = sockets(), asyncio.all_tasks()
    yield
    await eventually(lambda: sockets() <= before and asyncio.all_tasks() - {asyncio.current_task()} <= tasks)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[ValkeyBackend]:
    """The backend of a URL, open, which leaves nothing behind."""
    async with nothing_left():
        backend = from_url(url)
        assert isinstance(backend, ValkeyBackend)
        await backend.open()
        try:
            yield backend
        finally:
            await backend.close()


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 (what is waited for tells nobody)
            await asyncio.sleep(0.01)


async def answers(backend: ValkeyBackend) -> bool:
    """Whether the backend can be asked."""
    try:
        await backend.lookup([])
        await backend.delete([NOBODY])
    except BackendError:
        return False
    return True


async def until_it_answers(backend: ValkeyBackend) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await answers(backend):  # noqa: ASYNC110 (what is waited for tells nobody)
            await asyncio.sleep(0.02)
