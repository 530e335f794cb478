"""A served cache in a thread, and what an engine with pages would bring."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from async_cache import AsyncCache, CacheConfig, CacheStats, ModelLayout, ObjectGroup, ServerConfig, TenantConfig
from async_cache.integrations.paged import Copy, Device, Geometry, Pages
from async_cache.integrations.paged.orders import NO_BLOCK
from async_cache.l2.memory import MemoryBackend
from async_cache.server import Server
from async_cache.testing.backends import GatedBackend

BOUND_TOKEN = "only for the salt one"
CHUNK, BLOCK, LAYERS, NUMBERS = 8, 4, 3, 10


class Served:
    """A server at `url`, whose storage can be held up."""

    def __init__(self, url: str):
        self.url = url
        self.storage = GatedBackend(MemoryBackend())
        self.cache: AsyncCache | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.stopped = asyncio.Event()
        self.ready = threading.Event()

    async def serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        bound = TenantConfig(tokens=(BOUND_TOKEN,), salts=("one",))
        config = ServerConfig(listen=(self.url,), tenants={"bound": bound})
        async with AsyncCache(CacheConfig(l1_bytes=2**22), backends=[self.storage]) as cache, Server(cache, config):
            self.cache = cache
            self.ready.set()
            await self.stopped.wait()

    def stop(self) -> None:
        assert self.loop is not None
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.stopped.set)

    def run(self, call: Callable[[AsyncCache], Coroutine[Any, Any, Any]]) -> Any:
        """Run something in the server's loop."""
        assert self.loop is not None and self.cache is not None
        return asyncio.run_coroutine_threadsafe(call(self.cache), self.loop).result(60)

    def hold(self, *verbs: Any) -> None:
        async def hold(_: AsyncCache) -> None:
            self.storage.hold(*verbs)

        self.run(hold)

    def release(self) -> None:
        async def release(_: AsyncCache) -> None:
            self.storage.release()

        self.run(release)

    def forget(self) -> None:
        """What is in memory; storage keeps it."""

        async def forget(cache: AsyncCache) -> None:
            await cache.flush()
            await cache.clear("l1")

        self.run(forget)

    def stats(self) -> CacheStats:
        stats: CacheStats = self.run(lambda cache: cache.stats())
        return stats


@contextmanager
def served(directory: Path) -> Iterator[Served]:
    server = Served(f"unix://{directory}/s")
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    assert server.ready.wait(60)
    try:
        yield server
    finally:
        server.stop()
        thread.join()


@dataclass
class Request:
    """What an engine knows of a request."""

    request_id: str
    all_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


def geometry(world_size: int = 1, windows: tuple[int | None, ...] = (None,)) -> Geometry:
    """One group for each window, each with a block table and layers of its own."""
    groups = tuple(ObjectGroup((LAYERS, CHUNK // BLOCK, NUMBERS), "float32", window_chunks=w) for w in windows)
    pages = tuple(
        Pages(table, BLOCK, tuple(f"{table}.{layer}" for layer in range(LAYERS))) for table in range(len(windows))
    )
    return Geometry(ModelLayout("toy", groups, chunk_tokens=CHUNK, world_size=world_size), pages)


def pipeline(*layers: int) -> list[Geometry]:
    """By stage, the same layout, in which each stage has so many layers, and where its own are."""
    groups = tuple(
        ObjectGroup((count, CHUNK // BLOCK, NUMBERS), "float32", ranks=(rank,)) for rank, count in enumerate(layers)
    )
    layout = ModelLayout("toy", groups, chunk_tokens=CHUNK, world_size=len(layers))
    own = [Pages(0, BLOCK, tuple(f"{stage}.{n}" for n in range(count))) for stage, count in enumerate(layers)]
    others = Pages(0, BLOCK, ())
    return [
        Geometry(layout, tuple(pages if number == stage else others for number, pages in enumerate(own)))
        for stage in range(len(layers))
    ]


class CheckedDevice:
    """A device, of which the calls have to be as `Device` says."""

    def __init__(self, inner: Device):
        self.inner = inner
        self.pin_bytes = inner.pin_bytes
        self._engine: int | None = None  # threads
        self._other: int | None = None
        self._marks: list[object] = []
        self._saves: list[Copy] = []
        self.closed = False

    def _in_engine(self) -> None:
        self._engine = self._engine or threading.get_ident()
        assert threading.get_ident() == self._engine != self._other, "that is for the engine's thread"

    def _in_other(self) -> None:
        self._other = self._other or threading.get_ident()
        assert threading.get_ident() == self._other != self._engine, "that is for one other thread"

    def mark(self) -> object:
        self._in_engine()
        assert not self.closed
        mark = (object(), self.inner.mark())
        self._marks.append(mark)
        return mark

    def hold(self, copies: Iterable[Copy]) -> None:
        self._in_engine()
        held = list(copies)
        assert all(copy in self._saves for copy in held), "only saves that have begun are waited for"
        self.inner.hold(held)

    def pin(self, view: memoryview, *, writable: bool) -> None:
        self._in_other()
        self.inner.pin(view, writable=writable)

    def _checked(self, group: int, blocks: Sequence[int], host: torch.Tensor, after: object) -> object:
        self._in_other()
        assert host.is_contiguous() and len(blocks) == host.shape[1]
        return next(mark[1] for mark in self._marks if mark is after)  # type: ignore[index]

    def save(self, group: int, blocks: Sequence[int], host: torch.Tensor, after: object) -> Copy:
        assert NO_BLOCK not in blocks
        copy = self.inner.save(group, blocks, host, self._checked(group, blocks, host, after))
        self._saves.append(copy)
        return copy

    def load(self, group: int, blocks: Sequence[int], host: torch.Tensor, after: object) -> Copy:
        return self.inner.load(group, blocks, host, self._checked(group, blocks, host, after))

    def close(self) -> None:
        self.closed = True
        self.inner.close()


def caches(where: Geometry, blocks: int = 16, *, filled: bool) -> dict[str, torch.Tensor]:
    """The pages of all layers; a block is (2, 5)."""
    make = torch.rand if filled else torch.zeros
    return {layer: make(blocks, 2, NUMBERS // 2) for pages in where.pages for layer in pages.layers}


def until(holds: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What it returns, once it is something: an engine asks in every step."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.001)
    return value
