"""A KV cache that answers twice: how much of a prompt is cached, then that the bytes are in memory.

The rooms, in the order the data flows. Which of them knows which is in `docs/design.md`, and held by a test.

- `prompt`: what is asked for, and what fixes it: token ids -> chunk hashes -> object keys
- `memory`: memory that processes share
- `l1`: chunks in memory
- `l2`: storage: a directory, memory, or another backend
- `retention`: which chunk leaves first
- `ledger`: what has left, and why
- `read`: the way of a prefetch: lookup, promise, load
- `write`: the way of a store: reserve, commit, write back; delete and clear
- `handles`: what a caller holds: a prefetch, a lease, a writer
- `aio`: the small asynchronous tools: a value that comes once, time to live
- `advice`: from which chunk on it is faster to compute than to load
- `observe`: who is told what happens
- `events`: what was stored and removed, to iterate over
- `tracing`: spans of OpenTelemetry
- `core`, `cache`: the parts, wired up; `AsyncCache`, which owns them
- `metrics`: what is counted for those who operate it
- `protocol`: what a client and a server say to each other
- `server`: one cache for all the processes of a machine
- `client`: `CacheClient` and `BlockingClient`, the same cache from another process
- `integrations`: serving engines that use it
- `recording`: the requests of a server as a trace, in a file
- `replay`: recorded requests through the real index, to see what a policy would keep
- `config`, `limits`, `cli`, `__main__`: the settings, what a tenant may have, and the command line
- `values`, `errors`: what callers get
- `testing`: for the tests of those who use it
"""

from async_cache.cache import AsyncCache
from async_cache.client import BlockingClient, CacheClient, connect
from async_cache.config import CacheConfig, ServerConfig, TenantConfig
from async_cache.errors import (
    AccessDeniedError,
    AsyncCacheError,
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
from async_cache.handles.events import EventStream
from async_cache.handles.lease import ReadChunk, ReadLease
from async_cache.handles.prefetch import Prefetch, SegmentPrefetch
from async_cache.handles.stream import ReadStream
from async_cache.handles.writer import WriteChunk, Writer
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.prompt.objects import ObjectGroup
from async_cache.values import (
    BackendState,
    BackendStatus,
    BackendUsage,
    CacheStats,
    ChunkState,
    Clipped,
    Copied,
    Deleted,
    DeletedModel,
    Elsewhere,
    Explanation,
    FlushResult,
    LoadResult,
    LookupHits,
    Missed,
    Removal,
    Removed,
    Retained,
    SegmentHits,
    SegmentResult,
    Shortfall,
    Skipped,
    Span,
    Stored,
)

__version__ = "0.1.0"

__all__ = [
    # the cache and what it is made from
    "AsyncCache",
    "CacheConfig",
    # a cache that a server keeps
    "connect",
    "CacheClient",
    "BlockingClient",
    "ServerConfig",
    "TenantConfig",
    # what is cached
    "ModelLayout",
    "ObjectGroup",
    "ObjectKey",
    "Prompt",
    # a request, from lookup to read, and a write
    "Prefetch",
    "LookupHits",
    "LoadResult",
    "Shortfall",
    "Missed",
    "SegmentPrefetch",
    "SegmentHits",
    "SegmentResult",
    "Retained",
    "Clipped",
    "ReadLease",
    "ReadStream",
    "ReadChunk",
    "Writer",
    "WriteChunk",
    # why something is not there
    "Explanation",
    "Span",
    "ChunkState",
    "Removal",
    "Elsewhere",
    # what happens
    "EventStream",
    "Stored",
    "Removed",
    "Skipped",
    # looking at it, emptying it, and changing its backends
    "BackendState",
    "BackendStatus",
    "BackendUsage",
    "Copied",
    "CacheStats",
    "Deleted",
    "DeletedModel",
    "FlushResult",
    # errors
    "AsyncCacheError",
    "BackendError",
    "CacheClosedError",
    "ConfigError",
    "ReadConflictError",
    "RequestConflictError",
    "RequestError",
    "UnknownRequestError",
    "WriterClosedError",
    "ServiceError",
    "AccessDeniedError",
    "ConnectionLostError",
    "LimitError",
    "ProtocolError",
]
