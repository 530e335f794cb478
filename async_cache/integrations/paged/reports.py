"""What a scheduler tells of its requests, and what there is to tell of the chunks that they have: for its engine."""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol

from async_cache.client.blocking import BlockingClient
from async_cache.client.handles import BlockingEvents
from async_cache.client.prefetches import BlockingPrefetch
from async_cache.errors import AsyncCacheError
from async_cache.integrations.paged.records import EngineRequest
from async_cache.prompt.layout import Prompt
from async_cache.values import LoadResult, LookupHits, Removal, Removed, Skipped, Stored, Tier

MOST_KNOWN = 16_384  # chunks, of 256 tokens: 20 MiB
_AT_ONCE = 256  # events of a step of the engine
_MOST_SECONDS = 4096  # loads of which the time is kept until it is asked for


@dataclass
class Counts:
    """What was asked for and found in an interval."""

    lookups: int = 0
    asked_tokens: int = 0
    l1_tokens: int = 0
    l2_tokens: int = 0
    missed: dict[str, int] = field(default_factory=dict)  # by the reason of the first chunk that is missing
    shortfalls: dict[str, int] = field(default_factory=dict)
    load_seconds: list[float] = field(default_factory=list)


class Tally:
    """Counts what lookups and loads came to, in whatever thread they end."""

    def __init__(self) -> None:
        self._counts = Counts()
        self._lock = Lock()

    def follow(self, prefetch: BlockingPrefetch, asked_tokens: int) -> None:
        """Count a prefetch, when it has ended."""
        prefetch.lookup_done.add_done_callback(lambda future: self._looked_up(future, asked_tokens))
        prefetch.load_done.add_done_callback(self._loaded)

    def _looked_up(self, future: "Future[LookupHits]", asked_tokens: int) -> None:
        if future.cancelled() or future.exception() is not None:
            return
        missed = future.result().missed
        with self._lock:
            counts = self._counts
            counts.lookups += 1
            counts.asked_tokens += asked_tokens
            if missed is not None:
                _add(counts.missed, (missed.removal or missed.state).value)
                if missed.diverges:
                    _add(counts.missed, "diverges")

    def _loaded(self, future: "Future[LoadResult]") -> None:
        if future.cancelled() or future.exception() is not None:
            return
        result = future.result()
        with self._lock:
            counts = self._counts
            if result.chunks:
                chunk_tokens = result.tokens // result.chunks
                counts.l1_tokens += result.l1_chunks * chunk_tokens
                counts.l2_tokens += result.l2_chunks * chunk_tokens
            if result.shortfall is not None:
                _add(counts.shortfalls, result.shortfall.value)
            if len(counts.load_seconds) < _MOST_SECONDS:
                counts.load_seconds.append(result.seconds)

    def take(self) -> Counts | None:
        """What was counted since the last time; None where nothing was."""
        with self._lock:
            counts, self._counts = self._counts, Counts()
        return counts if counts.lookups or counts.load_seconds else None


def _add(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


# Events.


class BlockRequest(EngineRequest, Protocol):
    """A request that knows its engine's hashes of blocks, whatever these are."""

    block_hashes: Sequence[Any]


@dataclass
class Blocks:
    """A chunk, as its engine would tell of it: the blocks that it consists of, the one before them, their tokens."""

    hashes: Sequence[Any]
    parent: Any
    tokens: "array[int]"
    about: Any  # what else the engine wants to say of it, from the first request that had it
    places: set[tuple[Tier, str | None]] = field(default_factory=set)


class BlockEvents:
    """Events of the server, as those of the blocks that requests of this engine have had.

    What others have stored, this engine cannot name. `about` picks what to keep of a request.
    """

    def __init__(self, block_tokens: int, chunk_tokens: int, about: Callable[[Any], Any], most: int = MOST_KNOWN):
        self._block_tokens = block_tokens
        self._chunk_tokens = chunk_tokens
        self._about = about
        self._most = most
        self._known: OrderedDict[bytes, Blocks] = OrderedDict()
        self._stream: BlockingEvents | None = None
        self.skipped = 0
        """Events that came too fast, so far."""

    def know(self, request: BlockRequest, prompt: Prompt) -> None:
        """Know the chunks of a request's prompt, so far as its blocks have hashes."""
        known, blocks = self._known, self._chunk_tokens // self._block_tokens
        hashes = prompt.chunk_hashes
        count = min(len(hashes), len(request.block_hashes) // blocks)
        new = count
        while new and hashes[new - 1] not in known:
            new -= 1
        about = self._about(request) if new < count else None
        for n in range(new, count):
            ids = request.all_token_ids[n * self._chunk_tokens : (n + 1) * self._chunk_tokens]
            parent = request.block_hashes[n * blocks - 1] if n else None
            known[hashes[n]] = Blocks(
                request.block_hashes[n * blocks : (n + 1) * blocks], parent, array("I", ids), about
            )
        while len(known) > self._most:
            known.popitem(last=False)

    def listen(self, client: BlockingClient | None) -> None:
        """Take events of this client from now on, if none are taken yet."""
        if self._stream is None and client is not None:
            with suppress(AsyncCacheError):  # the next step tries again
                self._stream = client.events()

    def take(self) -> Iterator[tuple[Stored | Removed, Blocks]]:
        """The next events of known chunks. When the server is gone, what it had is removed."""
        if self._stream is None:
            return
        try:
            events = self._stream.take(_AT_ONCE)
        except AsyncCacheError:
            self._stream = None
            yield from self._gone()
            return
        for event in events:
            if isinstance(event, Skipped):
                self.skipped += event.count
                continue
            blocks = self._known.get(event.chunk_hash)
            if blocks is not None and self._is_news(event, blocks):
                yield event, blocks

    @staticmethod
    def _is_news(event: Stored | Removed, blocks: Blocks) -> bool:
        """Note where a chunk is now; whether that is another tier than before: an engine knows no backends."""
        before = any(tier == event.tier for tier, _ in blocks.places)
        if isinstance(event, Stored):
            blocks.places.add((event.tier, event.backend))
            return not before
        blocks.places.discard((event.tier, event.backend))
        return not any(tier == event.tier for tier, _ in blocks.places)

    def _gone(self) -> Iterator[tuple[Stored | Removed, Blocks]]:
        for chunk_hash, blocks in self._known.items():
            places, blocks.places = blocks.places, set()
            for tier in {tier for tier, _ in places}:
                yield Removed(chunk_hash, tier, None, Removal.LOST), blocks
