"""Errors as answers: each has a code, which the client turns back into the same exception."""

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
from async_cache.protocol.messages.answers import Failed

# The first that fits is taken.
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
