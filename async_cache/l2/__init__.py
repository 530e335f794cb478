"""Storage behind L1.

    backend       what a backend promises, and what it needs of time
    placement     which chunks a backend is given
    urls          a URL -> a backend, of ours or of another package
    opening       opens backends, all or none
    guard         what stands before each: every call ends, a failing one is left alone, loads are metered
    tombstones    what is being deleted is not found
    copy          what one backend holds and others lack, to them

What backends are made of, and ours:

    record        the format of a stored object
    chunks        what a backend knows of one chunk
    faults        what could not be read
    tables        the shapes that chunks share, and where their objects lie
    leaving       which chunks leave first
    index         what a backend knows to be stored, what is pinned, and what leaves first
    wrapper       a backend that hands everything on to another one
    workers       threads such that a dead disk holds up nobody
    memory        the reference: objects in this process's own memory
    filesystem    the default: objects in segments, a few large files of a local disk
    valkey        objects in a Valkey or Redis server, or a cluster, which hosts share
    object_store  objects in a bucket, with an extra
    mooncake      objects in a pool of memory that hosts share, with an extra
    codec         any of them, with objects that are compressed and encrypted

`async_cache.testing` has the suite that admits a backend, and backends that fail on purpose.
"""

from async_cache.l2.backend import Backend, Limits, LoadOutcome
from async_cache.l2.placement import Placement, Placing
from async_cache.l2.urls.url import BackendURL
from async_cache.values import BackendUsage

__all__ = ["Backend", "BackendURL", "BackendUsage", "Limits", "LoadOutcome", "Placement", "Placing"]
