"""A request: what it asks for, what it was promised, and what it holds."""

import asyncio
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

from async_cache.aio.promise import Promise
from async_cache.handles.prefetch import Prefetch
from async_cache.l1.entry import Entry, Reservation
from async_cache.l1.store import L1Store
from async_cache.prompt import coverage
from async_cache.prompt.layout import Prompt
from async_cache.prompt.parts import Parts, Run
from async_cache.read.search import Search
from async_cache.values import LoadResult, LookupHits, Shortfall

if TYPE_CHECKING:
    from async_cache.read.streams import Stream


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
    """The record of a request. Chunks are numbered from `start_chunk` on, and objects are masks of bits.

    It asks for a prompt, or for several: then their chunks are numbered one behind the other, and each prompt is a run
    of these numbers (see `prompt.parts`). What is said by prompt, as `lengths` is, has an item for each of them.
    """

    __slots__ = (
        "__weakref__",
        "_hashes",
        "_runs",
        "began",
        "claimed",
        "deadline",
        "due",
        "entries",
        "from_l2",
        "hits",
        "inside",
        "kept",
        "lengths",
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
        "streams",
        "task",
        "traceparent",
        "waits_until",
    )  # fmt: skip

    prefetch: Prefetch  # what its caller has of it

    def __init__(
        self,
        request_id: str,
        prompt: Prompt | Parts,
        start_chunk: int,
        ranks: Sequence[int],
        began: float,
        loop: asyncio.AbstractEventLoop,
    ):
        # What it asks for.
        self.request_id = request_id
        self.prompt = prompt
        self.start_chunk = start_chunk
        self.ranks = ranks
        self.local_mask = prompt.layout.objects.mask_of_ranks(ranks)  # the objects to load here
        self._hashes: Sequence[bytes] = ()
        self._runs: Sequence[Run] = ()
        # Where it is.
        self.began = self.promised_at = began  # by the precise clock
        self.traceparent: str | None = None  # the span that it belongs to, in the form of W3C
        self.waits_until: float | None = None  # for chunks that writers have announced, by the loop's clock
        self.state = LOOKING_UP
        self.task: asyncio.Task[None] | None = None  # while it waits for L2
        self.deadline: asyncio.TimerHandle | None = None
        self.due: float | None = None  # when that is; uvloop's timers do not tell it where it is over
        # What it was promised.
        self.hits: Promise[LookupHits] = Promise(loop)
        self.result: Promise[LoadResult] = Promise(loop)
        self.lengths: Sequence[int] = [0] * len(prompt.parts)  # by prompt, the chunks promised, and once loaded, there
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
        self.streams: list[Stream] = []  # those of them to whom chunks are given as they come
        self.kept: list[Entry] = []  # leased for them, though the request has no use for it any more

    @property
    def length(self) -> int:
        """The chunks promised, and once loaded, those that can be read."""
        return sum(self.lengths)

    @property
    def runs(self) -> Sequence[Run]:
        """The chunks of each of its prompts, by their numbers."""
        if not self._runs:
            prompt, start_chunk = self.prompt, self.start_chunk
            self._runs = prompt.runs if not start_chunk else (range(len(prompt) - start_chunk),)
        return self._runs

    @property
    def hashes(self) -> Sequence[bytes]:
        """The hashes of this request's chunks, from `start_chunk` on."""
        if not self._hashes:
            hashes = self.prompt.chunk_hashes
            self._hashes = hashes[self.start_chunk :] if self.start_chunk else hashes
        return self._hashes

    def promise(self, lengths: Sequence[int], needed: Sequence[int]) -> None:
        """Promise so many chunks of each prompt, for which these objects are needed."""
        self.lengths, self.needed = lengths, needed

    def promise_all(self) -> None:
        """Promise all that it asks for."""
        layout, runs = self.prompt.layout, self.runs
        lengths = list(map(len, runs))
        if layout.objects.windows:
            self.promise(lengths, coverage.needed_of(layout, runs, lengths))
        else:
            self.promise(lengths, [layout.objects.prefix_mask] * len(self.hashes))

    def readable(self) -> list[Entry | None]:
        """What can be read, in the order of the prompts: a chunk that several have in common stands in each of them."""
        if len(self.lengths) == 1:
            return self.entries[: self.lengths[0]]
        return list(map(self.entries.__getitem__, coverage.numbers_of(self.runs, self.lengths)))

    def objects(self) -> Sequence[int]:
        """The objects that can be read of each of them."""
        if len(self.lengths) == 1:
            return self.needed
        return list(map(self.needed.__getitem__, coverage.numbers_of(self.runs, self.lengths)))

    def before(self, number: int) -> bytes | None:
        """The hash of the chunk before one of this request's, if there is one."""
        return self.prompt.before(self.start_chunk + number)

    @property
    def pending(self) -> bool:
        """Whether its load is not done yet."""
        return self.state is LOADING or self.state is LOOKING_UP

    def release(self, l1: L1Store, needed: Sequence[int] = ()) -> None:
        """Release the leases of chunks of which nothing is needed: the tail first, so that it is evicted first."""
        entries, begin = self.entries, len(needed)
        if self.streams:
            self._keep(needed)
        if any(entries):
            unneeded: list[Entry] = list(filter(None, reversed(entries[begin:])))
            entries[begin:] = [None] * (len(entries) - begin)
            if 0 in needed:
                outside = [n for n, need in enumerate(needed) if not need and entries[n] is not None]
                unneeded += filter(None, [entries[n] for n in reversed(outside)])
                for number in outside:
                    entries[number] = None
            if unneeded:
                l1.release_soon(unneeded)

    def _keep(self, needed: Sequence[int]) -> None:
        """Keep what streams were given, until they have left."""
        for number in range(min(max(stream.given for stream in self.streams), len(self.entries))):
            entry = self.entries[number]
            if entry is not None and not (number < len(needed) and needed[number]):
                self.kept.append(entry)
                self.entries[number] = None

    def wake_streams(self) -> None:
        """Have the streams look for what there is by now."""
        for stream in self.streams:
            stream.wake()

    def leave(self, stream: "Stream", l1: L1Store) -> None:
        """Give nothing more to a stream; what was kept for those that have left is released with the last of them."""
        self.streams.remove(stream)
        if self.kept and not self.streams:
            kept, self.kept = self.kept, []
            l1.release_soon(kept[::-1])

    def __repr__(self) -> str:
        return f"<Request {self.request_id!r}, {self.state.value}, {self.length} chunks>"
