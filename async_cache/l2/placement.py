"""Which chunks a backend is given: parameters of its URL, beside its limits. `docs/backends/tiers.md` has examples."""

from enum import StrEnum

from msgspec import Struct

from async_cache.errors import ConfigError

MOST_ADMIT = 15


class Placing(StrEnum):
    """Which of the chunks that are committed a backend is given.

    ALL: every one. FIRST: those that no backend before it has stored. SKIP_IF_PRESENT: those that no other backend
    holds, wherever it stands, when all of the others have had theirs. NONE: none; it is only read.
    """

    ALL = "all"
    FIRST = "first"
    SKIP_IF_PRESENT = "skip_if_present"
    NONE = "none"


class Placement(Struct, frozen=True, kw_only=True):
    """What one backend is given of all that is cached.

    `promote`: also what was found behind it and loaded, whatever `write` says. `admit`: of what is committed, only what
    was asked for at least so many times. `write_budget`: of all that, so many bytes a day; None: without a bound.
    """

    write: Placing = Placing.ALL
    promote: bool = False
    admit: int = 1
    write_budget: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.admit <= MOST_ADMIT:
            raise ConfigError(f"admit must be from 1 to {MOST_ADMIT}, not {self.admit}")
