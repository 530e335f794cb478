"""`PagedScheduler`: looks prompts up, decides when a load is worth its blocks, says what is to be saved."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from async_cache.advice import Adviser, Pace
from async_cache.client.blocking import BlockingClient
from async_cache.client.prefetches import BlockingFuture, BlockingPrefetch
from async_cache.errors import AsyncCacheError
from async_cache.integrations.optional import OptionalClient
from async_cache.integrations.paged.orders import Complaint, Geometry, LoadOrder, Orders, SaveOrder, Tables
from async_cache.integrations.paged.records import EngineRequest, Record, Stage
from async_cache.integrations.paged.reports import Tally
from async_cache.integrations.paged.resets import Resets
from async_cache.integrations.paged.saves import SavesUnderWay
from async_cache.integrations.paged.wishes import NOTHING as NO_WISHES
from async_cache.integrations.paged.wishes import Wishes
from async_cache.prompt.layout import Prompt
from async_cache.values import LoadResult, LookupHits, Retained

log = logging.getLogger(__name__)

T = TypeVar("T")

Answer = tuple[int | None, bool]
"""Tokens to load beyond what the engine has, and whether that happens between steps. None: ask again."""

NOT_YET: Answer = (None, False)
NOTHING: Answer = (0, False)

_LOOKUP_SECONDS = 2.0  # no request waits for longer: by default, a server gives a backend one second
_LAST_CHANCE_SECONDS = 0.1  # where this process was held up, the answer is there, unread
_OFFER_SECONDS = 30.0  # so often what the engine holds is offered to the server, which may have lost it
_MAX_OFFERED = 4096
_PATIENCE_SECONDS = 2.0  # so long others may take the blocks that a request is too large for
_FRESH_SECONDS = 30.0  # what was loaded longer ago is asked for anew: a server drops what nobody comes for


class PagedScheduler:
    """The scheduler's side of one engine. No call waits but `reset`: each looks at futures, or leaves work to a thread.

    `threshold_seconds`: a load that is expected to end within it gets its blocks before it has ended.
    `known` is told of the prompt of a request, as far as it is looked up or saved.
    `advises`: what is expected to be computed faster than it is loaded, at the pace that the engine is measured at, is
    not loaded; else that is so where the server says so.
    `free_blocks`: how many the engine has now. A request that is offered a place and does not fit delays all behind it.
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
        known: Callable[[Any, Prompt], None] | None = None,
        advises: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._client = client
        self._geometry = geometry
        self._layout = geometry.layout
        self._chunk_tokens = geometry.layout.chunk_tokens
        self._loads, self._saves = loads, saves
        self._threshold_seconds = threshold_seconds
        self._free_blocks = free_blocks
        self._known = known
        self.tally = Tally()
        """What lookups and loads came to."""
        self._clock = clock
        self._pace = Pace(clock) if advises else None
        self._adviser = Adviser(0, clock)
        self._records: dict[str, Record] = {}
        self._arriving: dict[Record, int] = {}  # placed and not computed yet, with the blocks that they will need
        self._orders = Orders()
        self._finished: list[str] = []
        self._sending: set[str] = set()  # finished, and not saved yet
        self._to_keep: dict[str, list[tuple[Prompt, float]]] = {}  # of these, for so many seconds
        self._offered: dict[bytes, float] = {}  # when, by the last chunk of what the engine held
        self._complaint = Complaint()
        self._under_way = SavesUnderWay(self._layout.world_size)
        self._resets = Resets(client, self._under_way)
        self._opened()  # where there is no server, that is logged now, and not with the first request

    def close(self) -> None:
        """Close the client; the server releases what is held."""
        self._client.close()
        self._resets.close()
        self._under_way.close()

    def reset(self) -> bool:
        """Empty the server, of all who use it, once the saves under way have ended. Whether that was done.

        True also where there is no server. Until it is emptied, this engine neither loads nor saves. What it has
        computed or loaded before, and still holds, is not saved.
        """
        for record in self._records.values():
            if record.stage is not Stage.LOADING:
                self._end(record)
            if record.is_preempted:
                record.lose_blocks()
            elif record.stage is Stage.LOADING or record.saved_chunks or record.request.num_computed_tokens:
                record.stale = True
        self._offered.clear()
        return self._resets.reset()

    def _opened(self) -> BlockingClient | None:
        """The client, if it may be used: whatever the reason is that there is none, the engine goes on."""
        try:
            client = self._client.get()
            return client if self._resets.are_done(client) else None
        except Exception as error:
            self._complaint.log(error)
            self._offered.clear()
            return None

    def _prompt(self, record: Record, tokens: int) -> Prompt:
        identity = dict(record.identity)
        media = identity.pop("media", ())
        ids = record.request.all_token_ids[:tokens]
        return self._layout.prompt(ids, media=[item for item in media if item[0] < tokens], **identity)

    # Looking up.

    def add(self, request: EngineRequest, identity: Mapping[str, Any], computed_tokens: int, *, load: bool) -> None:
        """Begin with a new request, of which the engine holds `computed_tokens`: look it up, where it may `load`.

        `identity` has the keyword arguments of `ModelLayout.prompt`: `salt`, `adapter` and `media`. Another request of
        this id that has not ended is ended.
        """
        before = self._records.pop(request.request_id, None)
        if before is not None:
            self._release(before)
        record = self._records[request.request_id] = Record(request, identity, loads=load and self._loads)
        self._look_up(record, computed_tokens)

    def _look_up(self, record: Record, computed_tokens: int, most_tokens: int | None = None) -> None:
        self._end(record)
        tokens = record.request.num_tokens - 1  # the last is computed, for what comes after it
        if most_tokens is not None:
            tokens = min(tokens, most_tokens)
        if not record.loads or tokens // self._chunk_tokens <= computed_tokens // self._chunk_tokens:
            return
        client = self._opened()
        if client is None:
            return
        try:
            prompt = self._prompt(record, tokens)
            record.heard = client.heard()
            record.fresh_seconds = min(_FRESH_SECONDS, client.result_ttl_seconds / 2)
            record.prefetch = client.prefetch(prompt, skip_tokens=computed_tokens)
            record.asked_tokens = tokens
            record.stage = Stage.LOOKING
            self.tally.follow(record.prefetch, prompt.tokens - computed_tokens)
            self._tell_known(record, prompt)
        except (AsyncCacheError, ValueError) as error:
            self._complaint.log(error)
        record.asked_at, record.give_up_at = self._clock(), None

    def _tell_known(self, record: Record, prompt: Prompt) -> None:
        if self._known is not None:
            self._known(record.request, prompt)

    def match(self, request: EngineRequest, computed_tokens: int) -> Answer:
        """What can be loaded beyond `computed_tokens`; to be asked in every step until the request is placed."""
        record = self._records.get(request.request_id)
        if record is None:
            return NOTHING
        if record.is_preempted:
            self._preempted(record, computed_tokens)
        prefetch = record.prefetch
        if prefetch is None or record.stage is not Stage.LOOKING:
            return NOTHING
        if record.result is None:
            if prefetch.load_done.done():
                record.result = self._outcome(record, prefetch.load_done)
            elif not prefetch.lookup_done.done():
                return self._still_looking(record)
            else:
                ends_soon = self._ends_soon(record, prefetch)
                if record.advised is not None:  # that is faster than to load it
                    self._look_up(record, computed_tokens, record.advised * self._chunk_tokens)
                    return NOT_YET if record.stage is Stage.LOOKING else NOTHING
                if not ends_soon:
                    return NOT_YET
        found = record.result or record.hits
        return self._offer(record, found, computed_tokens) if found is not None else NOTHING

    def _preempted(self, record: Record, computed_tokens: int) -> None:
        record.preemptions = record.request.num_preemptions
        record.saved_chunks = None
        record.stale = False
        self._look_up(record, computed_tokens)

    def _outcome(self, record: Record, future: BlockingFuture[T]) -> T | None:
        error = future.exception()
        if error is None:
            return future.result()
        self._complaint.log(error)
        self._end(record)
        return None

    def _still_looking(self, record: Record) -> Answer:
        """No request waits long for its lookup. A server that has said nothing at all is left alone."""
        now = self._clock()
        if now - record.asked_at < _LOOKUP_SECONDS:
            return NOT_YET
        if record.give_up_at is None:
            record.give_up_at = now + _LAST_CHANCE_SECONDS
        if now < record.give_up_at:
            return NOT_YET
        error = TimeoutError(f"the server has not answered a lookup within {_LOOKUP_SECONDS} s")
        self._complaint.log(error)
        self._end(record)
        if self._client.heard() == record.heard:
            self._client.failed(error)
        return NOTHING

    def _ends_soon(self, record: Record, prefetch: BlockingPrefetch) -> bool:
        """Whether the load is expected to be short now: an estimate that has failed is none."""
        now = self._clock()
        if record.hits is None:
            record.hits = hits = self._outcome(record, prefetch.lookup_done)
            record.advised = self._advised(hits, record.asked_tokens) if hits is not None else None
            if hits is None or hits.expected_load_seconds is None:
                record.offer_from = math.inf
            else:
                record.offer_from = now + hits.expected_load_seconds - self._threshold_seconds
                record.offer_until = now + hits.expected_load_seconds + self._threshold_seconds
        return record.offer_from <= now <= record.offer_until

    def _advised(self, hits: LookupHits, asked_tokens: int) -> int | None:
        """The chunk from which on it is faster to compute than to load, by the server or by this engine's own pace."""
        if hits.recompute_from is not None or self._pace is None:
            return hits.recompute_from
        self._adviser.tokens_per_second = self._pace.tokens_per_second
        to_load = range(hits.l1_chunks, hits.chunks)  # as if all that is in memory came first
        missing_tokens = asked_tokens - (hits.start_chunk + hits.chunks) * self._chunk_tokens
        return self._adviser.recompute_from(
            hits.start_chunk, to_load, hits.chunks, self._chunk_tokens, hits.expected_load_seconds, missing_tokens
        )

    def _offer(self, record: Record, found: LookupHits | LoadResult, computed_tokens: int) -> Answer:
        loaded_seconds = found.seconds if isinstance(found, LoadResult) else _FRESH_SECONDS
        is_old = self._clock() - record.asked_at - loaded_seconds > record.fresh_seconds
        if is_old or found.start_chunk * self._chunk_tokens > computed_tokens:  # the engine held more at that time
            self._look_up(record, computed_tokens)
            return NOT_YET if record.stage is Stage.LOOKING else NOTHING
        tokens = (found.start_chunk + found.chunks) * self._chunk_tokens - computed_tokens
        if tokens <= 0 or not found.chunks:
            self._end(record)
            return NOTHING
        if self._arriving and not self._has_room(record, computed_tokens, computed_tokens + tokens):
            return NOT_YET
        record.first_token = computed_tokens
        return tokens, True

    def _has_room(self, record: Record, computed_tokens: int, end_token: int) -> bool:
        """Whether the engine has blocks for it beside those that arrive, or has given them to others for long enough.

        As vLLM counts: all of it has to fit, and what is loaded has to leave what the others will need.
        """
        if record.needs[0] != computed_tokens:
            blocks = self._geometry.blocks
            held = blocks(computed_tokens)
            record.needs = (computed_tokens, blocks(record.request.num_tokens) - held, blocks(end_token) - held)
        _, whole, loaded = record.needs
        free = self._free_blocks()
        if whole <= free and loaded <= free - sum(self._arriving.values()):
            record.no_room_since = None
            return True
        if record.no_room_since is None:
            record.no_room_since = self._clock()
        return self._clock() - record.no_room_since >= _PATIENCE_SECONDS

    # Placed, until it is over.

    def place(self, request: EngineRequest, tables: Callable[[], Tables], tokens: int) -> None:
        """Note that the request has got blocks, and order the load of `tokens` into them."""
        record = self._records.get(request.request_id)
        if record is None:
            return
        if record in self._arriving:  # it has loaded, and got the blocks of the rest
            self._arriving[record] = 0
        if record.prefetch is None or record.stage is not Stage.LOOKING:
            return
        record.no_room_since = None
        if not tokens:
            self._end(record)
            return
        record.stage = Stage.LOADING
        first_token, end_token = record.first_token, record.first_token + tokens
        self._arriving[record] = self._geometry.blocks(request.num_tokens) - self._geometry.blocks(end_token)
        self._orders.loads.append(
            LoadOrder(request.request_id, record.prefetch.request_id, first_token, end_token, tables())
        )

    def from_l2(self, request_id: str, tokens: int) -> int:
        """How many of the tokens that are being loaded for a request were not in the server's memory."""
        record = self._records.get(request_id)
        found = None if record is None else record.result or record.hits
        return min(tokens, found.l2_chunks * self._chunk_tokens) if found is not None else tokens

    def client(self) -> BlockingClient | None:
        """The client, if there is a server."""
        return self._opened()

    def loaded(self, request_ids: Iterable[str]) -> None:
        """Note what the workers have read, or failed to: the rest is computed, and not looked for again."""
        for request_id in request_ids:
            record = self._records.get(request_id)
            if record is not None and record.stage is Stage.LOADING:
                self._end(record)

    def finish(self, request_id: str, *, prompt_tokens: int | None = None, wishes: Wishes = NO_WISHES) -> bool:
        """End a request, done or aborted; whether its blocks have to wait until the workers have saved them.

        `prompt_tokens`: so long was its prompt; what follows was generated, which the server is told as a hint. What it
        wishes to be kept is kept when it is saved.
        """
        record = self._records.pop(request_id, None)
        if record is None:
            return request_id in self._sending
        waits = record.saves and record.stage is not Stage.LOADING
        if waits:
            self._finished.append(request_id)
            self._sending.add(request_id)
        if prompt_tokens is not None:
            self._hint(record, prompt_tokens, wishes)
            self._keep(record, prompt_tokens, wishes, saves_first=waits)
        self._release(record)
        return waits

    def _hint(self, record: Record, prompt_tokens: int, wishes: Wishes) -> None:
        client, output_tokens = self._opened(), record.request.num_tokens - prompt_tokens
        if client is not None and prompt_tokens >= self._chunk_tokens:
            try:
                client.hint_nowait(
                    self._prompt(record, prompt_tokens),
                    output_tokens=output_tokens,
                    returns=wishes.returns,
                    within_seconds=wishes.within_seconds,
                )
            except (AsyncCacheError, ValueError) as error:
                self._complaint.log(error)

    def _keep(self, record: Record, prompt_tokens: int, wishes: Wishes, *, saves_first: bool) -> None:
        """Have the server keep what a request wishes, when it has been saved: before, it is not there."""
        for wish in wishes.retain:
            tokens = prompt_tokens if wish.tokens is None else min(wish.tokens, prompt_tokens)
            try:
                kept = self._prompt(record, tokens), wish.ttl_seconds
            except (AsyncCacheError, ValueError) as error:
                self._complaint.log(error)
                continue
            if saves_first:
                self._to_keep.setdefault(record.request.request_id, []).append(kept)
            else:
                self._retain(*kept)

    def _retain(self, prompt: Prompt, ttl_seconds: float) -> None:
        client = self._opened()
        if client is not None:
            try:
                client.retain_nowait(prompt, ttl_seconds=ttl_seconds, told=_log_clipped)
            except (AsyncCacheError, ValueError) as error:
                self._complaint.log(error)

    def sent(self, request_ids: Iterable[str]) -> None:
        """Note finished requests that the workers have saved."""
        for request_id in request_ids:
            self._sending.discard(request_id)
            for prompt, ttl_seconds in self._to_keep.pop(request_id, ()):
                self._retain(prompt, ttl_seconds)

    def _release(self, record: Record) -> None:
        """Let go of all that is held or expected for a request that is over."""
        self._arriving.pop(record, None)
        self._end(record)

    def _end(self, record: Record) -> None:
        """Release all that the prefetch holds, whatever its stage."""
        record.stage, record.advised = Stage.DONE, None
        prefetch, record.prefetch = record.prefetch, None
        record.hits = record.result = None
        record.needs = (-1, 0, 0)
        if prefetch is not None:
            self._client.end_request_nowait(prefetch.request_id)

    # Saving.

    def step(
        self,
        scheduled: Mapping[str, int],
        tables: Callable[[str], Tables | None],
        preempted: Iterable[str] = (),
    ) -> Orders:
        """The orders of a step that computes so many tokens of each request."""
        orders, self._orders = self._orders, Orders()
        if self._pace is not None:
            self._pace.step(sum(scheduled.values()))
        orders.preempted = list(preempted)
        orders.finished, self._finished = self._finished, []
        for request_id in orders.preempted:
            record = self._records.get(request_id)
            if record is not None:
                record.lose_blocks()
                self._arriving.pop(record, None)
        for request_id, tokens in scheduled.items():
            record = self._records.get(request_id)
            if record is None:
                continue
            end_token = min(record.request.num_computed_tokens + tokens, record.request.num_tokens)
            if end_token == record.request.num_tokens:
                self._arriving.pop(record, None)
            if self._saves and not record.stale and end_token // self._chunk_tokens > (record.saved_chunks or 0):
                self._save(record, end_token // self._chunk_tokens, tables, orders)
        return orders

    def _save(self, record: Record, end_chunk: int, tables: Callable[[str], Tables | None], orders: Orders) -> None:
        """Order the chunks up to there to be saved, as far as they were not. Without a server, that is for later."""
        request_id = record.request.request_id
        blocks = tables(request_id) if self._opened() is not None else None
        if blocks is None:
            return
        start_chunk, record.saved_chunks = record.saved_chunks, end_chunk
        try:
            prompt = self._prompt(record, end_chunk * self._chunk_tokens)
        except ValueError as error:
            self._complaint.log(error)
            return
        self._tell_known(record, prompt)
        if start_chunk is None:
            start_chunk = self._first_chunk(prompt, record.request.num_computed_tokens // self._chunk_tokens)
        if start_chunk < end_chunk:
            record.saves = True
            orders.saves.append(SaveOrder(request_id, prompt, start_chunk, blocks, self._under_way.begin()))

    def _first_chunk(self, prompt: Prompt, held_chunks: int) -> int:
        """The chunk to save first. What the engine held is saved too, now and then: a new server lacks it.

        An engine that counts what it expects to be computed may count more than there is.
        """
        held_chunks = min(held_chunks, len(prompt))
        if not held_chunks:
            return 0
        last, now = prompt.chunk_hashes[held_chunks - 1], self._clock()
        if now - self._offered.get(last, -math.inf) < _OFFER_SECONDS:
            return held_chunks
        if len(self._offered) >= _MAX_OFFERED:
            self._offered.clear()
        self._offered[last] = now
        return 0


def _log_clipped(kept: Retained) -> None:
    if kept.clipped is not None:
        log.info("%d chunks of a prompt are kept, less than its request asked for: %s", kept.chunks, kept.clipped.value)
