"""The records of L1: what is resident, and what is reserved.

Both are msgspec structs outside the garbage collector: there may be millions, and a collection must not visit them.
"""

from collections.abc import Iterable
from enum import Enum
from typing import Any

from msgspec import Struct

from async_cache.observe import ObservedChunk
from async_cache.prompt.layout import ModelLayout
from async_cache.prompt.objects import PAGE_BYTES
from async_cache.prompt.origin import Origin, shared_origin

_PAGE_BITS = 32
_PAGE_MASK = (1 << _PAGE_BITS) - 1


def page_of(rank: int, offset: int) -> int:
    """The `pages` of an entry that has a block there for this rank, and no other."""
    return offset // PAGE_BYTES << rank * _PAGE_BITS


class Entry(Struct, gc=False, eq=False):
    """A chunk in L1: a block of memory for each rank that has one, and the objects that are published in them.

    It may be evicted while it has neither leases (of requests) nor pins (of I/O, or of retention). A detached entry
    cannot be found any more, and leaves memory with its last lease or pin.
    """

    chunk_hash: bytes
    layout: ModelLayout
    owner: str = ""  # the salt of its prompts: whose share of the memory it takes
    present: int = 0  # published objects, by bit
    ranks: int = 0  # ranks with a block, by bit
    pages: int = 0  # by rank, the first page of its block, in 32 bits each: one int whatever the world size
    room_bytes: int = 0  # memory that its blocks take
    leases: int = 0
    pins: int = 0
    filling: int = 0  # those of the pins that belong to loads into what is unpublished of its blocks
    deferred: "tuple[tuple[Reservation, int], ...]" = ()  # commits, each of some objects, that wait for those
    unwritten: int = 0  # backends that have not stored it yet
    dropped: bool = False  # some backend did not store it, and is not asked again until it is stored anew
    detached: bool = False
    retained: bool = False  # somebody has asked to keep it, and got a pin for that
    parent: bytes | None = None  # the chunk before it in a prompt, as far as that is known
    child: bytes | None = None  # one that was built on it
    forked: bool = False  # another one was, too
    adapter: str = ""  # that of its prompts
    node: Any = None  # what the eviction policy knows of it
    older: "Entry | None" = None  # for the eviction policy, too
    newer: "Entry | None" = None

    def offset(self, rank: int) -> int:
        """Where the block of a rank begins in the arena, in bytes."""
        return (self.pages >> rank * _PAGE_BITS & _PAGE_MASK) * PAGE_BYTES

    def place(self, rank: int, offset: int) -> None:
        """Give the rank a block, or another one than it had."""
        if self.ranks >> rank & 1:
            self.pages &= ~(_PAGE_MASK << rank * _PAGE_BITS)
        else:
            self.ranks |= 1 << rank
            self.room_bytes += self.layout.objects.room_bytes[rank]
        self.pages |= page_of(rank, offset)

    @property
    def origin(self) -> Origin:
        """What it is of."""
        return shared_origin(self.owner, self.layout.model, self.layout.revision, self.adapter)

    @property
    def lacks(self) -> int:
        """The objects of the chunk that are not published, by bit."""
        return self.layout.objects.full_mask & ~self.present

    def built_on_by(self, child: bytes) -> None:
        """Know a chunk that builds on this one."""
        if self.child is None:
            self.child = child
        elif self.child != child:
            self.forked = True

    def observed(self) -> ObservedChunk:
        """What observers are told of it now."""
        tokens = self.layout.chunk_tokens
        return ObservedChunk(
            self.chunk_hash, self.owner, self.present, self.room_bytes, not self.lacks, tokens, self.parent
        )

    def blocks(self) -> list[tuple[int, int]]:
        """The (offset, bytes) of each block that the entry has."""
        if self.ranks == 1:
            return [(self.pages * PAGE_BYTES, self.room_bytes)]
        rooms = self.layout.objects.room_bytes
        return [(self.offset(rank), rooms[rank]) for rank in range(self.ranks.bit_length()) if self.ranks >> rank & 1]


def offsets_of(entries: Iterable[Entry | None], rank: int) -> list[int | None]:
    """Where the block of a rank begins in each chunk, in bytes; None where it has none."""
    shift = rank * _PAGE_BITS
    return [
        (entry.pages >> shift & _PAGE_MASK) * PAGE_BYTES if entry is not None and entry.ranks >> rank & 1 else None
        for entry in entries
    ]


class ReservationState(Enum):
    """RESERVED -> DONE by commit or discard; RESERVED -> QUARANTINED -> DONE when I/O or a user does not let go."""

    RESERVED = "reserved"
    QUARANTINED = "quarantined"
    DONE = "done"


class Reservation(Struct, gc=False, eq=False):
    """Private room for one rank of a chunk: a block of its own, or the unpublished part of an entry's block."""

    chunk_hash: bytes
    layout: ModelLayout
    rank: int
    offset: int
    size_bytes: int  # of the room it takes beside what is resident
    owner: str = ""  # as that of an entry
    within: Entry | None = None
    state: ReservationState = ReservationState.RESERVED
    adapter: str = ""
