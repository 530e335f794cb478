"""What chunks are of: whose, and of which model, revision and adapter."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from msgspec import Struct


class Origin(NamedTuple):
    """What a chunk is of. Its hash says the same and more, but cannot be read."""

    salt: str
    model: str
    revision: str = ""
    adapter: str = ""


@lru_cache(maxsize=1024)
def shared_origin(salt: str, model: str, revision: str, adapter: str) -> Origin:
    """An origin that many chunks have: as one object, which the garbage collector visits once."""
    return Origin(salt, model, revision, adapter)


class Selection(Struct, frozen=True):
    """The origins of one model; of one revision, adapter or salt of it, where that is not None.

    `may_use` says whose they may be at all.
    """

    model: str
    revision: str | None = None
    adapter: str | None = None
    salt: str | None = None
    may_use: Callable[[str], bool] = lambda salt: True

    def __contains__(self, origin: Origin) -> bool:
        return (
            origin.model == self.model
            and self.revision in (None, origin.revision)
            and self.adapter in (None, origin.adapter)
            and self.salt in (None, origin.salt)
            and self.may_use(origin.salt)
        )
