"""What a server sends."""

from async_cache.protocol.messages.base import Extensible, Message
from async_cache.protocol.messages.prompts import Layout
from async_cache.values import (
    BackendStatus,
    CacheStats,
    Deleted,
    DeletedModel,
    Event,
    Explanation,
    FlushResult,
    ListedChunk,
    LoadResult,
    LookupHits,
    Retained,
    Shortfall,
)


class Done(Extensible):
    """What was asked for is done, and has no result."""

    number: int


class LayoutRegistered(Extensible):
    """The layout may be used. `others` are a few that are in use for the same model, and share nothing with it."""

    number: int
    others: list[Layout]


class Failed(Extensible):
    """What was asked for could not be done. `number` 0: the connection is about to be closed, and this is why."""

    number: int
    code: str
    message: str


class LookupDone(Extensible):
    """Pushed: the first future of a prefetch. `parts`: of each prompt, where several were asked for."""

    number: int
    hits: LookupHits
    parts: list[LookupHits] | None = None


class LoadDone(Extensible):
    """Pushed: the second future of a prefetch. `parts` as in LookupDone."""

    number: int
    result: LoadResult
    parts: list[LoadResult] | None = None


class RequestOver(Extensible):
    """Pushed: the request of a prefetch is over, and its id is free."""

    number: int


class RequestClaimed(Extensible):
    """Pushed: the result of a prefetch was handed out, to whichever client, or its claim was undone."""

    number: int
    claimed: bool


class Hits(Extensible):
    """The hits of a request that was queried, or of a prompt that was looked up. `parts` as in LookupDone."""

    number: int
    hits: LookupHits
    parts: list[LookupHits] | None = None


class Explained(Extensible):
    """Where the chunks of a prompt are, or why they are not there."""

    number: int
    explanation: Explanation


class Kept(Extensible):
    """What is retained of a prompt from now on."""

    number: int
    retained: Retained


class RetainedListed(Extensible):
    """What is retained, the first to expire first."""

    number: int
    retained: list[Retained]


class Loaded(Extensible):
    """The result of a request, for the client that has claimed it. `parts` as in LookupDone."""

    number: int
    result: LoadResult
    parts: list[LoadResult] | None = None


class ReadAcquired(Extensible):
    """Chunk n is number `result.start_chunk + n` of the prompt, and its block begins at `offsets[n]`.

    That is in the arena, or where this is not mapped, in a buffer of `buffer_bytes`, of which ReadData then brings the
    `data_bytes` that can be read.
    `layout`: that of the request, described where the client has not registered it.
    Of several prompts, the chunks that `parts` counts follow one another in the order of the prompts.
    `absent`: (n, groups) of what cannot be read of a chunk though its block is there: what is outside a window.
    """

    number: int
    result: LoadResult
    layout: int | Layout
    offsets: list[int | None]
    absent: list[tuple[int, list[int]]]
    buffer_bytes: int = 0
    data_bytes: int = 0
    parts: list[LoadResult] | None = None


class StreamAcquired(Extensible):
    """Chunk n of the stream is number `start_chunk + n` of the prompt, and there will be up to `chunks` of them.

    `layout` as in ReadAcquired. `buffer_bytes`: for what comes as ReadData, where the arena is not mapped.
    """

    number: int
    layout: int | Layout
    start_chunk: int
    chunks: int
    buffer_bytes: int = 0


class StreamArrived(Extensible):
    """Pushed: chunks of a stream that are there, from chunk `begin` on; `offsets` and `absent` as in ReadAcquired.

    Chunks that came before may come again, where the load fell short and the end of the prefix needs more of them.
    """

    number: int
    begin: int
    offsets: list[int | None]
    absent: list[tuple[int, list[int]]]


class StreamEnded(Extensible):
    """Pushed: no more chunks will come. They can be read until the release, of which the `result` counts those."""

    number: int
    result: LoadResult


class ReadData(Extensible):
    """Bytes of a read or a stream, for the client's buffer of it."""

    number: int
    offset: int
    data: memoryview


class StoreReserved(Extensible):
    """The chunks to fill, by their number in the prompt; `shortfall` where there are fewer than L1 lacks."""

    number: int
    chunks: list[int]
    shortfall: Shortfall | None = None


class StoreClosed(Extensible):
    """Pushed: the store of that number was idle for too long, or the cache closes."""

    number: int


class Removed(Extensible):
    """What a Delete or Clear has removed."""

    number: int
    deleted: Deleted


class ModelDeleted(Extensible):
    """What a DeleteModel has removed."""

    number: int
    deleted: DeletedModel


class Flushed(Extensible):
    """What a Flush has waited for."""

    number: int
    result: FlushResult


class Counted(Extensible):
    """The statistics of the cache, as a map."""

    number: int
    stats: CacheStats


class Happened(Extensible):
    """Pushed: what was stored and removed, in order; first without any, when all that follows will be told."""

    number: int
    events: list[Event]


class BackendTold(Extensible):
    """The backend of a DrainBackend, as it is now: DRAINED if that is done."""

    number: int
    backend: BackendStatus


class BackendsListed(Extensible):
    """The backends, the fastest first, and behind them those that are being removed."""

    number: int
    backends: list[BackendStatus]


class Reloaded(Extensible):
    """The names of settings that have changed and are used from now on, and of those that wait for a restart."""

    number: int
    changed: list[str]
    waiting: list[str]


class Root(Message):
    """What chunks of a model have in common beside their tokens, and how many there are in L1."""

    layout: Layout
    adapter: str
    salt: str
    chunks: int


class RootsListed(Extensible):
    """The roots of prompts that were stored or loaded of late, the newest first."""

    number: int
    roots: list[Root]


class ChunksListed(Extensible):
    """Chunks of a tier, in the order of their hashes; fewer than were asked for at the end."""

    number: int
    chunks: list[ListedChunk]


Answer = (
    Done
    | LayoutRegistered
    | Failed
    | LookupDone
    | LoadDone
    | RequestOver
    | RequestClaimed
    | Hits
    | Explained
    | Kept
    | RetainedListed
    | Loaded
    | ReadAcquired
    | StreamAcquired
    | StreamArrived
    | StreamEnded
    | ReadData
    | StoreReserved
    | StoreClosed
    | Removed
    | ModelDeleted
    | Flushed
    | Counted
    | Happened
    | BackendTold
    | BackendsListed
    | Reloaded
    | RootsListed
    | ChunksListed
)
