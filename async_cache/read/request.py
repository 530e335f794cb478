"""A request: what it asks for, what it was promised, and what it holds."""

import asyncio
from collections.abc import Sequence
from enum import Enum

from async_cache.aio.promise import Promise
from async_cache.handles.prefetch import Prefetch
from async_cache.l1.entry import Entry, Reservation
from async_cache.l1.store import L1Store
from async_cache.prompt.layout import Prompt
from async_cache.read.search import Search
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


LOOKING_UP, LOADING, LOADED, IN_USE, OVER = RequestState  # each access by the enum is a call, in Python 3.11


class Request:
    """The record of a request. Chunks are numbered from `start_chunk` on, and objects are masks of bits."""

    __slots__ = (
        "__weakref__",
        "_hashes",
        "began",
        "claimed",
        "deadline",
        "entries",
        "from_l2",
        "hits",
        "inside",
        "loads",
        "local_mask",
        "needed",
        "prefetch",
        "promised_at",
        "prompt",
        "ranks",
        "readers",
        "reasons",
        "request_id",
        "result",
        "rooms",
        "search",
        "start_chunk",
        "state",
        "task",
        "traceparent",
    )  # fmt: skip

    prefetch: Prefetch  # what its caller has of it

    def __init__(self, request_id: str, prompt: Prompt, start_chunk: int, ranks: Sequence[int], began: float):
        # What it asks for.
        self.request_id = request_id
        self.prompt = prompt
        self.start_chunk = start_chunk
        self.ranks = ranks
        self.local_mask = prompt.layout.objects.mask_of_ranks(ranks)  # the objects to load here
        self._hashes: list[bytes] = []
        # Where it is.
        self.began = self.promised_at = began  # by the precise clock
        self.traceparent: str | None = None  # the span that it belongs to, in the form of W3C
        self.state = LOOKING_UP
        self.task: asyncio.Task[None] | None = None  # while it waits for L2
        self.deadline: asyncio.TimerHandle | None = None
        # What it was promised.
        self.hits: Promise[LookupHits] = Promise()
        self.result: Promise[LoadResult] = Promise()
        self.needed: Sequence[int] = ()  # by chunk, the objects promised, and once loaded, those that can be read
        self.from_l2: Sequence[int] = ()  # chunks that were promised from L2, ascending
        self.reasons: dict[int, Shortfall] = {}  # by chunk, why its load fell short
        # What it holds.
        self.entries: list[Entry | None] = []  # leased, by chunk
        self.search: Search | None = None  # what was found in L2, pinned there, until the loader has it
        self.loads: set[int] = set()  # chunks of which it has a share in a load
        self.rooms: Sequence[tuple[int, Reservation]] = ()  # reserved, by chunk, until the loader has them
        # Who uses it.
        self.claimed = False
        self.readers: set[tuple[int, int]] = set()  # (rank, reader) of all that have entered
        self.inside = 0  # those of them that have not left

    @property
    def length(self) -> int:
        """The chunks promised, and once loaded, those that can be read."""
        return len(self.needed)

    @property
    def hashes(self) -> list[bytes]:
        """The hashes of this request's chunks, from `start_chunk` on."""
        if not self._hashes:
            hashes = self.prompt.chunk_hashes
            self._hashes = hashes[self.start_chunk :] if self.start_chunk else hashes
        return self._hashes

    def before(self, number: int) -> bytes | None:
        """The hash of the chunk before one of this request's, if there is one."""
        at = self.start_chunk + number
        return self.prompt.chunk_hashes[at - 1] if at else None

    @property
    def pending(self) -> bool:
        """Whether its load is not done yet."""
        return self.state is LOADING or self.state is LOOKING_UP

    def release(self, l1: L1Store, needed: Sequence[int] = ()) -> None:
        """Release the leases of chunks of which nothing is needed: the tail first, so that it is evicted first."""
        entries, begin = self.entries, len(needed)
        if any(entries):
            unneeded = [entry for entry in reversed(entries[begin:]) if entry is not None]
            entries[begin:] = [None] * (len(entries) - begin)
            if 0 in needed:
                outside = [n for n, need in enumerate(needed) if not need and entries[n] is not None]
                unneeded += filter(None, [entries[n] for n in reversed(outside)])
                for number in outside:
                    entries[number] = None
            if unneeded:
                l1.release_soon(unneeded)

    def __repr__(self) -> str:
        return f"<Request {self.request_id!r}, {self.state.value}, {self.length} chunks>"
