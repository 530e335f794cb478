"""What a client sends."""

from typing import Annotated, Literal

from msgspec import Meta

from async_cache.protocol.messages.base import (
    MAX_EVENTS,
    MAX_PARTS,
    URL,
    BackendName,
    Count,
    Digest,
    Index,
    Label,
    Message,
    Name,
    Number,
    RequestId,
    Seconds,
)
from async_cache.protocol.messages.prompts import NEWER_PROMPTS, Layout, WirePrompt

Prompts = Annotated[list[WirePrompt], Meta(min_length=1, max_length=MAX_PARTS)]


class RegisterLayout(Message):
    """The client chooses the number `layout`, by which its prompts then name it. Answered by LayoutRegistered."""

    number: Number
    layout: Index
    description: Layout


class Prefetch(Message):
    """Look a prompt up and load it. Answered by LookupDone and LoadDone, both pushed, and RequestOver at its end."""

    number: Number
    prompt: WirePrompt
    request_id: RequestId
    skip_tokens: Count = 0
    ranks: Annotated[list[Index], Meta(min_length=1, max_length=4096)] | None = None
    deadline_seconds: Seconds | None = None
    traceparent: Annotated[str, Meta(min_length=55, max_length=55)] | None = None


class AwaitingPrefetch(Prefetch):
    """Prefetch, where the lookup waits for chunks that writers have announced, but no longer than that."""

    wait_for_writers_seconds: Seconds = 0.0


class PrefetchSegments(Message):
    """Look several prompts of one layout and salt up, and load them, as one request. Answered as Prefetch."""

    number: Number
    prompts: Prompts
    request_id: RequestId
    ranks: Annotated[list[Index], Meta(min_length=1, max_length=4096)] | None = None
    deadline_seconds: Seconds | None = None
    traceparent: Annotated[str, Meta(min_length=55, max_length=55)] | None = None


class Cancel(Message):
    """Give up the prefetch, wait, read or store of that number, as if it had not been asked for. Answered by Done.

    A wait that it ends is answered by Failed.
    """

    number: Number
    call: Number


class QueryPrefetchLookupHits(Message):
    """Wait for the lookup of a request. Answered by Hits."""

    number: Number
    request_id: RequestId


class QueryPrefetchStatus(Message):
    """Wait for the load of a request, and claim it. Answered by Loaded."""

    number: Number
    request_id: RequestId


class Unclaim(Message):
    """Undo a claim whose result came too late for those who waited: the next who asks gets it. Answered by Done."""

    number: Number
    request_id: RequestId


class Lookup(Message):
    """Count what is cached of a prompt. Answered by Hits."""

    number: Number
    prompt: WirePrompt


class LookupSegments(Message):
    """Count what is cached of several prompts of one layout and salt. Answered by Hits."""

    number: Number
    prompts: Prompts


class Explain(Message):
    """Ask where the chunks of a prompt are, and why not in the cache. Answered by Explained.

    Where else the same tokens are cached is told where the prompt does not come by its digests.
    """

    number: Number
    prompt: WirePrompt


class Retain(Message):
    """Keep the head of a prompt, of so many tokens (None: all), for so long; 0 seconds end that. Answered by Kept."""

    number: Number
    prompt: WirePrompt
    tokens: Count | None = None
    ttl_seconds: Seconds = 300.0


class ListRetained(Message):
    """Ask for what is retained, of the salts of the client's token. Answered by RetainedListed."""

    number: Number


class Warm(Message):
    """Load a prompt into L1, and let go of it. Answered by Loaded, when it has loaded."""

    number: Number
    prompt: WirePrompt
    deadline_seconds: Seconds | None = None


class Hint(Message):
    """Tell the eviction policy what is known of a prompt's future. Answered by Done."""

    number: Number
    prompt: WirePrompt
    output_tokens: Count | None = None
    returns: bool | None = None
    within_seconds: Seconds | None = None


class DeleteModel(Message):
    """Remove all that there is of a model, or of one revision, adapter or salt of it. Answered by ModelDeleted."""

    number: Number
    model: Name
    revision: Name | None = None
    adapter: Name | None = None
    salt: Label | None = None


class AcquireRead(Message):
    """Wait for a load, then read. Answered by ReadAcquired, and ReadData where the arena is not mapped."""

    number: Number
    request_id: RequestId
    rank: Index = 0
    reader: Index = 0


class AcquireStream(Message):
    """Wait for a lookup, then read what is being loaded. Answered by StreamAcquired, StreamArrived and StreamEnded.

    Where the arena is not mapped, ReadData comes before the StreamArrived of its chunks.
    """

    number: Number
    request_id: RequestId
    rank: Index = 0
    reader: Index = 0


