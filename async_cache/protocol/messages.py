"""Payloads <-> messages: MessagePack arrays that begin with the message's name. Knows no socket.

Every request has a `number`, which the client counts up and the answers carry; the first answer to come is the
request's reply, or a `Failed`. `docs/protocol.md` says what each message means.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from async_cache.errors import (
    AccessDeniedError,
    BackendError,
    CacheClosedError,
    ConfigError,
    ConnectionLostError,
    LimitError,
    ProtocolError,
    ReadConflictError,
    RequestConflictError,
    RequestError,
    ServiceError,
    UnknownRequestError,
    WriterClosedError,
)
from async_cache.values import (
    BackendStatus,
    CacheStats,
    Deleted,
    Event,
    Explanation,
    FlushResult,
    ListedChunk,
    LoadResult,
    LookupHits,
    Shortfall,
)

VERSION = 1
DIGEST_BYTES = 32
MAX_CHUNKS = 2**17
"""The most chunks that the prompt of a message may have."""
MAX_TOKENS = 4_000_000
"""The most tokens of a prompt that travels as token ids: a frame has room for no more."""

Number = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Index = Annotated[int, Meta(ge=0, lt=2**32)]
RequestId = Annotated[str, Meta(min_length=1, max_length=256)]
Label = Annotated[str, Meta(max_length=128)]
Name = Annotated[str, Meta(max_length=1024)]
MAX_EVENTS = 65_536  # that a server keeps for one reader
MAX_URL = 4096  # characters
URL = Annotated[str, Meta(max_length=MAX_URL)]
BackendName = URL  # it may be most of one
Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Seconds = Annotated[float, Meta(title="0 or more")]


class Message(Struct, array_like=True, tag=True, forbid_unknown_fields=True, gc=False):
    """An array: the name of the message, and its fields in the order of their definition. More of them are refused."""


class Extensible(Message, forbid_unknown_fields=False):
    """A message that may come with more fields, from another state of the project: they are not looked at."""


# The greeting: the first frame in each direction.


class Hello(Extensible):
    """The client introduces itself. Over a Unix socket, the descriptor of its segment may travel with this.

    `descriptors` is false where none can come to it, as through a proxy: then it reads in frames.
    """

    version: Annotated[int, Meta(ge=0, lt=2**16)]
    token: Annotated[str, Meta(max_length=1024)] | None = None
    namespace: Label = ""
    descriptors: bool = True


class Welcome(Extensible):
    """The server lets a client in. With `mapped`, the descriptor of the arena travels with it, to be mapped read-only.

    To a client that is not `trusted`, digests prove nothing: it sends token ids, or an engine's blocks or digests, and
    the server makes the chunk hashes itself.
    """

    version: int
    arena_bytes: int
    mapped: bool
    trusted: bool
    result_ttl_seconds: float


# What prompts are made of.


class Group(Message):
    """A group of a layout: shape and dtype of an object, its window in chunks, the ranks that hold it (None: all)."""

    shape: Annotated[list[Annotated[int, Meta(ge=1, lt=2**48)]], Meta(min_length=1, max_length=32)]
    dtype: Annotated[str, Meta(max_length=32)]
    window_chunks: Annotated[int, Meta(ge=1, lt=2**32)] | None = None
    ranks: Annotated[list[Index], Meta(max_length=4096)] | None = None


class Layout(Message):
    """What fixes the bytes of a model's chunks: its groups, tokens in a chunk, ranks, readers of each rank."""

    model: Name
    groups: Annotated[list[Group], Meta(min_length=1, max_length=4096)]
    chunk_tokens: Annotated[int, Meta(ge=1, lt=2**32)]
    world_size: Annotated[int, Meta(ge=1, le=4096)]
    readers_per_rank: Annotated[int, Meta(ge=1, lt=2**32)]
    revision: Name


class Digests(Message):
    """A prompt by its chunk hashes, one after the other."""

    layout: Index
    root: Digest
    tokens: Count
    salt: Label
    chunk_hashes: Annotated[bytes, Meta(max_length=DIGEST_BYTES * MAX_CHUNKS)]
    adapter: Label = ""


class TokenIds(Message):
    """A prompt by the ids of its whole chunks, as little-endian uint32."""

    layout: Index
    salt: Label
    adapter: Label
    ids: bytes
    media: Annotated[list[tuple[Index, bytes]], Meta(max_length=2**14)] = []


class Blocks(Message):
    """A prompt by an engine's chained block hashes."""

    layout: Index
    salt: Label
    adapter: Label
    block_tokens: Annotated[int, Meta(ge=1, lt=2**32)]
    blocks: Annotated[list[bytes], Meta(max_length=2**17)]


class EngineDigests(Message):
    """A run of chunks by an engine's own digests of them."""

    layout: Index
    salt: Label
    adapter: Label
    digests: Annotated[list[bytes], Meta(max_length=MAX_CHUNKS)]


WirePrompt = Digests | TokenIds | Blocks | EngineDigests


# Requests.


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


class Explain(Message):
    """Ask where the chunks of a prompt are, and why not in the cache. Answered by Explained.

    Where else the same tokens are cached is told where the prompt does not come by its digests.
    """

    number: Number
    prompt: WirePrompt


