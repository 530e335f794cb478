"""The orders of the scheduler's process to the workers', and where a chunk lies in pages."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from async_cache.integrations.paged.saves import Report
from async_cache.prompt.layout import ModelLayout, Prompt

Tables = tuple[list[int], ...]
"""By block table of the engine, block numbers in the order of the tokens. `NO_BLOCK` is where a window has passed."""

NO_BLOCK = 0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pages:
    """Where one `ObjectGroup` is in the engine: these `layers`, found through block table number `table`."""

    table: int
    block_tokens: int
    layers: tuple[str, ...]

    def blocks(self, tables: Tables, first_token: int, end_token: int) -> list[int]:
        """The blocks that have tokens between two bounds; fewer where the table is too short."""
        return tables[self.table][first_token // self.block_tokens : math.ceil(end_token / self.block_tokens)]

    def covers(self, tables: Tables, end_token: int) -> bool:
        """Whether the table has a block, or a window that has passed, for each token before the bound."""
        return len(tables[self.table]) * self.block_tokens >= end_token


@dataclass(frozen=True)
class Geometry:
    """A layout, and by group where it is in the engine. An object is (layers, blocks, *shape of a block)."""

    layout: ModelLayout
    pages: tuple[Pages, ...]

    @cached_property
    def _tables(self) -> list[tuple[int, float]]:
        """By table, the tokens of a block, and the most tokens that have blocks at a time."""
        tables: dict[int, tuple[int, float]] = {}
        for pages, group in zip(self.pages, self.layout.groups, strict=False):
            window = math.inf if group.window_chunks is None else (group.window_chunks + 1) * self.layout.chunk_tokens
            _, most = tables.get(pages.table, (0, 0.0))
            tables[pages.table] = (pages.block_tokens, max(most, window))
        return list(tables.values())

    def blocks(self, tokens: int) -> int:
        """The blocks that an engine needs for so many tokens."""
        return sum(math.ceil(min(tokens, most) / block_tokens) for block_tokens, most in self._tables)


@dataclass(frozen=True)
class LoadOrder:
    """Copy what `read_id` has prefetched into the blocks of the tokens from `first_token` to `end_token`."""

    request_id: str
    read_id: str
    first_token: int
    end_token: int
    tables: Tables


@dataclass(frozen=True)
class SaveOrder:
    """Store the chunks of `prompt` from `start_chunk` on, once this step is computed. `report` tells of its end."""

    request_id: str
    prompt: Prompt
    start_chunk: int
    tables: Tables
    report: Report | None = None


@dataclass
class Orders:
    """The orders of one step. `preempted` requests lose their blocks in it; `finished` ones wait for their saves."""

    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    preempted: Sequence[str] = ()
    finished: Sequence[str] = ()


class Complaint:
    """The log's lines on why the cache is not used: one a minute for each kind of error, not one for each request."""

    def __init__(self, interval_seconds: float = 60.0):
        self._interval_seconds = interval_seconds
        self._logged_at: dict[str, float] = {}

    def log(self, error: BaseException) -> None:
        """Log an error, unless one of its kind was logged a moment ago."""
        kind, now = type(error).__name__, time.monotonic()
        if now - self._logged_at.get(kind, -self._interval_seconds) >= self._interval_seconds:
            self._logged_at[kind] = now
            log.warning("requests are served without the cache: %s (%s)", error, kind)