_NEWER: tuple[type[Message], ...] = (
    Retain,
    ListRetained,
    Warm,
    Hint,
    DeleteModel,
    AcquireStream,
    AwaitingPrefetch,
    PrefetchSegments,
    LookupSegments,
    *NEWER_PROMPTS,
)
NEWER = tuple(kind.__name__ for kind in _NEWER)
"""What came after the first servers of this version: a client sends it to those that say they know it."""


class ReleaseRead(Message):
    """Release a read, by the number of its AcquireRead or AcquireStream. Answered by Done."""

    number: Number
    read: Number


class ReserveStore(Message):
    """Make room for the chunks of a rank that L1 lacks. Answered by StoreReserved; StoreClosed when it expires."""

    number: Number
    prompt: WirePrompt
    rank: Index = 0
    start_chunk: Index = 0


class StoreData(Message):
    """Bytes of the chunk at a position of a store, from `offset` in its block on. Not answered: the commit is."""

    store: Number
    position: Index
    offset: Count
    data: memoryview


class CommitStore(Message):
    """Publish the chunk at a position of a store. Answered by Done.

    `offset`: where its block lies in the client's segment; None where its bytes came as StoreData.
    """

    number: Number
    store: Number
    position: Index
    offset: Count | None = None


class CloseStore(Message):
    """Close a store, and discard what was not committed. Answered by Done."""

    number: Number
    store: Number


class Renew(Message):
    """Begin a request's time to live anew. Answered by Done."""

    number: Number
    request_id: RequestId


class EndRequest(Message):
    """End a request: all that it holds is released. Answered by Done."""

    number: Number
    request_id: RequestId


class Delete(Message):
    """Remove a prompt from both tiers. Answered by Removed."""

    number: Number
    prompt: WirePrompt


class Clear(Message):
    """Empty L1 of what L2 has, or both tiers. Answered by Removed."""

    number: Number
    tier: Literal["l1", "all"]


class Flush(Message):
    """Wait until what was committed is in L2. Answered by Flushed."""

    number: Number
    deadline_seconds: Seconds | None = None


class Stats(Message):
    """Ask for the statistics of the cache. Answered by Counted."""

    number: Number


class Events(Message):
    """Be told what is stored and removed from now on. Answered by Happened, again and again until a Cancel.

    So many events wait for a client that is slow; what comes beyond that is counted by a Skipped.
    """

    number: Number
    capacity: Annotated[int, Meta(ge=1, le=MAX_EVENTS)] = MAX_EVENTS


class AddBackend(Message):
    """Open one more backend, before the one at `position` (None: behind all), and use it. Answered by Done."""

    number: Number
    url: URL
    position: Index | None = None


class DrainBackend(Message):
    """Write nothing new to a backend, and copy what only it has to the others. Answered by BackendTold."""

    number: Number
    name: BackendName
    deadline_seconds: Seconds | None = None


class RemoveBackend(Message):
    """Ask a backend no more, and close it when what was promised of it is loaded. Answered by Done."""

    number: Number
    name: BackendName


class ListBackends(Message):
    """Ask which backends there are. Answered by BackendsListed."""

    number: Number


class Reload(Message):
    """Have the server read its settings anew. Answered by Reloaded."""

    number: Number


class ListRoots(Message):
    """Ask of which models and salts there are chunks. Answered by RootsListed."""

    number: Number


class ListChunks(Message):
    """Ask for chunks in L1 or a backend, by their hashes, those after `after`. Answered by ChunksListed."""

    number: Number
    model: Name | None = None
    salt: Label | None = None
    after: Digest | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] = 1000
    backend: BackendName | None = None


class Ping(Message):
    """Ask whether the server is there. Answered by Done."""

    number: Number


Request = (
    RegisterLayout
    | Prefetch
    | AwaitingPrefetch
    | PrefetchSegments
    | Cancel
    | QueryPrefetchLookupHits
    | QueryPrefetchStatus
    | Unclaim
    | Lookup
    | LookupSegments
    | Explain
    | Retain
    | ListRetained
    | Warm
    | Hint
    | AcquireRead
    | AcquireStream
    | ReleaseRead
    | ReserveStore
    | StoreData
    | CommitStore
    | CloseStore
    | Renew
    | EndRequest
    | Delete
    | DeleteModel
    | Clear
    | Flush
    | Stats
    | Events
    | AddBackend
    | DrainBackend
    | RemoveBackend
    | ListBackends
    | Reload
    | ListRoots
    | ListChunks
    | Ping
)
