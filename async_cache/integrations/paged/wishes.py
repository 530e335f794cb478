"""What a request says of its own future, in its parameters: what of it is to be kept, and whether it goes on.

    {"async_cache": {"retain": [{"tokens": 4096, "ttl": "1h"}], "returns": true, "within_seconds": 30}}

`retain` is what providers call breakpoints of a prompt cache: the length of a prefix (all of the prompt, if it is left
out) and its lifetime, "5m", "1h", or seconds.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

KEY = "async_cache"
"""Under this name the wishes stand among a request's parameters."""
MOST_BREAKPOINTS = 4
_LIFETIMES = {"5m": 300.0, "1h": 3600.0}


class Breakpoint(Struct, frozen=True, forbid_unknown_fields=True):
    """The head of a prompt that is to be kept, and for how long. Raises ValueError for a lifetime that there is not."""

    tokens: Annotated[int, Meta(ge=0)] | None = None
    ttl: str | Annotated[float, Meta(ge=0, le=10 * 366 * 86_400)] = "5m"

    def __post_init__(self) -> None:
        if isinstance(self.ttl, str) and self.ttl not in _LIFETIMES:
            raise ValueError(f"a lifetime is {' or '.join(_LIFETIMES)} or a number of seconds, not {self.ttl!r}")

    @property
    def ttl_seconds(self) -> float:
        """The lifetime in seconds."""
        return _LIFETIMES[self.ttl] if isinstance(self.ttl, str) else float(self.ttl)


class Wishes(Struct, frozen=True, forbid_unknown_fields=True):
    """All that a request says. `returns`: whether its session goes on, and `within_seconds`, how soon."""

    retain: Annotated[list[Breakpoint], Meta(max_length=MOST_BREAKPOINTS)] = msgspec.field(default_factory=list)
    returns: bool | None = None
    within_seconds: Annotated[float, Meta(ge=0, le=1e9)] | None = None


NOTHING = Wishes()


def wishes_of(parameters: Mapping[str, Any] | None) -> Wishes:
    """The wishes among a request's parameters. Raises ValueError for those that cannot be."""
    if not parameters or KEY not in parameters:
        return NOTHING
    return msgspec.convert(parameters[KEY], Wishes)
