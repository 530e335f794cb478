"""Writers through a server: room that is reserved there, blocks that are filled here, commits in between."""

import asyncio
import ctypes
from collections.abc import Awaitable, Callable
from typing import Any

from async_cache.aio.worker import Worker
from async_cache.client.calls import Commit, StoreCall
from async_cache.client.link import Link
from async_cache.client.memory import Block, Segment
from async_cache.errors import WriterClosedError
from async_cache.handles.writer import Life, Opened, WriteChunk, Writer
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.protocol import messages
from async_cache.protocol.frames import DATA_BYTES

Blocks = tuple[tuple[int | None, Block], ...]
"""By position among a writer's chunks: where the block begins in the segment, if it is there, and the block."""

Post = Callable[..., object]
"""Calls what is given to it in the client's loop, now or soon; may be called from any thread."""


def call_now(call: Callable[..., object], *args: Any) -> None:
    """The `Post` of callers that are in the client's loop."""
    call(*args)


async def open_chunks(
    ready: Callable[[], Awaitable[Link]],
    hashing: Worker,
    post: Post,
    prompt: Prompt,
    rank: int,
    start_chunk: int,
    writer: Writer,
) -> Opened:
    """Reserve room on the server for the chunks that it lacks, and make blocks to fill.

    From then on the writer is expired when the server closes it, or the connection is lost.
    """
    link = await ready()
    wire = await link.pack_hashed(prompt, hashing)
    number = link.next_number()
    call = StoreCall(writer)
    reserved = await link.ask(messages.StoreReserved, messages.ReserveStore(number, wire, rank, start_chunk), call)
    try:
        blocks = _make_blocks(link.segment, prompt.layout, rank, len(reserved.chunks))
    except BaseException:
        call.close()
        link.undo(number)
        raise
    store = Store(link, post, number, call, blocks, prompt.layout.block_bytes[rank])
    life = Life()
    chunks = tuple(
        WriteChunk(index, offset, prompt.layout, rank, position, life)
        for position, (index, (offset, _)) in enumerate(zip(reserved.chunks, blocks, strict=True))
    )
    return Opened(chunks, life, reserved.shortfall, store.lend, store.commit, store.close, store.settled)


def _make_blocks(segment: Segment | None, layout: ModelLayout, rank: int, count: int) -> Blocks:
    """Room to write to: in the segment, and where there is none left, in this process's own memory."""
    blocks: list[tuple[int | None, Block]] = []
    if segment is not None and count:
        blocks += segment.blocks(layout.objects.room_bytes[rank], count)
    own = ctypes.c_ubyte * layout.block_bytes[rank]
    return (*blocks, *((None, own()) for _ in range(count - len(blocks))))


class Store:
    """What the handle of an open writer acts on. `lend`, `commit` and `close` may be called from any thread.

    A block lives as long as the store is open, its commit is not answered, or somebody has a view of it.
    """

    def __init__(self, link: Link, post: Post, number: int, call: StoreCall, blocks: Blocks, block_bytes: int):
        self._link = link
        self._post = post
        self._number = number
        self._call = call
        self._blocks = blocks
        self._block_bytes = block_bytes
        self._commits: set[asyncio.Future[None]] = set()

    def lend(self, position: int) -> Block:
        """The block of the chunk at a position."""
        return self._at(position)[1]

    def commit(self, position: int) -> None:
        """Have the server publish the chunk at a position, as it is now."""
        offset, block = self._at(position)
        self._post(self._send_commit, position, offset, block)

    def close(self, lent: list[tuple[int, Block]]) -> None:
        """Have the server discard what was not committed. Blocks that nobody sees are free at once."""
        self._blocks = ()
        self._post(self._send_close)

    async def settled(self) -> None:
        """Return when the server has answered all commits: what was committed can be found over every connection."""
        if self._commits:
            await asyncio.wait(self._commits)

    def _at(self, position: int) -> tuple[int | None, Block]:
        blocks = self._blocks  # once: another thread may close it
        if not blocks:
            raise WriterClosedError("the writer is closed")
        return blocks[position]

    def _send_commit(self, position: int, offset: int | None, block: Block) -> None:
        link = self._link
        if offset is None:
            data = memoryview(block).cast("B")
            for begin in range(0, self._block_bytes, DATA_BYTES):
                piece = data[begin : min(begin + DATA_BYTES, self._block_bytes)]
                link.send(messages.StoreData(self._number, position, begin, piece))
        message = messages.CommitStore(link.next_number(), self._number, position, offset)
        link.begin(message, Commit(block, self._commits))

    def _send_close(self) -> None:
        if self._call.close() is not None:  # else the server knows already
            self._link.calls.pop(self._number, None)
            self._link.send(messages.CloseStore(self._link.next_number(), self._number))
