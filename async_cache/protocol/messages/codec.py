"""Payloads <-> messages."""

from collections.abc import Iterable
from typing import Any

import msgspec

from async_cache.errors import ProtocolError
from async_cache.protocol.messages.base import Message
from async_cache.protocol.messages.large import LARGE_BYTES, Large, decode_in_slices, is_quick
from async_cache.protocol.messages.requests import (
    AwaitingPrefetch,
    DrainBackend,
    Flush,
    Prefetch,
    Request,
    Warm,
)

# A bound of the type would refuse what is not a number, and that is answered.
_TIMED: dict[type[Message], tuple[str, ...]] = dict.fromkeys(
    (Prefetch, Warm, Flush, DrainBackend), ("deadline_seconds",)
)
_TIMED[AwaitingPrefetch] = ("deadline_seconds", "wait_for_writers_seconds")
_TOLD = 300  # characters of what is wrong

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode


def encode_each(items: Iterable[Any]) -> bytes:
    """Some items of an array, one behind the other."""
    return b"".join(map(encode, items))


def encoded_array(count: int, parts: Iterable[bytes]) -> msgspec.Raw:
    """An array of so many items, which were encoded in parts: it may stand wherever a message has such an array."""
    return msgspec.Raw(b"".join((b"\xdd", count.to_bytes(4, "big"), *parts)))


class Decoder:
    """Decodes one union of messages. Raises ProtocolError, whatever the bytes are."""

    def __init__(self, messages: Any):
        self._decoder = msgspec.msgpack.Decoder(messages)
        self._is_of_requests = messages is Request

    def decode(self, payload: bytes | memoryview) -> Any:
        """The message in a payload; of requests, it may be `Large`."""
        if self._is_of_requests and len(payload) > LARGE_BYTES and not is_quick(payload):
            return Large(payload)
        try:
            message = self._decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, ValueError) as error:
            raise ProtocolError(f"not a message: {error}"[:_TOLD]) from error
        if self._is_of_requests and type(message) in _TIMED:
            check_times(message)
        return message


def check_times(request: Any) -> None:
    """Check what no type says of a request. Raises ProtocolError."""
    for name in _TIMED.get(type(request), ()):
        if (getattr(request, name) or 0) < 0:
            raise ProtocolError("not a message: seconds are 0 or more")


def read(large: Large) -> Any:
    """A large request, decoded in many short steps: for a thread. Raises ProtocolError, whatever the bytes are."""
    request = decode_in_slices(large)
    check_times(request)
    return request
