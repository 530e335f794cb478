"""The messages of the protocol: MessagePack arrays that begin with the message's name. Knows no socket.

Every request has a `number`, which the client counts up and the answers carry; the first answer to come is the
request's reply, or a `Failed`. `docs/protocol.md` says what each message means.

base      the bounds of what is sent, and what an array of each message is
hello     the first frame in each direction
prompts   prompts and layouts, in messages
requests  what a client sends
answers   what a server sends
large     requests that take long to decode
codec     payloads <-> messages
failures  errors as answers
"""

from async_cache.protocol.messages.answers import (
    Answer,
    BackendsListed,
    BackendTold,
    ChunksListed,
    Counted,
    Done,
    Explained,
    Failed,
    Flushed,
    Happened,
    Hits,
    Kept,
    LayoutRegistered,
    LoadDone,
    Loaded,
    LookupDone,
    ModelDeleted,
    ReadAcquired,
    ReadData,
    Reloaded,
    Removed,
    RequestClaimed,
    RequestOver,
    RetainedListed,
    Root,
    RootsListed,
    StoreClosed,
    StoreReserved,
    StreamAcquired,
    StreamArrived,
    StreamEnded,
)
from async_cache.protocol.messages.base import (
    DIGEST_BYTES,
    MAX_CHUNKS,
    MAX_EVENTS,
    MAX_LAYOUT_BYTES,
    MAX_PARTS,
    MAX_TOKENS,
    MAX_URL,
    URL,
    VERSION,
    BackendName,
    Count,
    Digest,
    Extensible,
    Index,
    Label,
    Message,
    Name,
    Number,
    RequestId,
    Seconds,
)
from async_cache.protocol.messages.codec import Decoder, encode, encode_each, encoded_array, read
from async_cache.protocol.messages.failures import ERROR_CODES, error_of, failed
from async_cache.protocol.messages.hello import Hello, Welcome
from async_cache.protocol.messages.large import LARGE_BYTES, Large
from async_cache.protocol.messages.prompts import (
    NEWER_PROMPTS,
    Blocks,
    Digests,
    EngineDigests,
    Group,
    Layout,
    SegmentDigests,
    SegmentIds,
    TokenIds,
    WirePrompt,
)
from async_cache.protocol.messages.requests import (
    NEWER,
    AcquireRead,
    AcquireStream,
    AddBackend,
    AwaitingPrefetch,
    Cancel,
    Clear,
    CloseStore,
    CommitStore,
    Delete,
    DeleteModel,
    DrainBackend,
    EndRequest,
    Events,
    Explain,
    Flush,
    Hint,
    ListBackends,
    ListChunks,
    ListRetained,
    ListRoots,
    Lookup,
    LookupSegments,
    Ping,
    Prefetch,
    PrefetchSegments,
    Prompts,
    QueryPrefetchLookupHits,
    QueryPrefetchStatus,
    RegisterLayout,
    ReleaseRead,
    Reload,
    RemoveBackend,
    Renew,
    Request,
    ReserveStore,
    Retain,
    Stats,
    StoreData,
    Unclaim,
    Warm,
)

__all__ = [
    "BackendName", "Count", "DIGEST_BYTES", "Digest", "Extensible", "Index", "Label", "MAX_CHUNKS", "MAX_EVENTS",
    "MAX_LAYOUT_BYTES", "MAX_PARTS", "MAX_TOKENS", "MAX_URL", "Message", "Name", "Number", "RequestId", "Seconds",
    "URL", "VERSION",
    "Hello", "Welcome",
    "Blocks", "Digests", "EngineDigests", "Group", "Layout", "NEWER_PROMPTS", "SegmentDigests", "SegmentIds",
    "TokenIds", "WirePrompt",
    "AcquireRead", "AcquireStream", "AddBackend", "AwaitingPrefetch", "Cancel", "Clear", "CloseStore", "CommitStore",
    "Delete", "DeleteModel", "DrainBackend", "EndRequest", "Events", "Explain", "Flush", "Hint", "ListBackends",
    "ListChunks", "ListRetained", "ListRoots", "Lookup", "LookupSegments", "NEWER", "Ping", "Prefetch",
    "PrefetchSegments", "Prompts", "QueryPrefetchLookupHits",
    "QueryPrefetchStatus", "RegisterLayout", "ReleaseRead", "Reload", "RemoveBackend", "Renew", "Request",
    "ReserveStore", "Retain", "Stats", "StoreData", "Unclaim", "Warm",
    "Answer", "BackendsListed", "BackendTold", "ChunksListed", "Counted", "Done", "Explained", "Failed", "Flushed",
    "Happened", "Hits", "Kept", "LayoutRegistered", "LoadDone", "Loaded", "LookupDone", "ModelDeleted", "ReadAcquired",
    "ReadData", "Reloaded", "Removed", "RequestClaimed", "RequestOver", "RetainedListed", "Root", "RootsListed",
    "StoreClosed", "StoreReserved", "StreamAcquired", "StreamArrived", "StreamEnded",
    "Decoder", "encode", "encode_each", "encoded_array", "LARGE_BYTES", "Large", "read",
    "ERROR_CODES", "error_of", "failed",
]  # fmt: skip
