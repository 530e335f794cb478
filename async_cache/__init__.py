"""A KV cache that answers twice: how much of a prompt is cached, then that the bytes are in memory.

The modules, in the order the data flows; a module imports only what is listed before it or in its own package:

- `errors`, `values`: what callers get
- `keys`: token ids -> chained chunk hashes -> object keys
- `address`, `config`: where a server listens; the settings
- `layout`, `arguments`: what fixes the bytes, and prompts; checks of what callers give
- `coverage`: found objects -> the prefix that they serve
- `promise`, `sweeper`, `ring`: a value that comes once; what nobody comes back for; the order of use
- `tensors`, `scoped`, `reading`: tensors over memory; what is entered and left; a reader's lease
- `l1`: chunks in shared memory
- `l2`: storage backends
- `lookup`: ask every backend what it holds
- `loads`: L2 -> L1
- `writeback`: L1 -> L2
- `removal`: delete and clear
- `request`, `plan`, `prefetch`: the record of a request, what it can be promised, the whole way
- `counting`: how much is cached, for whoever only wants to know
- `writing`: a writer of chunks
- `core`: the parts, wired up
- `cache`: `AsyncCache`, which owns all of it
- `protocol`: what a client and a server say to each other
- `server`: one cache for all the processes of a machine
- `client`: `CacheClient` and `BlockingClient`, the same cache from another process
- `integrations`: serving engines that use it
- `cli`, `__main__`: the command line
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
from async_cache.keys import ObjectKey
from async_cache.layout import ModelLayout, ObjectGroup, Prompt
from async_cache.promise import Prefetch
from async_cache.reading import ReadChunk, ReadLease
from async_cache.values import (
    BackendUsage,
    CacheStats,
    Deleted,
    FlushResult,
    LoadResult,
    LookupHits,
    Shortfall,
)
from async_cache.writing import WriteChunk, Writer

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
    "ReadLease",
    "ReadChunk",
    "Writer",
    "WriteChunk",
    # looking at it and emptying it
    "BackendUsage",
    "CacheStats",
    "Deleted",
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
