"""What was asked for, found, promised and loaded, by tenant and model."""

import logging
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from async_cache.metrics.histogram import Histogram
from async_cache.metrics.names import OTHER, Names
from async_cache.metrics.residence import Residence
from async_cache.read.request import Request
from async_cache.values import ChunkState, LoadResult, LookupHits, Missed, Removal

log = logging.getLogger(__name__)

_MAX_TENANTS = 32
_MAX_MODELS = 16
_MAX_PAIRS = 4096  # of names as clients say them: beyond that they are other
_FORGOTTEN = 0.01  # requests of late
_RECENT = 128  # requests that are shown


_DIVERGES = "diverges"
REASONS = (ChunkState.UNKNOWN.value, ChunkState.WRITING.value, _DIVERGES, *(removal.value for removal in Removal))
"""All that `why` may say."""


@dataclass(slots=True)  # of which CPython sets fields faster than those of a Struct
class Tokens:
    """The tokens of all requests of a tenant for a model: those asked for, and those promised, by tier."""

    requests: int = 0
    asked: int = 0
    l1_hits: int = 0
    l2_hits: int = 0


@dataclass(slots=True)
class Pair:
    """A tenant and a model by their own names: where they are counted, and how much that was of late."""

    tokens: Tokens
    recent: float = 0.0


class Loaded(NamedTuple):
    """A request that has loaded, or fell short of it: when it began, and when it was promised what, by the clock."""

    hits: LookupHits
    result: LoadResult
    model: str
    began: float
    promised_at: float
    asked_chunks: int


class Traffic:
    """Counts every request once, when its load is done.

    `tenant_of` gives the tenant of a request id. Whoever is not among those with the most traffic is "other": so the
    number of what is counted has a bound, whatever clients make up.
    """

    def __init__(self, residence: Residence, tenant_of: Callable[[str], str]):
        self.by_names: dict[tuple[str, str], Tokens] = {}
        """By tenant and model, as they are shown."""
        self._no_longer_shown = Tokens()
        self.lookup = Histogram()
        """Seconds from the request to its promise."""
        self.load = Histogram()
        """Seconds from the request to the end of its load, of those that had something to load."""
        self.gap = Histogram()
        """Seconds of those between promise and end: the time that a scheduler wins by asking twice."""
        self._recent: deque[tuple[LookupHits, LoadResult, str, float, float, int]] = deque(maxlen=_RECENT)
        self.missed: Counter[str] = Counter()
        """Requests by why their first missing chunk was missing: see `why`."""
        self.broken: Counter[str] = Counter()
        """Promises that were not, by the reason."""
        self.trimmed: Counter[str] = Counter()
        """Lookups that promised less than there is, by the reason."""
        self._residence = residence
        self._tenant_of = tenant_of
        self._tenants, self._models = Names(_MAX_TENANTS), Names(_MAX_MODELS)
        self._pairs: dict[tuple[str, str], Pair] = {}

    def count(self, request: Request, result: LoadResult) -> None:
        """Count a request whose load is done. It raises nothing, and takes a microsecond or so: each call costs."""
        try:
            hits, prompt = request.hits.value, request.prompt
            assert hits is not None  # it was promised something, or nothing
            layout, began, promised_at = prompt.layout, request.began, request.promised_at
            chunk_tokens = layout.chunk_tokens
            asked = prompt.chunks - request.start_chunk
            names = self._tenant_of(request.request_id), layout.model
            pair = self._pairs.get(names) or self._new_pair(names)
            pair.recent += 1
            tokens = pair.tokens
            tokens.requests += 1
            tokens.asked += asked * chunk_tokens
            tokens.l1_hits += hits.l1_chunks * chunk_tokens
            lookup, seconds = self.lookup, promised_at - began
            lookup.counts[bisect_left(lookup.bounds, seconds)] += 1
            lookup.total += seconds
            promised = hits.chunks
            if hits.l2_chunks:
                tokens.l2_hits += hits.l2_chunks * chunk_tokens
                self.load.observe(result.seconds)
                self.gap.observe(result.seconds - seconds)
            if result.chunks != promised:
                self.broken[result.shortfall.value if result.shortfall is not None else ""] += 1
            if promised != asked:
                if hits.shortfall is not None:
                    self.trimmed[hits.shortfall.value] += 1
                if hits.missed is not None:
                    self.missed[why(hits.missed)] += 1
            if prompt.known_hashes:
                self._residence.asked(prompt.known_hashes)
            self._recent.append((hits, result, layout.model, began, promised_at, asked))
        except Exception:  # it is called within a step of the cache, which goes on
            log.exception("a request could not be counted")

    @property
    def all(self) -> Tokens:
        """Those of all tenants and models since the beginning, whether they are still shown or not."""
        return _sum((self._no_longer_shown, *self.by_names.values()))

    @property
    def kept(self) -> int:
        """Promises that were kept."""
        return self.all.requests - self.broken.total()

    @property
    def recent(self) -> list[Loaded]:
        """The last requests that have loaded, the last one first."""
        return [Loaded(*loaded) for loaded in reversed(self._recent)]

    def rank(self) -> None:
        """See who has the most traffic of late: those are shown by their names from now on, each from 0 again."""
        by_tenant: defaultdict[str, float] = defaultdict(float)
        by_model: defaultdict[str, float] = defaultdict(float)
        for (tenant, model), pair in self._pairs.items():
            by_tenant[tenant] += pair.recent
            by_model[model] += pair.recent
        if self._tenants.rank(by_tenant) | self._models.rank(by_model):
            for names in [names for names in self.by_names if self._shown(names) != names]:
                self._no_longer_shown = _sum((self._no_longer_shown, self.by_names.pop(names)))
            for names, pair in self._pairs.items():
                pair.tokens = self._tokens_of(names)
        for names, pair in list(self._pairs.items()):
            pair.recent /= 2
            if pair.recent < _FORGOTTEN:
                del self._pairs[names]

    def _new_pair(self, names: tuple[str, str]) -> Pair:
        if len(self._pairs) >= _MAX_PAIRS:
            return Pair(self.by_names.setdefault((OTHER, OTHER), Tokens()))
        pair = self._pairs[names] = Pair(self._tokens_of(names))
        return pair

    def _tokens_of(self, names: tuple[str, str]) -> Tokens:
        return self.by_names.setdefault(self._shown(names), Tokens())

    def _shown(self, names: tuple[str, str]) -> tuple[str, str]:
        return self._tenants.show(names[0]), self._models.show(names[1])


def _sum(of: Iterable[Tokens]) -> Tokens:
    return Tokens(*map(sum, zip(*((t.requests, t.asked, t.l1_hits, t.l2_hits) for t in of), strict=True)))


def why(missed: Missed) -> str:
    """In a word, why a chunk is missing: why it was removed, that what is before it goes on otherwise, or its state."""
    return missed.removal or (_DIVERGES if missed.diverges else missed.state)
