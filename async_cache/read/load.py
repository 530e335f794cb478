"""The record of a load: all that is on its way from L2 to L1 for one chunk."""

from enum import Enum
from typing import TYPE_CHECKING

from msgspec import Struct

from async_cache.l1.entry import Reservation
from async_cache.prompt.layout import ModelLayout
from async_cache.prompt.origin import Origin, shared_origin
from async_cache.read.request import Request
from async_cache.values import Shortfall

if TYPE_CHECKING:
    from async_cache.read.batches import Batch


class LoadState(Enum):
    """WAITING while any object is, then SETTLED.

    WAITING -> DROPPED when the last share is released, or the chunk is deleted; WAITING -> REPLACED by another load of
    the same chunk, where a call that should have ended may still write to its room.
    """

    WAITING = "waiting"
    SETTLED = "settled"
    DROPPED = "dropped"
    REPLACED = "replaced"


class ChunkLoad(Struct, eq=False):
    """All that is on its way for one chunk, a single flight: the requests that want it hold shares.

    `wanted`, `waiting` and `loaded` are objects, by bit. Its room is `abandoned` when the load is dropped, or when a
    call that should have ended may still write there; it is then freed with the end of the last call of its batches.
    """

    chunk_hash: bytes
    layout: ModelLayout
    reservations: list[Reservation]
    shares: dict[Request, int]  # the request's number of the chunk
    room_bytes: int
    parent: bytes | None = None  # the chunk before it, for its entry
    wanted: int = 0
    waiting: int = 0
    loaded: int = 0
    failure: Shortfall | None = None
    batches: "tuple[Batch, ...]" = ()
    abandoned: bool = False
    state: LoadState = LoadState.WAITING

    @property
    def owner(self) -> str:
        """Whose chunk it is."""
        return self.reservations[0].owner if self.reservations else ""

    @property
    def origin(self) -> Origin:
        """What it is of."""
        adapter = self.reservations[0].adapter if self.reservations else ""
        return shared_origin(self.owner, self.layout.model, self.layout.revision, adapter)

    @property
    def touched(self) -> bool:
        """Whether a call may write to its room."""
        return any(self in batch.touches for batch in self.batches)
