"""What all messages are made of: their bounds, and what an array of each is."""

from typing import Annotated

from msgspec import Meta, Struct

VERSION = 1
DIGEST_BYTES = 32
MAX_CHUNKS = 2**17
"""The most chunks that the prompt of a message may have."""
MAX_PARTS = 256
"""The most prompts of a message."""
MAX_LAYOUT_BYTES = 256 * 1024
"""The largest payload of a RegisterLayout: to read one takes milliseconds, and nobody else has his turn meanwhile."""
MAX_TOKENS = 4_000_000
"""The most tokens of a prompt that travels as token ids: a frame has room for no more."""

Number = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Index = Annotated[int, Meta(ge=0, lt=2**32)]
RequestId = Annotated[str, Meta(min_length=1, max_length=256)]
Label = Annotated[str, Meta(max_length=128)]
Name = Annotated[str, Meta(max_length=1024)]
MAX_EVENTS = 65_536  # that a server keeps for one reader
MAX_URL = 4096  # characters
URL = Annotated[str, Meta(max_length=MAX_URL)]
BackendName = URL  # it may be most of one
Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Seconds = Annotated[float, Meta(title="0 or more")]


class Message(Struct, array_like=True, tag=True, forbid_unknown_fields=True, gc=False):
    """An array: the name of the message, and its fields in the order of their definition. More of them are refused."""


class Extensible(Message, forbid_unknown_fields=False):
    """A message that may come with more fields, from another state of the project: they are not looked at."""
