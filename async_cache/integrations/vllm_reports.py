"""What vLLM's connector tells its engine: where chunks are, for routers; what was hit, for its log and its metrics."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, BlockRemoved, BlockStored, KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash, resolve_kv_cache_block_sizes
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.metrics.utils import create_metric_per_engine

from async_cache.integrations.paged.reports import BlockEvents, Blocks, Counts
from async_cache.integrations.paged.scheduler import PagedScheduler
from async_cache.values import Removed, Stored

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

_MEDIUM = {"l1": MEDIUM_CPU, "l2": MEDIUM_STORAGE}
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Stats(KVConnectorStats):  # type: ignore[misc]
    """Counts of an interval, as `Counts` has them."""

    def __init__(self, data: dict[str, Any] | None = None):
        super().__init__(data if data is not None else asdict(Counts()))

    def reset(self) -> None:
        """Begin anew."""
        self.data = asdict(Counts())

    def aggregate(self, other: KVConnectorStats) -> "Stats":
        """Add those of another interval."""
        for name, value in other.data.items():
            if isinstance(value, dict):
                mine = self.data[name]
                for reason, count in value.items():
                    mine[reason] = mine.get(reason, 0) + count
            else:  # a number or a list
                self.data[name] = self.data[name] + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """What vLLM logs."""
        data = self.data
        seconds = data["load_seconds"]
        hits = data["l1_tokens"] + data["l2_tokens"]
        told = {
            "async_cache lookups": data["lookups"],
            "hit tokens": hits,
            "hit rate (%)": round(100 * hits / data["asked_tokens"], 1) if data["asked_tokens"] else 0.0,
            "avg load (ms)": round(1000 * sum(seconds) / len(seconds), 1) if seconds else 0.0,
        }
        return told | {f"missed: {reason}": count for reason, count in sorted(data["missed"].items())}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not (self.data["lookups"] or self.data["load_seconds"])


class PromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The same as metrics of Prometheus, beside vLLM's own."""

    def __init__(
        self, vllm_config: "VllmConfig", metric_types: Any, labels: list[str], engines: dict[int, list[object]]
    ):
        super().__init__(vllm_config, metric_types, labels, engines)
        self._asked = self._counter("asked_tokens", "Prompt tokens that were looked up in async_cache.")
        self._hits = self._counter("hit_tokens", "Prompt tokens that async_cache has loaded, by tier.", "tier")
        self._missed = self._counter("missed", "Lookups that found less than all, by the reason.", "reason")
        self._shortfalls = self._counter("shortfalls", "Loads that brought less than was promised, by why.", "reason")
        seconds = self._histogram_cls(
            name="vllm:async_cache_load_seconds",
            documentation="Seconds from a prefetch to the end of its load.",
            buckets=_SECONDS,
            labelnames=labels,
        )
        self._seconds = create_metric_per_engine(seconds, engines)

    def _counter(self, name: str, documentation: str, *more: str) -> Any:
        return self._counter_cls(
            name=f"vllm:async_cache_{name}", documentation=documentation, labelnames=[*self._labelnames, *more]
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Count an interval of an engine."""
        data, labels = transfer_stats_data, self.per_engine_labelvalues[engine_idx]
        self._asked.labels(*labels).inc(data["asked_tokens"])
        for tier in ("l1", "l2"):
            self._hits.labels(*labels, tier).inc(data[f"{tier}_tokens"])
        for counter, name in ((self._missed, "missed"), (self._shortfalls, "shortfalls")):
            for reason, count in data[name].items():
                counter.labels(*labels, reason).inc(count)
        for seconds in data["load_seconds"]:
            self._seconds[engine_idx].observe(seconds)


class ReportingConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """The part of the connector that tells: of its scheduler, once there is one."""

    _scheduler: PagedScheduler | None
    _events: BlockEvents | None = None

    def take_events(self) -> Iterable[KVCacheEvent]:
        """What was stored in the server's memory or storage, or removed, since the last time.

        Of blocks that requests of this engine have had: what only others have had, it cannot name.
        """
        if self._events is None or self._scheduler is None:
            return ()
        self._events.listen(self._scheduler.client())
        return [self._told(event, blocks) for event, blocks in self._events.take()]

    def _told(self, event: Stored | Removed, blocks: Blocks) -> KVCacheEvent:
        hashes = [maybe_convert_block_hash(block) for block in blocks.hashes]
        medium = _MEDIUM[event.tier]
        group = 0 if len(self._kv_cache_config.kv_cache_groups) == 1 else None
        if isinstance(event, Removed):
            return BlockRemoved(block_hashes=hashes, medium=medium, group_idx=group)
        return BlockStored(
            block_hashes=hashes,
            parent_block_hash=maybe_convert_block_hash(blocks.parent) if blocks.parent is not None else None,
            token_ids=list(blocks.tokens),
            block_size=len(blocks.tokens) // len(hashes),
            medium=medium,
            group_idx=group,
            **blocks.about,
        )

    def get_kv_connector_stats(self) -> Stats | None:
        """What was asked for and found since the last time; of the scheduler's side."""
        counts = self._scheduler.tally.take() if self._scheduler is not None else None
        return Stats(asdict(counts)) if counts is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats | None:
        """The counts that have come from another process."""
        return Stats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: "VllmConfig",
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromMetrics:
        """The metrics that vLLM serves."""
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def get_external_cache_hit_sources(self, request: "Request", num_external_tokens: int) -> dict[CacheHitSource, int]:
        """How many of the tokens that are loaded were in the server's memory, and how many in its storage."""
        if not num_external_tokens or self._scheduler is None:
            return {}
        stored = self._scheduler.from_l2(request.request_id, num_external_tokens)
        sources = {CacheHitSource.HOST: num_external_tokens - stored, CacheHitSource.DISK: stored}
        return {source: tokens for source, tokens in sources.items() if tokens}


def block_events(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", chunk_tokens: int) -> BlockEvents | None:
    """The events for a scheduler, if vLLM publishes any, and its blocks fit our chunks."""
    wanted = getattr(vllm_config, "kv_events_config", None)
    if wanted is None or not wanted.enable_kv_cache_events:
        return None
    _, block_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    return BlockEvents(block_tokens, chunk_tokens, _about) if chunk_tokens % block_tokens == 0 else None


def _about(request: "Request") -> dict[str, Any]:
    """What vLLM tells of a request's blocks beside their tokens."""
    lora = request.lora_request
    return {
        "lora_id": lora.adapter_id if lora is not None else None,
        "lora_name": lora.name if lora is not None else None,
    }
