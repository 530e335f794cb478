"""A request: what it asks for, what it was promised, and what it holds; and `Prefetch`, its caller's view of it."""

import asyncio
from collections.abc import Callable, Sequence
from enum import Enum

from async_cache.l1.entry import Entry
from async_cache.layout import Prompt
from async_cache.loads import Arrival
from async_cache.promise import Promise
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
        self.local_mask = prompt.layout.mask_of_ranks(ranks)  # the objects to load here
        self.began = began
        self.arrived = arrived
        self.state = RequestState.LOOKING_UP
        self.hits: Promise[LookupHits] = Promise()
        self.result: Promise[LoadResult] = Promise()
        self.prefetch = Prefetch(self, cancel)
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


class Prefetch:
    """One prefetch: a lookup and a load, each with its future."""

    __slots__ = ("_cancel", "_request")

    def __init__(self, request: Request, cancel: Callable[[Request], None]):
        self._request = request
        self._cancel = cancel

    @property
    def request_id(self) -> str:
        """What the other calls know it by."""
        return self._request.request_id

    @property
    def lookup_done(self) -> "asyncio.Future[LookupHits]":
        """How much is cached. Each access gives a future of the caller's own."""
        return self._request.hits.future()

    @property
    def load_done(self) -> "asyncio.Future[LoadResult]":
        """That it is in memory. Each access gives a future of the caller's own."""
        return self._request.result.future()

    def cancel(self) -> None:
        """Stop looking up and loading; both futures resolve. Does nothing once it has loaded."""
        self._cancel(self._request)

    def __repr__(self) -> str:
        return f"<Prefetch {self.request_id!r}, {self._request.state.value}>"