class AcquireRead(Message):
    """Wait for a load, then read. Answered by ReadAcquired, and ReadData where the arena is not mapped."""

    number: Number
    request_id: RequestId
    rank: Index = 0
    reader: Index = 0


class ReleaseRead(Message):
    """Release a read, by the number of its AcquireRead. Answered by Done."""

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
    """Ask for chunks in L1, by their hashes, those after `after`. Answered by ChunksListed."""

    number: Number
    model: Name | None = None
    salt: Label | None = None
    after: Digest | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] = 1000


class Ping(Message):
    """Ask whether the server is there. Answered by Done."""

    number: Number


Request = (
    RegisterLayout
    | Prefetch
    | Cancel
    | QueryPrefetchLookupHits
    | QueryPrefetchStatus
    | Unclaim
    | Lookup
    | Explain
    | AcquireRead
    | ReleaseRead
    | ReserveStore
    | StoreData
    | CommitStore
    | CloseStore
    | Renew
    | EndRequest
    | Delete
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


# Answers.


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
    """Pushed: the first future of a prefetch."""

    number: int
    hits: LookupHits


class LoadDone(Extensible):
    """Pushed: the second future of a prefetch."""

    number: int
    result: LoadResult


class RequestOver(Extensible):
    """Pushed: the request of a prefetch is over, and its id is free."""

    number: int


class RequestClaimed(Extensible):
    """Pushed: the result of a prefetch was handed out, to whichever client, or its claim was undone."""

    number: int
    claimed: bool


class Hits(Extensible):
    """The hits of a request that was queried, or of a prompt that was looked up."""

    number: int
    hits: LookupHits


class Explained(Extensible):
    """Where the chunks of a prompt are, or why they are not there."""

    number: int
    explanation: Explanation


class Loaded(Extensible):
    """The result of a request, for the client that has claimed it."""

    number: int
    result: LoadResult


class ReadAcquired(Extensible):
    """Chunk n is number `result.start_chunk + n` of the prompt, and its block begins at `offsets[n]`.

    That is in the arena, or where this is not mapped, in a buffer of `buffer_bytes`, of which ReadData then brings the
    `data_bytes` that can be read.
    `layout`: that of the request, described where the client has not registered it.
    `absent`: (n, groups) of what cannot be read of a chunk though its block is there: what is outside a window.
    """

    number: int
    result: LoadResult
    layout: int | Layout
    offsets: list[int | None]
    absent: list[tuple[int, list[int]]]
    buffer_bytes: int = 0
    data_bytes: int = 0


class ReadData(Extensible):
    """Bytes of a read, for the client's buffer of it."""

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
    """Chunks in L1, in the order of their hashes; fewer than were asked for at the end."""

    number: int
    chunks: list[ListedChunk]


# A bound of the type would refuse what is not a number, and that is answered.
_TIMED = frozenset((Prefetch, Flush, DrainBackend))

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
    | Loaded
    | ReadAcquired
    | ReadData
    | StoreReserved
    | StoreClosed
    | Removed
    | Flushed
    | Counted
    | Happened
    | BackendTold
    | BackendsListed
    | Reloaded
    | RootsListed
    | ChunksListed
)

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode


class Decoder:
    """Decodes one union of messages. Raises ProtocolError, whatever the bytes are."""

    def __init__(self, messages: Any):
        self._decoder = msgspec.msgpack.Decoder(messages)
        self._is_of_requests = messages is Request

    def decode(self, payload: bytes | memoryview) -> Any:
        """The message in a payload."""
        try:
            message = self._decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, ValueError) as error:
            raise ProtocolError(f"not a message: {error}") from error
        if (
            self._is_of_requests
            and type(message) in _TIMED
            and message.deadline_seconds is not None
            and message.deadline_seconds < 0
        ):
            raise ProtocolError("not a message: seconds are 0 or more")
        return message


# Errors: each has a code, which the client turns back into the same exception. The first that fits is taken.

ERROR_CODES: dict[str, type[Exception]] = {
    "unknown_request": UnknownRequestError,
    "request_conflict": RequestConflictError,
    "read_conflict": ReadConflictError,
    "request": RequestError,
    "writer_closed": WriterClosedError,
    "backend": BackendError,
    "cache_closed": CacheClosedError,
    "config": ConfigError,
    "connection_lost": ConnectionLostError,
    "access_denied": AccessDeniedError,
    "protocol": ProtocolError,
    "limit": LimitError,
    "internal": ServiceError,
    "cancelled": ServiceError,
    "value": ValueError,
    "type": TypeError,
}


def failed(number: int, error: Exception) -> Failed:
    """The answer that tells of an error. What has no code of its own is a fault of the server, and told as such."""
    for code, kind in ERROR_CODES.items():
        if isinstance(error, kind):
            return Failed(number, code, str(error))
    return Failed(number, "internal", f"the server failed: {type(error).__name__}")


def error_of(failed: Failed) -> Exception:
    """The exception that an answer tells of."""
    return ERROR_CODES.get(failed.code, ServiceError)(failed.message)
