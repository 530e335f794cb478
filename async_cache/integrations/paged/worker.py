"""`PagedWorker`: copies between leases and pages, behind the forward pass."""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from async_cache.client.client import CacheClient
from async_cache.errors import AsyncCacheError, CacheClosedError, ConfigError, ConnectionLostError
from async_cache.handles.lease import ReadLease
from async_cache.handles.writer import Writer
from async_cache.integrations.paged.orders import NO_BLOCK, Complaint, Geometry, LoadOrder, SaveOrder

log = logging.getLogger(__name__)

Order = TypeVar("Order", LoadOrder, SaveOrder)
T = TypeVar("T")

_LOAD_SECONDS = 5.0  # it was expected to end soon when it got its blocks: after this, they are computed
_RESERVE_SECONDS = 1.0  # a save that has no room by then is given up: it holds blocks of the engine
_PAUSE_SECONDS = 5.0  # without saves, after one that the server did not answer


@dataclass
class Received:
    """The loads that have ended: all of them, those that fell short, and the blocks that these did not fill."""

    request_ids: set[str] = field(default_factory=set)
    short: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)


class PagedWorker:
    """One rank of an engine, until it is closed. `caches` are the pages by layer, block numbers first.

    A loop in a thread of its own waits for the server, and a second thread copies. The methods are for the engine's
    thread; none waits but `preempted`.
    """

    def __init__(
        self,
        connect: Callable[[], CacheClient],
        geometry: Geometry,
        caches: Mapping[str, torch.Tensor],
        *,
        rank: int = 0,
        reader: int = 0,
    ):
        self._connect = connect
        self._geometry = geometry
        self._chunk_tokens = geometry.layout.chunk_tokens
        self._caches = [[caches[layer] for layer in pages.layers] for pages in geometry.pages]
        self._rank, self._reader = rank, reader
        self._loads: dict[str, tuple[LoadOrder, Future[int]]] = {}
        self._saves: dict[str, list[Future[None]]] = {}
        self._finished: set[str] = set()
        self._complaint = Complaint()
        self._client: CacheClient | None = None
        self._loop = asyncio.new_event_loop()
        self._opening = asyncio.Lock()
        self._closing = asyncio.Event()
        self._saves_from = 0.0  # by the loop's clock
        self._reports: set[asyncio.Task[None]] = set()  # they end with their saves, or with the loop
        self._copier = ThreadPoolExecutor(1, "async_cache copy", initializer=_leave_the_engines_core)
        self._thread = threading.Thread(target=self._run, name="async_cache worker", daemon=True)

    # Life.

    def close(self) -> None:
        """Let the copies end, and close the client; idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()
        elif not self._loop.is_closed():
            self._loop.close()

    def _run(self) -> None:
        _leave_the_engines_core()
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        await self._closing.wait()
        await asyncio.to_thread(self._copier.shutdown)
        async with self._opening:
            if self._client is not None:
                await self._client.close()

    async def _opened(self) -> CacheClient:
        """The client, which connects for the first order: where there is no server, for the next one again."""
        async with self._opening:
            if self._closing.is_set():
                raise CacheClosedError("the worker is closed")
            if self._client is None:
                self._client = await self._connect().open()
            return self._client

    def _start(self, call: Callable[[Order], Coroutine[Any, Any, T]], order: Order) -> "Future[T]":
        if self._thread.ident is None:
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(call(order), self._loop)

    # Orders, and what became of them.

    def load(self, orders: Iterable[LoadOrder]) -> None:
        """Begin to fill blocks."""
        for order in orders:
            self._loads[order.request_id] = (order, self._start(self._load, order))

    def save(self, orders: Iterable[SaveOrder]) -> None:
        """Begin to store blocks, which are computed now, and stay as they are until the save has ended."""
        if self._reader:  # another worker has the same bytes
            return
        for order in orders:
            self._saves.setdefault(order.request_id, []).append(self._start(self._save, order))

    def preempted(self, request_ids: Iterable[str]) -> None:
        """Wait until nothing reads the blocks of these requests."""
        for request_id in request_ids:
            wait(self._saves.pop(request_id, ()))

    def settle(self) -> None:
        """Wait for all saves, where blocks can be taken away before their request has ended."""
        for futures in self._saves.values():
            wait(futures)

    def finish(self, request_ids: Iterable[str]) -> None:
        """Note requests that have ended, and wait for their saves."""
        self._finished.update(request_ids)

    def sent(self) -> set[str]:
        """The finished requests whose saves have ended since it was last asked."""
        for request_id, futures in list(self._saves.items()):
            if all(future.done() for future in futures):
                del self._saves[request_id]
                for error in filter(None, (future.exception() for future in futures)):
                    self._complaint.log(error)
        sent = {request_id for request_id in self._finished if request_id not in self._saves}
        self._finished -= sent
        return sent

    def received(self) -> Received:
        """The loads that have ended since it was last asked."""
        received = Received()
        for request_id, (order, future) in list(self._loads.items()):
            if not future.done():
                continue
            del self._loads[request_id]
            received.request_ids.add(request_id)
            filled = order.first_token
            if (error := future.exception()) is not None:
                self._complaint.log(error)
            else:
                filled = future.result()
            if filled < order.end_token:
                received.short.add(request_id)
                for pages in self._geometry.pages:
                    # Where the table ends before, its last block has to stand for the tokens that have none.
                    lacking = pages.blocks(order.tables, filled, order.end_token)
                    received.failed_blocks.update(lacking or order.tables[pages.table][-1:])
        received.failed_blocks.discard(NO_BLOCK)
        return received

    # Loading.

    async def _load(self, order: LoadOrder) -> int:
        """The token up to which the blocks are filled."""
        try:
            if not all(pages.covers(order.tables, order.end_token) for pages in self._geometry.pages):
                raise ValueError(f"a block table is too short for the {order.end_token} tokens that are to be loaded")
            async with asyncio.timeout(_LOAD_SECONDS):
                client = await self._opened()
                lease = await client.read(order.read_id, rank=self._rank, reader=self._reader)
            with lease:
                filled = await self._copy(self._fill, lease, order)
                return filled if lease.held else order.first_token
        except (AsyncCacheError, TimeoutError) as error:
            self._complaint.log(error)
            return order.first_token

    def _fill(self, lease: ReadLease, order: LoadOrder) -> int:
        filled = order.first_token
        for chunk in lease:
            begin = chunk.index * self._chunk_tokens
            first, end = max(begin, order.first_token), min(begin + self._chunk_tokens, order.end_token)
            if first != filled or end <= first:
                continue
            for pages, caches, stored in zip(self._geometry.pages, self._caches, chunk.tensors(), strict=True):
                if stored is not None:
                    skipped = (first - begin) // pages.block_tokens
                    _scatter(caches, pages.blocks(order.tables, first, end), stored[:, skipped:])
            filled = end
        return filled

    # Saving.

    async def _save(self, order: SaveOrder) -> None:
        """Store it. This ends when the blocks are copied; a task reports when the server has what was copied."""
        writer = None
        try:
            writer = await self._reserve(order)
            if writer is not None:
                with writer:
                    for chunk in writer:
                        if await self._copy(self._gather, chunk.index, chunk.tensors(), order):
                            chunk.commit()
        except (AsyncCacheError, TimeoutError) as error:
            if isinstance(error, ConnectionLostError | TimeoutError):
                self._saves_from = self._loop.time() + _PAUSE_SECONDS
            self._complaint.log(error)
        finally:
            if not self._closing.is_set():
                reporting = self._loop.create_task(self._report(order, writer))
                self._reports.add(reporting)
                reporting.add_done_callback(self._reports.discard)

    async def _reserve(self, order: SaveOrder) -> Writer | None:
        """A writer of what is to be saved; None during the pause after one that the server did not answer."""
        if self._loop.time() < self._saves_from:
            return None
        if order.prompt.layout != self._geometry.layout:
            raise ConfigError("layers of different shapes in one group of vLLM's are not supported")
        async with asyncio.timeout(_RESERVE_SECONDS):
            client = await self._opened()
            client.check_connected()  # where it is lost, the next one is not waited for
            return await client.store(order.prompt, rank=self._rank, start_chunk=self._first_whole(order))

    async def _report(self, order: SaveOrder, writer: Writer | None) -> None:
        if writer is not None:
            await writer.settled()
        if order.report is not None:
            try:
                order.report.send()
            except OSError as error:
                log.debug("the scheduler does not hear that a save has ended: %s", error)

    def _blocks(self, order: SaveOrder, index: int) -> list[list[int]] | None:
        """The blocks of a chunk, by pages; None where it is not whole: a window has passed, or a table ends before."""
        begin, end = index * self._chunk_tokens, (index + 1) * self._chunk_tokens
        if not all(pages.covers(order.tables, end) for pages in self._geometry.pages):
            return None
        numbers = [pages.blocks(order.tables, begin, end) for pages in self._geometry.pages]
        return None if any(NO_BLOCK in blocks for blocks in numbers) else numbers

    def _first_whole(self, order: SaveOrder) -> int:
        chunks = range(order.start_chunk, len(order.prompt))
        return next((index for index in chunks if self._blocks(order, index) is not None), len(order.prompt))

    def _gather(self, index: int, stored: Sequence[torch.Tensor | None], order: SaveOrder) -> bool:
        numbers = self._blocks(order, index)
        if numbers is None:
            return False
        for caches, blocks, out in zip(self._caches, numbers, stored, strict=True):
            if out is not None:
                rows = torch.tensor(blocks)
                for cache, part in zip(caches, out, strict=True):
                    torch.index_select(cache, 0, rows, out=part.view(-1, *cache.shape[1:]))
        return True

    async def _copy(self, copy: Callable[..., T], *args: Any) -> T:
        """Run a copy in the copier's thread."""
        return await self._loop.run_in_executor(self._copier, copy, *args)


def _scatter(caches: Sequence[torch.Tensor], blocks: Sequence[int], stored: torch.Tensor) -> None:
    """Copy (layers, blocks, ...) into the blocks of each layer, but for those that a window has passed."""
    kept = [n for n, block in enumerate(blocks) if block != NO_BLOCK]
    if not kept:
        return
    rows = torch.tensor([blocks[n] for n in kept])
    stored = stored[:, : len(blocks)] if len(kept) == len(blocks) else stored[:, kept]
    for cache, part in zip(caches, stored, strict=True):
        cache.index_copy_(0, rows, part.reshape(-1, *cache.shape[1:]))


def _leave_the_engines_core() -> None:
    """An engine on a CPU binds its threads to cores, and those that it starts: these are not to compete with it."""
    with suppress(OSError, AttributeError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
