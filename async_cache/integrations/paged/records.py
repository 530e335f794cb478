"""What a `PagedScheduler` knows of one request of its engine."""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Protocol

from async_cache.client.prefetches import BlockingPrefetch
from async_cache.values import LoadResult, LookupHits


class EngineRequest(Protocol):
    """What a scheduler uses of its engine's request."""

    request_id: str
    all_token_ids: Sequence[int]
    num_computed_tokens: int
    num_preemptions: int

    @property
    def num_tokens(self) -> int:
        """The tokens of the prompt, and those generated so far."""


class Stage(Enum):
    """LOOKING -> LOADING -> DONE, and from there to LOOKING by a preemption, or when what was found is out of date.

    A request for which nothing is looked up, or nothing found, is DONE at once: all of it is computed.
    """

    LOOKING = "looking"  # there is a `prefetch`, and the engine asks for its outcome
    LOADING = "loading"  # the request has its blocks, and the workers fill them
    DONE = "done"


class Record:
    """What is known of one request of the engine. See `Stage`."""

    __slots__ = (
        "advised", "asked_at", "asked_tokens", "first_token", "fresh_seconds", "give_up_at", "heard", "hits",
        "identity", "loads", "needs", "no_room_since", "offer_from", "offer_until", "preemptions", "prefetch",
        "request", "result", "saved_chunks", "saves", "stage", "stale",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, identity: Mapping[str, Any], *, loads: bool):
        self.request = request
        self.identity = identity
        self.loads = loads
        self.preemptions = request.num_preemptions
        self.stage = Stage.DONE
        self.prefetch: BlockingPrefetch | None = None
        self.asked_at = 0.0
        self.asked_tokens = 0
        self.advised: int | None = None  # the chunk from which on it is faster to compute than to load
        self.heard = 0  # what had come from the server by then
        self.fresh_seconds = 0.0  # how long what was loaded is there
        self.give_up_at: float | None = None
        self.hits: LookupHits | None = None
        self.offer_from = self.offer_until = 0.0  # when the load is expected to be short
        self.result: LoadResult | None = None
        self.needs = (-1, 0, 0)  # computed tokens, and the blocks that all the rest, and what is loaded, then need
        self.no_room_since: float | None = None
        self.first_token = 0
        self.saved_chunks: int | None = None  # None until it is computed
        self.saves = False
        self.stale = False  # what it holds was computed, or loaded, before a reset: nothing of it is saved

    @property
    def is_preempted(self) -> bool:
        """Whether the engine has preempted it, and not asked for it since."""
        return self.request.num_preemptions != self.preemptions

    def lose_blocks(self) -> None:
        """Note a preemption: what was computed is to be computed again, and then saved again."""
        self.saved_chunks, self.saves, self.stale = None, False, False

    def __repr__(self) -> str:
        return f"<Record {self.request.request_id!r}, {self.stage.value}>"
