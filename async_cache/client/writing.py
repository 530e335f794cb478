"""A writer of chunks into the client's segment: the server copies what is committed."""

import asyncio
import ctypes
import logging
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from async_cache.client.link import Link
from async_cache.client.memory import Block
from async_cache.errors import AsyncCacheError, ConnectionLostError, WriterClosedError
from async_cache.handles.scoped import Scoped
from async_cache.memory import tensors
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.protocol import messages
from async_cache.protocol.frames import DATA_BYTES
from async_cache.values import Shortfall

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Post = Callable[..., object]
"""Calls what is given to it in the client's loop, now or soon."""


def call_now(call: Callable[..., object], *args: Any) -> None:
    """The `Post` of those who are in the client's loop."""
    call(*args)


class RemoteChunk:
    """One chunk to fill: `index` in the prompt, `offset` in the client's segment. Private until it is `committed`."""

    __slots__ = ("_block", "_layout", "_rank", "_views", "_writer", "committed", "index", "offset", "position")

    def __init__(
        self,
        writer: "RemoteWriter",
        index: int,
        position: int,
        offset: int | None,
        block: Block,
        layout: ModelLayout,
        rank: int,
    ):
        self.index = index
        self.position = position
        self.offset = offset
        self.committed = False
        self._writer = writer
        self._block: Block | None = block
        self._layout, self._rank = layout, rank
        self._views: tuple[memoryview | None, ...] = ()

    @property
    def views(self) -> tuple[memoryview | None, ...]:
        """By group, the bytes to fill; None where the rank lacks the group."""
        if not self._views:
            self._views = self._new_views()
        return self._views

    def _new_views(self) -> tuple[memoryview | None, ...]:
        whole = memoryview(self._open_block()).cast("B")
        spans = self._layout.objects.spans[self._rank]
        return tuple(whole[span[0] : span[1]] if span is not None else None for span in spans)

    def tensors(self) -> "tuple[torch.Tensor | None, ...]":
        """By group, a tensor over the bytes to fill, without a copy: it keeps them, also when the writer leaves."""
        return tensors.over(self._new_views(), self._layout.groups)

    def commit(self) -> None:
        """Publish the chunk as it is now; it must not be written to any more. Raises WriterClosedError."""
        if not self.committed:
            self._writer._commit(self, self._open_block())
            self.committed = True

    def _open_block(self) -> Block:
        if self._block is None:
            raise WriterClosedError("the writer is closed")
        return self._block

    def _part(self) -> None:
        """A view used after this is an error, where nobody has built on it."""
        self._block = None
        views, self._views = self._views, ()
        for view in views:
            if view is not None:
                try:
                    view.release()
                except BufferError:
                    continue


class RemoteWriter(Scoped[RemoteChunk]):
    """As `Writer`: OPEN until closed by its owner, by the server, or with the connection.

    What the server says of a commit comes later: one that it could not carry out is logged.
    """

    def __init__(self, ready: Callable[[], Awaitable[Link]], post: Post, prompt: Prompt, rank: int, start_chunk: int):
        self.shortfall: Shortfall | None = None
        self._ready = ready
        self._post = post
        self._prompt, self._rank, self._start_chunk = prompt, rank, start_chunk
        self._link: Link | None = None
        self._entering = asyncio.Lock()
        self._number = 0
        self._is_open = False
        self._commits: set[asyncio.Future[Any]] = set()
        self.on_exit: Callable[[], object] = lambda: None
        """Called where it is left by `with`: a blocking client waits there for what was committed."""

    def close(self) -> None:
        """Discard what was not committed. May be called more than once."""
        if self._is_open:
            self._is_open = False
            for chunk in self._chunks:
                chunk._part()
            self._post(self._send_close)

    def closed_from_outside(self) -> None:
        """By the server, or with the connection. Whoever has a view of a chunk keeps its memory."""
        self._is_open = False

    async def _enter(self) -> None:
        async with self._entering:
            if self._link is None:
                await self._reserve(await self._ready())

    async def _reserve(self, link: Link) -> None:
        wire = await link.hashed(self._prompt)
        self._number = number = link.number()
        message = messages.ReserveStore(number, wire, self._rank, self._start_chunk)
        reserved = await link.ask(messages.StoreReserved, message)
        self._link = link
        self.shortfall = reserved.shortfall
        blocks = self._blocks(link, len(reserved.chunks))
        self._chunks = tuple(
            RemoteChunk(self, index, position, offset, block, self._prompt.layout, self._rank)
            for position, (index, (offset, block)) in enumerate(zip(reserved.chunks, blocks, strict=True))
        )
        if link.connection.is_open:  # else it was lost with the answer
            self._is_open = True
            link.stores[number] = self

    def _blocks(self, link: Link, count: int) -> list[tuple[int | None, Block]]:
        """Room to write to: in the segment, and where there is none, in this process's own memory."""
        layout, rank = self._prompt.layout, self._rank
        blocks: list[tuple[int | None, Block]] = []
        if link.segment is not None and count:
            blocks += link.segment.blocks(layout.objects.room_bytes[rank], count)
        return blocks + [(None, (ctypes.c_ubyte * layout.block_bytes[rank])()) for _ in range(count - len(blocks))]

    def _leave(self) -> None:
        self.close()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, and wait for the server: what was committed can then be found over every connection."""
        self.close()
        await self.settled()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self.on_exit()

    async def settled(self) -> None:
        """Return when the server has answered all commits."""
        if self._commits:
            await asyncio.wait(self._commits)

    def _commit(self, chunk: RemoteChunk, block: Block) -> None:
        if not self._is_open:
            raise WriterClosedError("the writer is closed")
        self._post(self._send_commit, chunk, block)

    def _send_commit(self, chunk: RemoteChunk, block: Block) -> None:
        link = self._link
        assert link is not None
        size_bytes = self._prompt.layout.block_bytes[self._rank]
        if chunk.offset is None:
            bytes_ = memoryview(block).cast("B")
            for begin in range(0, size_bytes, DATA_BYTES):
                piece = bytes_[begin : min(begin + DATA_BYTES, size_bytes)]
                link.tell(messages.StoreData(self._number, chunk.position, begin, piece))
        message = messages.CommitStore(link.number(), self._number, chunk.position, chunk.offset)
        try:
            answer = link.send(message)
        except AsyncCacheError as error:  # the connection is lost, or being closed
            log.warning("a chunk could not be committed: %s", error)
            return
        link.commits.add(answer)
        self._commits.add(answer)
        answer.add_done_callback(lambda answer: self._committed(link, answer, block))

    def _committed(self, link: Link, answer: "asyncio.Future[Any]", block: Block) -> None:
        """The server has copied the block: it was kept until now."""
        link.commits.discard(answer)
        self._commits.discard(answer)
        error = None if answer.cancelled() else answer.exception()
        if error is not None and not isinstance(error, ConnectionLostError | WriterClosedError):
            log.warning("a chunk could not be committed: %s", error)

    def _send_close(self) -> None:
        assert self._link is not None
        self._link.stores.pop(self._number, None)
        self._link.tell(messages.CloseStore(self._link.number(), self._number))
