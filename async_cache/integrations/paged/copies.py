"""`Copies`: orders carried out in one loop, with a client for the chunks and a device for the blocks."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from async_cache.errors import AsyncCacheError, ConfigError, ConnectionLostError
from async_cache.handles.lease import ReadChunk
from async_cache.handles.stream import ReadStream
from async_cache.handles.writer import WriteChunk, Writer
from async_cache.integrations.paged.device import Copy, Device, DeviceError, Fence, Mark
from async_cache.integrations.paged.orders import NO_BLOCK, Complaint, Geometry, LoadOrder, SaveOrder
from async_cache.prompt.layout import Prompt

log = logging.getLogger(__name__)

_LOAD_SECONDS = 5.0  # it was expected to end soon when it got its blocks: after this, they are computed
_RESERVE_SECONDS = 1.0  # a save that has no room by then is given up: it holds blocks of the engine
_PAUSE_SECONDS = 5.0  # without saves, after one that the server did not answer
_COPY_SECONDS = 30.0  # a device that has not passed a fence by then is left alone until it has
_LAST_SECONDS = 1.0  # for what was copied to come to the server, when all is closed


class Chunks(Protocol):
    """What is needed of a client: see `CacheClient`."""

    def check_connected(self) -> None: ...
    def window(self, size_bytes: int) -> memoryview | None: ...
    def stream(self, request_id: str, *, rank: int = 0, reader: int = 0) -> ReadStream: ...
    def store(self, prompt: Prompt, *, rank: int = 0, start_chunk: int = 0) -> Writer: ...


class Fill(NamedTuple):
    """A chunk, so far as it has these `objects`, on its way into the blocks of the tokens from `first` to `end`."""

    objects: int
    first: int
    end: int
    copies: Sequence[Copy]


@dataclass
class Saving:
    """Chunks on their way out of blocks, in the order in which they are committed."""

    writer: Writer | None = None
    copies: list[Copy] = field(default_factory=list)  # all that have begun
    chunks: deque[tuple[WriteChunk, list[Copy]]] = field(default_factory=deque)  # of which all have


class Copies:
    """The loads and saves of one rank, in the loop that its methods are called in.

    `opened` gives the client, or raises AsyncCacheError. No copy is left behind: blocks are told to be filled or to
    have failed once the device has passed the fences of all copies. While it does not, the blocks of a load may still
    be written to, so nothing is told of it; what it leased is given back, and the device is left alone.
    """

    def __init__(
        self, opened: Callable[[], Awaitable[Chunks]], geometry: Geometry, device: Device, *, rank: int, reader: int
    ):
        self._opened = opened
        self._geometry = geometry
        self._chunk_tokens = geometry.layout.chunk_tokens
        self._device = device
        self._rank, self._reader = rank, reader
        objects = geometry.layout.objects
        self._held = [rank in objects.ranks_of(group) for group in geometry.layout.groups]
        self._complaint = Complaint()
        self._saves_from = 0.0  # by the loop's clock
        self._landing: set[asyncio.Task[None]] = set()  # they end with their saves, or with the loop
        self._stuck: set[Fence] = set()  # that the device has not passed in time, and not yet
        self._pinned = False  # once: what comes after a reconnect goes through memory of the device's own
        self._closed = False

    async def close(self) -> None:
        """Wait a moment for what was copied to come to the server. The device was closed before."""
        self._closed = True
        if self._landing:
            await asyncio.wait(self._landing, timeout=_LAST_SECONDS)

    def _check_device(self) -> None:
        if self._stuck:
            raise DeviceError(f"the device has not ended a copy in {_COPY_SECONDS:g} s: until then, it is left alone")

    async def _pass(self, fences: Iterable[Fence]) -> None:
        """Wait until the device has passed these, or failed to. Raises DeviceError where it does neither."""
        for fence in fences:
            try:
                async with asyncio.timeout(_COPY_SECONDS):
                    await _passed(fence)
            except TimeoutError:
                self._stuck.add(fence)
                fence.add_done_callback(self._stuck.discard)
                self._check_device()

    # Loading.

    async def load(self, order: LoadOrder, after: Mark) -> int:
        """Fill blocks, after what the engine had submitted; the token up to which they are filled."""
        begun: list[Copy] = []
        try:
            self._check_device()
            fills = await self._stream(order, after, begun)
            await self._pass(copy.done for copy in begun)
            return self._filled(fills, order)
        except (AsyncCacheError, TimeoutError) as error:
            self._complaint.log(error)
            return order.first_token
        finally:
            for copy in begun:  # until then, it is nobody else's to write there
                await _passed(copy.done)

    async def _stream(self, order: LoadOrder, after: Mark, begun: list[Copy]) -> list[Fill]:
        """Begin to copy chunks as they come, until they are read: those that count, none if the lease was lost."""
        if not all(pages.covers(order.tables, order.end_token) for pages in self._geometry.pages):
            raise ValueError(f"a block table is too short for the {order.end_token} tokens that are to be loaded")
        until = asyncio.get_running_loop().time() + _LOAD_SECONDS
        async with asyncio.timeout_at(until):
            client = await self._opened()
            stream = await client.stream(order.read_id, rank=self._rank, reader=self._reader)
        with stream:
            fills: list[Fill] = []
            try:
                while await self._more(stream, len(fills), until):
                    fills += [self._fill(chunk, order, after, begun) for chunk in stream[len(fills) :]]
                counted = stream[: stream.result.chunks]
                for number, chunk in enumerate(counted):
                    if chunk.objects != fills[number].objects:  # it has become the end: windows need more of it
                        fills[number] = self._fill(chunk, order, after, begun)
                del fills[len(counted) :]
            finally:
                await self._pass(copy.read for copy in begun)
            return fills if stream.held else []

    async def _more(self, stream: ReadStream, begun: int, until: float) -> bool:
        """Wait for chunks that are not being copied yet; a copy has no such end, since it has to leave the blocks."""
        async with asyncio.timeout_at(until):
            return await stream.arrived(begun + 1)

    def _fill(self, chunk: ReadChunk, order: LoadOrder, after: Mark, begun: list[Copy]) -> Fill:
        """Begin to copy a chunk into the blocks of those of its tokens that are to be loaded."""
        begin = chunk.index * self._chunk_tokens
        first, end = max(begin, order.first_token), min(begin + self._chunk_tokens, order.end_token)
        earlier = len(begun)
        if first < end:
            for group, (pages, stored) in enumerate(zip(self._geometry.pages, chunk.tensors(), strict=True)):
                if stored is not None:
                    count = self._chunk_tokens // pages.block_tokens
                    blocks = [NO_BLOCK] * ((first - begin) // pages.block_tokens)
                    blocks += pages.blocks(order.tables, first, end)
                    blocks += [NO_BLOCK] * (count - len(blocks))
                    begun.append(self._device.load(group, blocks, stored, after))
        return Fill(chunk.objects, first, end, begun[earlier:])

    def _filled(self, fills: Iterable[Fill], order: LoadOrder) -> int:
        filled = order.first_token
        for _, first, end, copies in fills:
            if first >= end:  # the engine has it
                continue
            if first != filled or self._failed(copies):
                break
            filled = end
        return filled

    def _failed(self, copies: Iterable[Copy]) -> bool:
        for copy in copies:
            error = copy.done.exception()
            if error is not None:
                self._complaint.log(error)
                return True
        return False

    # Saving.

    async def save(self, order: SaveOrder, after: Mark, begun: "Future[list[Copy]]") -> None:
        """Store blocks, after what the engine had submitted; `begun` gets the copies, when all have begun.

        This ends when the blocks may change; a task reports when the server has what was copied.
        """
        saving = Saving()
        try:
            try:
                self._check_device()
                await self._begin(order, after, saving)
            finally:
                begun.set_result(saving.copies)
            await self._pass(copy.read for copy in saving.copies)
            self._commit(saving)
        except (AsyncCacheError, TimeoutError) as error:
            if isinstance(error, ConnectionLostError | TimeoutError):
                self._saves_from = asyncio.get_running_loop().time() + _PAUSE_SECONDS
            self._complaint.log(error)
        finally:
            if not self._closed:
                landing = asyncio.get_running_loop().create_task(self._land(order, saving))
                self._landing.add(landing)
                landing.add_done_callback(self._landing.discard)

    async def _begin(self, order: SaveOrder, after: Mark, saving: Saving) -> None:
        """Reserve room, and begin to copy, but for the pause after a save that the server did not answer."""
        if asyncio.get_running_loop().time() < self._saves_from:
            return
        if order.prompt.layout != self._geometry.layout:
            raise ConfigError("the layers of this rank, and those that its scheduler knows of, have different shapes")
        first = self._first_whole(order)
        if first == len(order.prompt):
            return
        async with asyncio.timeout(_RESERVE_SECONDS):
            client = await self._opened()
            client.check_connected()  # where it is lost, the next one is not waited for
            saving.writer = await client.store(order.prompt, rank=self._rank, start_chunk=first)
            self._pin(client)
        for chunk in saving.writer:
            numbers = self._blocks(order, chunk.index)
            if numbers is not None:
                earlier = len(saving.copies)
                for group, (blocks, room) in enumerate(zip(numbers, chunk.tensors(), strict=True)):
                    if room is not None:
                        saving.copies.append(self._device.save(group, blocks, room, after))
                saving.chunks.append((chunk, saving.copies[earlier:]))

    def _pin(self, client: Chunks) -> None:
        if self._device.pin_bytes and not self._pinned:
            self._pinned = True
            window = client.window(self._device.pin_bytes)
            if window is not None:
                self._device.pin(window, writable=True)

    def _commit(self, saving: Saving) -> None:
        """Commit what is copied, in order."""
        while saving.chunks and all(copy.done.done() for copy in saving.chunks[0][1]):
            chunk, copies = saving.chunks.popleft()
            if not self._failed(copies):
                chunk.commit()

    async def _land(self, order: SaveOrder, saving: Saving) -> None:
        """Follow a save to its end, and report that: nothing of it comes to the server any more."""
        if saving.writer is not None:
            try:
                with saving.writer:
                    while saving.chunks:
                        await self._pass(copy.done for copy in saving.chunks[0][1])
                        self._commit(saving)
            except AsyncCacheError as error:
                self._complaint.log(error)
            await saving.writer.settled()
        report_end(order)

    def _blocks(self, order: SaveOrder, index: int) -> list[list[int]] | None:
        """The blocks of a chunk, by group, none for those that the rank lacks.

        None where it is not whole: a window has passed, a state was not kept, or a table ends before.
        """
        begin, end = index * self._chunk_tokens, (index + 1) * self._chunk_tokens
        numbers: list[list[int]] = []
        for pages, held in zip(self._geometry.pages, self._held, strict=True):
            blocks = pages.blocks(order.tables, begin, end) if held else []
            if held and (NO_BLOCK in blocks or not pages.covers(order.tables, end)):
                return None
            numbers.append(blocks)
        return numbers

    def _first_whole(self, order: SaveOrder) -> int:
        chunks = range(order.start_chunk, len(order.prompt))
        return next((index for index in chunks if self._blocks(order, index) is not None), len(order.prompt))


def report_end(order: SaveOrder) -> None:
    """Tell the scheduler that a save has ended, if it can be told."""
    if order.report is not None:
        try:
            order.report.send()
        except OSError as error:
            log.debug("the scheduler does not hear that a save has ended: %s", error)


async def _passed(fence: Fence) -> None:
    """Wait until a fence is resolved, in whatever thread, and however."""
    if not fence.done():
        loop = asyncio.get_running_loop()
        resolved = asyncio.Event()

        def tell(_: Fence) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(resolved.set)

        fence.add_done_callback(tell)
        await resolved.wait()
