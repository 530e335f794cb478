"""`PagedScheduler`: looks prompts up, decides when a load is worth its blocks, says what is to be saved."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from async_cache.client.blocking import BlockingClient, BlockingPrefetch
from async_cache.errors import AsyncCacheError
from async_cache.integrations.optional import OptionalClient
from async_cache.integrations.paged.orders import Complaint, Geometry, LoadOrder, Orders, SaveOrder, Tables
from async_cache.values import LoadResult

log = logging.getLogger(__name__)

Answer = tuple[int | None, bool]
"""Tokens to load beyond what the engine has, and whether that happens between steps. None: ask again."""

NOT_YET: Answer = (None, False)
NOTHING: Answer = (0, False)

_PATIENCE_SECONDS = 5.0  # so long others may take the blocks that a request is too large for
_FRESH_SECONDS = 30.0  # what was loaded longer ago is asked for anew: a server drops what nobody comes for


class EngineRequest(Protocol):
    """What is used of an engine's request."""

    request_id: str
    all_token_ids: Sequence[int]
    num_computed_tokens: int
    num_preemptions: int

    @property
    def num_tokens(self) -> int:
        """Of the prompt, and those generated so far."""


class Record:
    """A request: LOOKING (it has a `prefetch`) -> LOADING -> DONE, and back to LOOKING by a preemption."""

    __slots__ = (
        "asked_at", "first_token", "identity", "is_loading", "no_room_since", "offer_from", "offer_until",
        "preemptions", "prefetch", "request", "reserved_blocks", "saved_chunks", "saves",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, identity: Mapping[str, Any]):
        self.request = request
        self.identity = identity
        self.prefetch: BlockingPrefetch | None = None
        self.asked_at = 0.0
        self.preemptions = request.num_preemptions
        self.is_loading = False
        self.offer_from: float | None = None  # None until the hits are known
        self.offer_until = 0.0
        self.first_token = 0
        self.no_room_since: float | None = None
        self.reserved_blocks = 0  # that the engine will need for it when it has loaded
        self.saved_chunks: int | None = None  # None until it is computed
        self.saves = False


