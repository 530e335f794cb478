"""`PagedWorker`: the loads and saves of a worker, in a thread beside its engine's. `AbsentWorker`: none of them."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from async_cache.client.client import CacheClient
from async_cache.errors import CacheClosedError
from async_cache.integrations.paged.copies import Copies, report_end
from async_cache.integrations.paged.device import Copy, Device
from async_cache.integrations.paged.host import leave_the_engines_core
from async_cache.integrations.paged.orders import NO_BLOCK, Complaint, Geometry, LoadOrder, Pages, SaveOrder

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Received:
    """The loads that have ended: all of them, those that fell short, and the blocks that these did not fill."""

    request_ids: set[str] = field(default_factory=set)
    short: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)

    def add(self, order: LoadOrder, filled: int, pages: Iterable[Pages]) -> None:
        """Note a load that has filled the blocks up to a token."""
        self.request_ids.add(order.request_id)
        if filled < order.end_token:
            self.short.add(order.request_id)
            for each in pages:
                # Where the table ends before, its last block has to stand for the tokens that have none.
                lacking = each.blocks(order.tables, filled, order.end_token)
                self.failed_blocks.update(lacking or order.tables[each.table][-1:])
            self.failed_blocks.discard(NO_BLOCK)


class Save(NamedTuple):
    """A save under way: the copies that have begun, and its end, when its blocks may change."""

    begun: "Future[list[Copy]]"
    read: "Future[None]"


class PagedWorker:
    """One worker of an engine, until it is closed. `device` has its pages, and is closed with it.

    `ranks`: those of the layout that it is, each with the groups that it holds. What one of them lacks of a chunk holds
    up none of what another one has.

    A loop in a thread of its own waits for the server and for the device. The methods are for the engine's thread; none
    waits but `preempted` and `settle`.
    """

    def __init__(
        self,
        connect: Callable[[], CacheClient],
        geometry: Geometry,
        device: Device,
        *,
        ranks: Sequence[int] = (0,),
        reader: int = 0,
    ):
        self._connect = connect
        self._geometry = geometry
        self._device = device
        self._reader = reader
        self._copies = [Copies(self._opened, geometry, device, rank=rank, reader=reader) for rank in ranks]
        self._loads: dict[str, tuple[LoadOrder, list[Future[int]]]] = {}
        self._saves: dict[str, list[Save]] = {}
        self._finished: set[str] = set()
        self._complaint = Complaint()
        self._client: CacheClient | None = None
        self._loop = asyncio.new_event_loop()
        self._opening = asyncio.Lock()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="async_cache worker", daemon=True)

    # Life.

    def close(self) -> None:
        """Let the copies end, and close the device and the client; idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()
        elif not self._loop.is_closed():
            self._loop.close()
            self._device.close()

    def _run(self) -> None:
        leave_the_engines_core()
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        await self._closing.wait()
        await asyncio.to_thread(self._device.close)
        await asyncio.gather(*(copies.close() for copies in self._copies))
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

    def _start(self, call: Coroutine[Any, Any, T]) -> "Future[T]":
        if self._thread.ident is None:
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    # Orders, and what became of them.

    def load(self, orders: Iterable[LoadOrder]) -> None:
        """Begin to fill blocks, after what the engine has submitted."""
        for order in orders:
            after = self._device.mark()
            filled = [self._start(copies.load(order, after)) for copies in self._copies]
            self._loads[order.request_id] = (order, filled)

    def save(self, orders: Iterable[SaveOrder]) -> None:
        """Begin to store blocks, after what the engine has submitted; they stay as they are until they are read."""
        if self._reader:  # another worker has the same bytes
            return
        for order in orders:
            after = self._device.mark()
            for copies in self._copies:
                begun: Future[list[Copy]] = Future()
                read = self._start(copies.save(order, after, begun))
                self._saves.setdefault(order.request_id, []).append(Save(begun, read))

    def preempted(self, request_ids: Iterable[str]) -> None:
        """Let nothing change the blocks of these requests before they are read: wait for room, and for the device."""
        for request_id in request_ids:
            self._hold(self._saves.pop(request_id, ()))

    def settle(self) -> None:
        """The same for all saves, where blocks can be taken away before their request has ended."""
        for saves in self._saves.values():
            self._hold(saves)

    def _hold(self, saves: Iterable[Save]) -> None:
        for save in saves:
            outcomes: list[Future[Any]] = [save.begun, save.read]
            wait(outcomes, return_when="FIRST_COMPLETED")
            copies = save.begun.result() if save.begun.done() else []  # it was cancelled: the worker is closed
            self._device.hold(copies)
            if all(copy.read.done() for copy in copies):  # then this is no wait for the device
                wait((save.read,))

    def finish(self, request_ids: Iterable[str]) -> None:
        """Note requests that have ended, and wait for their saves."""
        self._finished.update(request_ids)

    def sent(self) -> set[str]:
        """The finished requests whose saves have ended since it was last asked."""
        for request_id, saves in list(self._saves.items()):
            if all(save.read.done() for save in saves):
                del self._saves[request_id]
                for error in filter(None, (save.read.exception() for save in saves)):
                    self._complaint.log(error)
        sent = {request_id for request_id in self._finished if request_id not in self._saves}
        self._finished -= sent
        return sent

    def received(self) -> Received:
        """The loads that have ended since it was last asked."""
        received = Received()
        for request_id, (order, futures) in list(self._loads.items()):
            if all(future.done() for future in futures):
                del self._loads[request_id]
                received.add(order, min(self._filled(order, future) for future in futures), self._geometry.pages)
        return received

    def _filled(self, order: LoadOrder, future: "Future[int]") -> int:
        if (error := future.exception()) is not None:
            self._complaint.log(error)
            return order.first_token
        return future.result()


class AbsentWorker:
    """In place of a `PagedWorker` where there can be none: of what it is told, all loads fail, and all saves end.

    `pages`: by table of the engine, how many tokens a block has.
    """

    def __init__(self, pages: Sequence[Pages], *, reader: int = 0):
        self._pages = pages
        self._reader = reader
        self._received = Received()
        self._sent: set[str] = set()

    def close(self) -> None:
        """Do nothing."""

    def load(self, orders: Iterable[LoadOrder]) -> None:
        """Note loads that have failed."""
        for order in orders:
            self._received.add(order, order.first_token, self._pages)

    def save(self, orders: Iterable[SaveOrder]) -> None:
        """Report that they have ended."""
        if not self._reader:
            for order in orders:
                report_end(order)

    def preempted(self, request_ids: Iterable[str]) -> None:
        """Do nothing: no block is read."""

    def settle(self) -> None:
        """Do nothing: no block is read."""

    def finish(self, request_ids: Iterable[str]) -> None:
        """Note requests that have ended."""
        self._sent.update(request_ids)

    def sent(self) -> set[str]:
        """Those that have ended since it was last asked."""
        sent, self._sent = self._sent, set()
        return sent

    def received(self) -> Received:
        """The loads that have failed since it was last asked."""
        received, self._received = self._received, Received()
        return received
