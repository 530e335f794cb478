"""What the backend and its helper tell each other: a call and its answer, in MessagePack frames over a socket pair."""

from struct import Struct as Layout
from typing import Any, NamedTuple

from msgspec import Struct

from async_cache.prompt.keys import ObjectKey

LENGTH = Layout("<I")
"""Before each frame, its length in bytes."""


class Place(NamedTuple):
    """Where bytes are: in which of the memory files that both have mapped, and from where to where in it."""

    file: int
    offset: int
    size_bytes: int


class Setup(Struct, frozen=True, tag=True):
    """The first call: become a client of the pool. Answered by whether each memory file could be mapped."""

    master: str
    metrics_port: int
    namespace: str
    host: str | None
    metadata: str
    segment_bytes: int
    protocol: str
    devices: str
    replicas: int
    threads: int


class Find(Struct, frozen=True, tag=True):
    """Which objects are there? Answered by a code for each: 1, 0, or a negative error. What is there is leased."""

    keys: list[ObjectKey]


class Load(Struct, frozen=True, tag=True):
    """Read objects to these places, verified. Answered by the bytes of each, or the value of another LoadOutcome.

    An object has to be as long as its place, unless it may be shorter.
    """

    keys: list[ObjectKey]
    places: list[Place]
    may_be_shorter: bool = False


class Store(Struct, frozen=True, tag=True):
    """Write objects from these places, and remove what is named in `replaced` before. Answered by codes: 0, stored."""

    keys: list[ObjectKey]
    places: list[Place]
    replaced: list[ObjectKey]


class Remove(Struct, frozen=True, tag=True):
    """Remove objects, leased or not. Answered by codes, 0 where one was there."""

    keys: list[ObjectKey]


class ListAll(Struct, frozen=True, tag=True):
    """Which objects does the namespace have? Answered by the number of a listing, and of how many objects it is."""


class Page(Struct, frozen=True, tag=True):
    """Which are these objects of a listing? Answered by (chunk hash, rank, group, bytes of the body) for each.

    What has left the pool meanwhile is left out. The listing ends with its last objects.
    """

    listing: int
    begin: int
    count: int


class Close(Struct, frozen=True, tag=True):
    """The last call: leave the pool, and end."""


Call = Setup | Find | Load | Store | Remove | ListAll | Page | Close


class Request(Struct, frozen=True, array_like=True):
    """A call, with a number that its answer carries."""

    number: int
    call: Call


class Answer(Struct, frozen=True, array_like=True):
    """What a call returned, or in one line why it failed; `usage` tells that the caller's configuration cannot work."""

    number: int
    result: Any = None
    error: str | None = None
    usage: bool = False
