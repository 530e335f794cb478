"""Storage behind L1.

    backend     what a backend promises
    registry    a URL -> a backend
    memory      the reference: objects in this process's own memory
    filesystem  the default: objects as files of a local disk

`async_cache.testing` has the suite that admits a backend, and backends that fail on purpose.
"""

from async_cache.l2.backend import Backend, LoadOutcome
from async_cache.values import BackendUsage

__all__ = ["Backend", "BackendUsage", "LoadOutcome"]
