"""The greeting: the first frame in each direction."""

from typing import Annotated

from msgspec import Meta, field

from async_cache.protocol.messages.base import Extensible, Label


class Hello(Extensible):
    """The client introduces itself. Over a Unix socket, the descriptor of its segment may travel with this.

    `descriptors` is false where none can come to it, as through a proxy: then it reads in frames.
    """

    version: Annotated[int, Meta(ge=0, lt=2**16)]
    token: Annotated[str, Meta(max_length=1024)] | None = None
    namespace: Label = ""
    descriptors: bool = True


class Welcome(Extensible):
    """The server lets a client in. With `mapped`, the descriptor of the arena travels with it, to be mapped read-only.

    To a client that is not `trusted`, digests prove nothing: it sends token ids, or an engine's blocks or digests, and
    the server makes the chunk hashes itself. `knows` names those requests that not every server of this version does.
    """

    version: int
    arena_bytes: int
    mapped: bool
    trusted: bool
    result_ttl_seconds: float
    knows: list[str] = field(default_factory=list)
