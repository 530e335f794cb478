"""A chunk that waits to be stored in a backend, and a batch of them that is being stored: their records."""

import asyncio
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct

from async_cache.l1.entry import Entry

if TYPE_CHECKING:
    from async_cache.write.queue import WriteQueue

_PREFIX_CHUNKS = 2048  # in front of a batch that are kept, in one step of the loop: two or three milliseconds


class Pending(Struct, eq=False, gc=False):
    """A chunk that some backend has not stored yet. How many queues it is in is its entry's `unwritten`."""

    entry: Entry
    epoch: int  # in which it began to wait, see `flushes`
    hashes: Sequence[bytes]  # of a prompt that it is a chunk of
    number: int  # which of them it is
    stored: int = 0  # the objects that some backend has stored since then, by bit
    dropped: bool = False  # some backend did not take it
    later: "tuple[WriteQueue, ...]" = ()  # those that have a turn when no queue has it any more


class Tried(NamedTuple):
    """How often a chunk was in a call that did not store it, and how many of these raised for all of their chunks."""

    attempts: int = 0
    raised: int = 0


NEW = Tried()
"""Of a chunk that was in no call."""


class Outcome(Enum):
    """How a chunk left a queue."""

    STORED = "stored"
    DROPPED = "dropped"  # the backend did not take it, or L1 needed its room
    WITHDRAWN = "withdrawn"  # it was deleted, or more of it waits for its turn
    REFUSED = "refused"  # the backend could never take it


class Write:
    """A batch that is being stored: RUNNING -> ENDED. It holds its chunks until then, also where it was given up."""

    __slots__ = ("batch", "calls", "ended", "size_bytes")

    def __init__(self, batch: list[Pending]):
        self.batch = batch
        self.calls = 0  # that have begun
        self.size_bytes = sum(pending.entry.room_bytes for pending in batch)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return f"<Write of {len(self.batch)} chunks, {'ended' if self.ended.done() else 'running'}>"


def prefixes_of(batch: Sequence[Pending]) -> list[bytes]:
    """The chunks of a batch and those next in front of them, each once, behind those that it builds on.

    None where nothing lies in front: of what is stored in one go, a backend keeps the order itself. So many that the
    loop is not held for long, whatever the prompt's length: the head of a longer one is in use again when it is looked
    up, as a whole.
    """
    stored = {pending.entry.chunk_hash for pending in batch}
    if all(not pending.number or pending.hashes[pending.number - 1] in stored for pending in batch):
        return []
    seen: set[bytes] = set()
    prefixes: list[list[bytes]] = []
    for pending in batch:
        hashes, end = pending.hashes, pending.number + 1
        begin = end
        room = max(1, _PREFIX_CHUNKS - len(seen))  # for itself in any case
        while begin and end - begin < room and hashes[begin - 1] not in seen:
            begin -= 1
        seen.update(hashes[begin:end])
        prefixes.append(list(hashes[begin:end]))
    return [chunk_hash for prefix in prefixes for chunk_hash in prefix]
