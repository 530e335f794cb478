"""Every error that the cache raises on purpose.

    AsyncCacheError
    ├── ConfigError (ValueError)      a setting or a backend URL that cannot be used
    ├── CacheClosedError              the cache is not open, or closed while the call waited
    ├── RequestError
    │   ├── UnknownRequestError (KeyError)   never prefetched, claimed already, ended, or swept
    │   ├── RequestConflictError      the id is in use for something else
    │   └── ReadConflictError         this rank and reader have read this request already
    ├── WriterClosedError             a commit after the writer was closed
    ├── BackendError                  a storage backend could not do what it was asked
    └── ServiceError
        ├── ConnectionLostError (ConnectionError)   there is no server, or the connection to it ended
        ├── AccessDeniedError (PermissionError)     the token is missing, unknown, or not for this salt
        ├── ProtocolError             the other end sent what the protocol does not allow
        └── LimitError                a connection asks for more at a time than the server allows

Arguments of the wrong type or value raise plain `TypeError` and `ValueError`. A fault of a backend does not raise
from a prefetch: it shortens the result, and `Shortfall` says why. Only a `CacheClient` raises a `ServiceError`.
"""


class AsyncCacheError(Exception):
    """The root of all errors that the cache raises on purpose."""


class ConfigError(AsyncCacheError, ValueError):
    """A setting, or the URL of a backend, cannot be used."""


class CacheClosedError(AsyncCacheError):
    """The cache is not open, or was closed while the call waited."""


class RequestError(AsyncCacheError):
    """A request cannot do what was asked of it."""


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


class ServiceError(AsyncCacheError):
    """The server could not do what was asked, for a reason of its own: its log has more."""


class ConnectionLostError(ServiceError, ConnectionError):
    """There is no server, or the connection to it ended: what was held through it is given back."""


class AccessDeniedError(ServiceError, PermissionError):
    """The token is missing, unknown, or does not allow this."""


class ProtocolError(ServiceError):
    """The other end sent what the protocol does not allow; the connection is closed."""


class LimitError(ServiceError):
    """A connection has more under way than the server allows."""
