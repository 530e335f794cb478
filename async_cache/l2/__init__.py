"""Storage behind L1.

    backend     what a backend promises
    registry    a URL -> a backend
    guard       a backend as the cache sees it: every call has an end
    breaker     leaves a failing backend alone for a while
    meter       what is queued for a backend, and how fast it is
    tombstones  what is being deleted must not be found
    record      the format of a stored object
    index       what a backend knows to be stored, in the order of its use
    memory      the reference: objects in this process's own memory
    filesystem  the default: objects as files of a local disk

`async_cache.testing` has the suite that admits a backend, and backends that fail on purpose.
"""

from async_cache.l2.backend import Backend, LoadOutcome
from async_cache.values import BackendUsage

__all__ = ["Backend", "BackendUsage", "LoadOutcome"]
