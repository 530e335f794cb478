"""Every error that the cache raises on purpose.

    AsyncCacheError
    ├── ConfigError (ValueError)      a setting or a backend URL that can not be used
    ├── CacheClosedError              the cache is not open, or closed while the call waited
    ├── RequestError
    │   ├── UnknownRequestError (KeyError)   never prefetched, claimed already, ended, or swept
    │   ├── RequestConflictError      the id is in use for something else
    │   └── ReadConflictError         this rank and reader have read this request already
    ├── WriterClosedError             a commit after the writer was closed
    └── BackendError                  a storage backend could not do what it was asked

Arguments of the wrong type or value raise plain `TypeError` and `ValueError`. A fault of a backend does not raise
from a prefetch: it shortens the result, and `Shortfall` says why.
"""


class AsyncCacheError(Exception):
    """Root of the tree."""


class ConfigError(AsyncCacheError, ValueError):
    """A setting, or the URL of a backend, can not be used."""


class CacheClosedError(AsyncCacheError):
    """The cache is not open, or was closed while the call waited."""


class RequestError(AsyncCacheError):
    """The request can not do what was asked of it."""


class UnknownRequestError(RequestError, KeyError):
    """No such request: it was never prefetched, or it was claimed, ended or swept."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class RequestConflictError(RequestError):
    """The request id is in use for another prompt, or its result was claimed."""


class ReadConflictError(RequestError):
    """This (rank, reader) has read the request already."""


class WriterClosedError(AsyncCacheError):
    """The writer was closed, by its owner or by the sweeper."""


class BackendError(AsyncCacheError):
    """A storage backend failed; the cause is chained."""