class PagedScheduler:
    """The scheduler's side of one engine. No call waits: each looks at futures, or leaves work to a thread.

    `threshold_seconds`: a load that is expected to end within it gets its blocks before it has ended.
    `free_blocks`: how many the engine has now. Whoever is offered a place and does not fit holds up all behind it.
    """

    def __init__(
        self,
        client: OptionalClient,
        geometry: Geometry,
        *,
        loads: bool = True,
        saves: bool = True,
        threshold_seconds: float = 0.1,
        free_blocks: Callable[[], float] = lambda: math.inf,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._client = client
        self._geometry = geometry
        self._layout = geometry.layout
        self._chunk_tokens = geometry.layout.chunk_tokens
        self._loads, self._saves = loads, saves
        self._threshold_seconds = threshold_seconds
        self._free_blocks = free_blocks
        self._reserved_blocks = 0
        self._block_tokens = [*{pages.table: pages.block_tokens for pages in geometry.pages}.values()]
        self._clock = clock
        self._records: dict[str, Record] = {}
        self._orders = Orders()
        self._finished: list[str] = []
        self._complaint = Complaint()
        self._opened()  # where there is no server, that is told now, and not with the first request

    def close(self) -> None:
        """Give back what is held, and close the client."""
        self._client.close()

    def _opened(self) -> BlockingClient | None:
        """The client, if there is one now: whatever the reason is that there is none, the engine goes on."""
        try:
            return self._client.get()
        except Exception as error:
            self._complaint.tell(error)
            return None

    # Looking up.

    def add(self, request: EngineRequest, identity: Mapping[str, Any], computed_tokens: int, *, load: bool) -> None:
        """A request that is new; the engine holds `computed_tokens` of it. `identity`: as for `ModelLayout.prompt`."""
        record = self._records[request.request_id] = Record(request, identity)
        if load and self._loads:
            self._look_up(record, computed_tokens)

    def _look_up(self, record: Record, computed_tokens: int) -> None:
        self._end(record)
        record.offer_from, record.asked_at = None, self._clock()
        chunk_tokens = self._chunk_tokens
        tokens = record.request.num_tokens - 1  # the last is computed, for what comes after it
        if tokens // chunk_tokens <= computed_tokens // chunk_tokens or (client := self._opened()) is None:
            return
        try:
            prompt = self._layout.prompt(record.request.all_token_ids[:tokens], **record.identity)
            record.prefetch = client.prefetch(prompt, skip_tokens=computed_tokens)
        except (AsyncCacheError, ValueError) as error:
            self._complaint.tell(error)

    def match(self, request: EngineRequest, computed_tokens: int) -> Answer:
        """What can be loaded beyond `computed_tokens`; asked in every step until the request is placed."""
        record = self._records.get(request.request_id)
        if record is None:
            return NOTHING
        if request.num_preemptions != record.preemptions:
            self._preempted(record, computed_tokens)
        prefetch = record.prefetch
        if prefetch is None or record.is_loading:
            return NOTHING
        if record.offer_from is None:
            if not prefetch.lookup_done.done():
                return NOT_YET
            self._looked_up(record, prefetch)
        assert record.offer_from is not None
        if not prefetch.load_done.done() and not record.offer_from <= self._clock() <= record.offer_until:
            return NOT_YET
        return self._offer(record, prefetch, computed_tokens)

    def _preempted(self, record: Record, computed_tokens: int) -> None:
        record.preemptions = record.request.num_preemptions
        record.is_loading = False
        record.saved_chunks = None
        if self._loads:
            self._look_up(record, computed_tokens)

    def _looked_up(self, record: Record, prefetch: BlockingPrefetch) -> None:
        """From when until when the load is expected to be short: an estimate that has failed is none."""
        expected = None
        if prefetch.lookup_done.exception() is None:
            expected = prefetch.lookup_done.result().expected_load_seconds
        now = self._clock()
        if expected is None:
            record.offer_from = record.offer_until = now + float("inf")
        else:
            record.offer_from = now + expected - self._threshold_seconds
            record.offer_until = now + expected + self._threshold_seconds

    def _offer(self, record: Record, prefetch: BlockingPrefetch, computed_tokens: int) -> Answer:
        future = prefetch.load_done if prefetch.load_done.done() else prefetch.lookup_done
        error = future.exception()
        if error is not None:
            self._complaint.tell(error)
            record.prefetch = None
            return NOTHING
        found = future.result()
        loaded_at = record.asked_at + (found.seconds if isinstance(found, LoadResult) else _FRESH_SECONDS)
        is_old = self._clock() - loaded_at > _FRESH_SECONDS
        if is_old or found.start_chunk * self._chunk_tokens > computed_tokens:  # the engine held more at that time
            self._look_up(record, computed_tokens)
            return NOT_YET if record.prefetch is not None else NOTHING
        tokens = (found.start_chunk + found.chunks) * self._chunk_tokens - computed_tokens
        if tokens <= 0 or not found.chunks:
            self._end(record)
            return NOTHING
        if not self._has_room(record, computed_tokens, computed_tokens + tokens):
            return NOT_YET
        record.first_token = computed_tokens
        return tokens, True

    def _has_room(self, record: Record, computed_tokens: int, end_token: int) -> bool:
        """Whether the engine has blocks for it, or has given them to others for long enough.

        As vLLM counts: all of it has to fit, and what is loaded has to leave what others that load will need.
        """
        held, free = self._blocks(computed_tokens), self._free_blocks()
        loaded, whole = self._blocks(end_token) - held, self._blocks(record.request.num_tokens) - held
        if whole <= free and loaded <= free - self._reserved_blocks:
            record.no_room_since = None
            return True
        now = self._clock()
        if record.no_room_since is None:
            record.no_room_since = now
        return now - record.no_room_since >= _PATIENCE_SECONDS

    def _blocks(self, tokens: int) -> int:
        return sum(-(-tokens // block_tokens) for block_tokens in self._block_tokens)

    def _reserve(self, record: Record, blocks: int) -> None:
        self._reserved_blocks += blocks - record.reserved_blocks
        record.reserved_blocks = blocks

    def place(self, request: EngineRequest, tables: Callable[[], Tables], tokens: int) -> None:
        """The request has got blocks, `tokens` of them to be loaded."""
        record = self._records.get(request.request_id)
        if record is None or record.prefetch is None or record.is_loading:
            return
        if not tokens:
            self._end(record)
            return
        record.is_loading = True
        end_token = record.first_token + tokens
        self._reserve(record, self._blocks(request.num_tokens) - self._blocks(end_token))
        self._orders.loads.append(
            LoadOrder(
                request.request_id,
                record.prefetch.request_id,
                record.first_token,
                end_token,
                tables(),
            )
        )

    def loaded(self, request_ids: Iterable[str]) -> None:
        """The workers have read, or failed to: what is not in the blocks is computed, and not looked for again."""
        for request_id in request_ids:
            record = self._records.get(request_id)
            if record is not None and record.is_loading:
                record.is_loading = False
                self._end(record)

    def finish(self, request_id: str) -> bool:
        """The request is over, or aborted; whether its blocks have to wait until the workers have saved them."""
        record = self._records.pop(request_id, None)
        if record is None:
            return False
        waits = record.saves and not record.is_loading
        if waits:
            self._finished.append(request_id)
        self._end(record)
        return waits

    def _end(self, record: Record) -> None:
        """Give back all that the prefetch holds, whatever its stage."""
        self._reserve(record, 0)
        prefetch, record.prefetch = record.prefetch, None
        if prefetch is not None and (client := self._opened()) is not None:
            client.end_request_nowait(prefetch.request_id)

    # Saving.

    def step(
        self,
        scheduled: Mapping[str, int],
        tables: Callable[[str], Tables | None],
        preempted: Iterable[str] = (),
    ) -> Orders:
        """The orders of a step that computes so many tokens of each request."""
        orders, self._orders = self._orders, Orders()
        orders.preempted = list(preempted)
        orders.finished, self._finished = self._finished, []
        for request_id in orders.preempted:
            record = self._records.get(request_id)
            if record is not None:
                record.saved_chunks, record.saves = None, False
        if self._saves:
            for request_id, tokens in scheduled.items():
                record = self._records.get(request_id)
                if record is not None:
                    self._save(record, tokens, tables, orders)
        return orders

    def _save(self, record: Record, tokens: int, tables: Callable[[str], Tables | None], orders: Orders) -> None:
        request = record.request
        computed = request.num_computed_tokens
        if record.saved_chunks is None:
            record.saved_chunks = computed // self._chunk_tokens  # what the engine had, it has saved
        end_chunk = min(computed + tokens, request.num_tokens) // self._chunk_tokens
        start_chunk = record.saved_chunks
        if end_chunk <= start_chunk or self._opened() is None:  # once there is a server, all of them
            return
        record.saved_chunks = end_chunk
        blocks = tables(request.request_id)
        if blocks is None:
            return
        try:
            tokens_in_chunks = request.all_token_ids[: end_chunk * self._chunk_tokens]
            prompt = self._layout.prompt(tokens_in_chunks, **record.identity)
        except ValueError as error:
            self._complaint.tell(error)
            return
        record.saves = True
        orders.saves.append(SaveOrder(request.request_id, prompt, start_chunk, blocks))
