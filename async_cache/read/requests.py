"""Who knows a request: ids, claims and readers, and how requests end."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count

from async_cache.aio.slices import InTurns
from async_cache.aio.sweeper import Sweeper
from async_cache.config import CacheConfig
from async_cache.errors import (
    AsyncCacheError,
    CacheClosedError,
    ReadConflictError,
    RequestConflictError,
    UnknownRequestError,
)
from async_cache.handles.lease import Entered, Memory
from async_cache.l1.entry import offsets_of
from async_cache.l1.store import L1Store
from async_cache.observe import Observers, notify
from async_cache.prompt.layout import Prompt, check_index
from async_cache.prompt.parts import Parts
from async_cache.read.request import IN_USE, LOADED, OVER, Request
from async_cache.values import LoadResult, LookupHits, Shortfall

_ENTERED_AT_ONCE = 4096  # chunks, in a few milliseconds; then the loop has its turn


class Requests:
    """All requests that are not over, by their ids.

    `give_up` resolves what is pending of a request, with nothing, and lets go of its loads.
    """

    def __init__(
        self,
        l1: L1Store,
        sweeper: Sweeper,
        observers: Observers,
        config: CacheConfig,
        give_up: Callable[[Request, Shortfall], None],
    ):
        self._requests: dict[str, Request] = {}
        self._results = sweeper.expiry(config.result_ttl_seconds, self._end)  # loaded, and not claimed or read yet
        self._uses = sweeper.expiry(config.lease_ttl_seconds, self._end)  # claimed or read from
        self._l1 = l1
        self._observers = observers
        self._give_up = give_up
        self._ids = count(1)

    # Which there are.

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    @property
    def pending(self) -> int:
        """Requests that are not loaded yet."""
        return len(self._requests) - len(self._results) - len(self._uses)

    @property
    def unclaimed(self) -> int:
        """Requests that are loaded, and that nobody has claimed or read yet."""
        return len(self._results)

    @property
    def swept_results(self) -> int:
        """Requests that nobody claimed or read in time."""
        return self._results.swept

    @property
    def swept_leases(self) -> int:
        """Requests that were claimed or read, and not released in time."""
        return self._uses.swept

    def reconfigure(self, config: CacheConfig) -> None:
        """Let results and leases live for as long as the settings say now."""
        self._results.live_for(config.result_ttl_seconds)
        self._uses.live_for(config.lease_ttl_seconds)

    def find(self, request_id: str) -> Request | None:
        """The request of an id, or None."""
        return self._requests.get(request_id)

    def new_id(self, whose: str = "") -> str:
        """An id that no request has. `whose` stands before it, if somebody tells by that whose request it is."""
        while (request_id := f"{whose}prefetch-{next(self._ids)}") in self._requests:
            pass
        return request_id

    def same(self, request_id: str, prompt: Prompt | Parts, start_chunk: int, ranks: Sequence[int]) -> Request | None:
        """The request that has this id and asks for the same; None if the id is free.

        Raises RequestConflictError if it asks for something else, or its result was claimed.
        """
        known = self._requests.get(request_id)
        if known is None:
            return None
        same = known.start_chunk == start_chunk and known.ranks == ranks and known.prompt.same_as(prompt)
        if same and not known.claimed:
            return known
        raise RequestConflictError(f"request {request_id!r} is in use{'' if same else ' for another prompt'}")

    def add(self, request: Request) -> None:
        """Know a new request by its id."""
        self._requests[request.request_id] = request

    def loaded(self, request: Request) -> None:
        """Wait for the load of this request to be claimed or read, unless somebody reads it already."""
        if request.readers:
            self._use(request)
        else:
            self._results.add(request)

    # What a caller does with a request.

    async def query_lookup_hits(self, request_id: str) -> LookupHits:
        """The hits of a request, once they are known. Raises UnknownRequestError."""
        request = self._unclaimed(request_id)
        hits = await request.hits.wait()
        if hits.shortfall is Shortfall.CANCELLED and request.state is OVER:
            raise self._ended(request)
        return hits

    async def query_status(self, request_id: str) -> LoadResult:
        """The result of a request, once it is there, handed out to the first who asks. Raises UnknownRequestError."""
        request = self._unclaimed(request_id)
        result = await request.result.wait()
        if request.claimed or request.state is OVER:
            raise self._ended(request)
        request.claimed = True
        if result.chunks:
            self._use(request)
        else:
            self._end(request)
        return result

    def unclaim(self, request_id: str) -> None:
        """Undo a claim of which the claimant never came to know. A request that is over stays so."""
        request = self._requests.get(request_id)
        if request is not None:
            request.claimed = False

    async def enter(self, request_id: str, rank: int, reader: int) -> Entered:
        """Begin to read a request, once its load is done: its chunks, and how the read ends.

        Raises UnknownRequestError, ReadConflictError if this rank and reader have read it already, and ValueError for
        a rank or reader that it does not have.
        """
        request = self.readable(request_id, rank, reader)
        result = await request.result.wait()
        offsets: list[int | None] = []
        async for entries in InTurns(request.readable(), _ENTERED_AT_ONCE):
            if request.state is OVER:
                break
            offsets += offsets_of(entries, rank)
        return self._entered(request, rank, reader, result, offsets)

    def enter_nowait(self, request_id: str, rank: int, reader: int, most_objects: int) -> Entered | None:
        """Begin to read as `enter`, where the load is done, and brought the rank at most so many objects; else None."""
        request = self.readable(request_id, rank, reader)
        result = request.result.value
        if result is None or request.length * len(request.prompt.layout.groups) > most_objects:
            return None
        return self._entered(request, rank, reader, result, offsets_of(request.readable(), rank))

    def readable(self, request_id: str, rank: int, reader: int) -> Request:
        """The request of an id, which has this rank and reader. Raises UnknownRequestError and ValueError."""
        request = self._known(request_id)
        layout = request.prompt.layout
        check_index("rank", rank, layout.world_size)
        check_index("reader", reader, layout.readers_per_rank)
        if rank not in request.ranks:
            raise ValueError(f"rank {rank} is not among the ranks {request.ranks} of request {request_id!r}")
        return request

    def _entered(
        self, request: Request, rank: int, reader: int, result: LoadResult, offsets: Sequence[int | None]
    ) -> Entered:
        memory, leave, undo = self.admit(request, rank, reader)
        return Entered(result, request.prompt.layout, rank, offsets, request.objects(), memory, leave, undo)

    def admit(
        self, request: Request, rank: int, reader: int
    ) -> tuple[Memory, Callable[[], object], Callable[[], object]]:
        """Let a reader in: the memory to read from, and how it leaves, or undoes its entry.

        Raises UnknownRequestError where the request is over, and ReadConflictError.
        """
        if request.state is OVER:
            raise self._ended(request)
        if (rank, reader) in request.readers:
            raise ReadConflictError(f"rank {rank}, reader {reader} has read request {request.request_id!r} already")
        request.readers.add((rank, reader))
        request.inside += 1
        if not request.pending:
            self._use(request)
        memory = Memory(memoryview(self._l1.arena.view))  # of its own, which lives as long as the lease
        return memory, partial(self._leave, request), partial(self._undo_enter, request, rank, reader)

    def _undo_enter(self, request: Request, rank: int, reader: int) -> None:
        """Undo an entry of which the reader never came to know: it may enter again."""
        request.readers.discard((rank, reader))
        request.inside -= 1
        if request.state is OVER:
            self._release_if_left(request)

    def _leave(self, request: Request) -> None:
        """End a read. The last of all that a request is for ends the request."""
        request.inside -= 1
        everybody = len(request.ranks) * request.prompt.layout.readers_per_rank
        if request.state is OVER:
            self._release_if_left(request)
        elif not request.inside and len(request.readers) == everybody:
            self._end(request)

    def renew(self, request_id: str) -> None:
        """Begin a request's time to live anew. Raises UnknownRequestError."""
        request = self._known(request_id)
        if request in self._results:
            self._results.add(request)
        elif request in self._uses:
            self._uses.add(request)

    def end(self, request_id: str) -> None:
        """Give back all that a request holds, and its id. Unknown ids are fine."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request)

    def close(self) -> None:
        """End all requests: whoever waits for one gets CacheClosedError."""
        error = CacheClosedError("the cache was closed")
        for request in list(self._requests.values()):
            request.hits.break_with(error)
            request.result.break_with(error)
            self._end(request)

    def _known(self, request_id: str) -> Request:
        request = self._requests.get(request_id)
        if request is None:
            if self._l1.closed:
                raise CacheClosedError("the cache was closed")
            raise UnknownRequestError(f"there is no request {request_id!r}")
        return request

    def _unclaimed(self, request_id: str) -> Request:
        request = self._known(request_id)
        if request.claimed:
            raise UnknownRequestError(f"request {request_id!r} was claimed")
        return request

    def _ended(self, request: Request) -> AsyncCacheError:
        """The error for those who have waited for a request that ended meanwhile."""
        if self._l1.closed:
            return CacheClosedError("the cache was closed")
        return UnknownRequestError(f"request {request.request_id!r} was claimed or ended")

    # How a request ends.

    def _use(self, request: Request) -> None:
        request.state = IN_USE
        self._results.discard(request)
        self._uses.add(request)

    def _end(self, request: Request) -> None:
        self._give_up(request, Shortfall.CANCELLED)
        if request.state is OVER:
            return
        request.state = OVER
        del self._requests[request.request_id]
        prefetch = request.prefetch
        del request.prefetch  # they know each other, and would wait for a collection of garbage
        self._results.discard(request)
        self._uses.discard(request)
        self._release_if_left(request)
        for ending in self._observers.ending:
            ending(prefetch)
        if self._observers.over:
            notify(self._observers.over, prefetch)

    def _release_if_left(self, request: Request) -> None:
        if not request.inside:
            request.release(self._l1)
            # What the engine held comes before what it asked for, and is to stay longer.
            if request.start_chunk and request.prompt.hashed:
                self._l1.touch_soon(request.prompt.chunk_hashes[request.start_chunk - 1 :: -1])

    def check_integrity(self) -> None:
        """Assert that the time-to-live queues agree with the states of the requests."""
        for request in self._requests.values():
            assert request.state is not OVER
            assert (request in self._results) == (request.state is LOADED)
            assert (request in self._uses) == (request.state is IN_USE)
            assert request.pending or not (request.loads or request.rooms)
