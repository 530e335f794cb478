"""A request: what it asks for, what it was promised, and what it holds."""

import asyncio
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial

from async_cache.aio.promise import Promise
from async_cache.handles.prefetch import Prefetch
from async_cache.l1.entry import Entry
from async_cache.prompt.layout import Prompt
from async_cache.read.loads import Arrival
from async_cache.values import LoadResult, LookupHits, Shortfall


class RequestState(Enum):
    """LOOKING_UP -> LOADING -> LOADED -> IN_USE (claimed, or read from) -> OVER; each may go to OVER at once.

    LOOKING_UP and LOADING go to LOADED, with nothing, when the request is cancelled.
    """

    LOOKING_UP = "looking up"
    LOADING = "loading"
    LOADED = "loaded"
    IN_USE = "in use"
    OVER = "over"


class Request:
    """The record of a request. Chunks are numbered from `start_chunk` on."""

    __slots__ = (
        "arrived", "began", "claimed", "deadline", "entries", "from_l2", "hits", "inside", "length", "loads",
        "local_mask", "needed", "prefetch", "prompt", "ranks", "readers", "reasons", "request_id", "result",
        "start_chunk", "state", "task",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        start_chunk: int,
        ranks: Sequence[int],
        began: float,
        arrived: "Callable[[Request, Sequence[Arrival]], None]",
        cancel: "Callable[[Request], None]",
    ):
        self.request_id = request_id
        self.prompt = prompt
        self.start_chunk = start_chunk
        self.ranks = ranks
        self.local_mask = prompt.layout.objects.mask_of_ranks(ranks)  # the objects to load here
        self.began = began
        self.arrived = arrived
        self.state = RequestState.LOOKING_UP
        self.hits: Promise[LookupHits] = Promise()
        self.result: Promise[LoadResult] = Promise()
        self.prefetch = Prefetch(self, partial(cancel, self))
        self.task: asyncio.Task[None] | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self.entries: list[Entry | None] = []  # leased, by chunk
        self.loads: set[int] = set()  # chunks of which it has a share in a load
        self.from_l2: Sequence[int] = ()  # chunks that were promised from L2, ascending
        self.reasons: dict[int, Shortfall] = {}  # by chunk, why its load fell short
        self.length = 0  # chunks promised, and once loaded, readable
        self.needed: Sequence[int] = ()  # by chunk, the objects that can be read
        self.claimed = False
        self.readers: set[tuple[int, int]] = set()  # entered at some time
        self.inside = 0  # entered and not left

    @property
    def hashes(self) -> list[bytes]:
        """Of its chunks."""
        hashes = self.prompt.chunk_hashes
        return hashes[self.start_chunk :] if self.start_chunk else hashes

    def loads_settled(self, arrivals: Sequence[Arrival]) -> None:
        """Chunks have arrived, or not."""
        self.arrived(self, arrivals)
