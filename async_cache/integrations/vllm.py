"""vLLM's connector, for vLLM 0.32: prompts are loaded while others run, chunks are saved behind the steps.

    --kv-transfer-config '{"kv_connector": "AsyncCacheConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "async_cache.integrations.vllm", "kv_load_failure_policy": "recompute"}'

`docs/vllm.md` has the options. What cannot be used is one line in the log, and vLLM serves on without the cache.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.kv_cache_interface import group_kernel_blocks

from async_cache.client.blocking import BlockingClient
from async_cache.client.connecting import connect
from async_cache.errors import AsyncCacheError
from async_cache.integrations.optional import OptionalClient
from async_cache.integrations.paged import (
    AbsentWorker,
    Device,
    Geometry,
    HostDevice,
    Orders,
    PagedScheduler,
    PagedWorker,
    Pages,
    Tables,
)
from async_cache.integrations.paged.cuda import CudaDevice
from async_cache.integrations.vllm_layouts import (
    Options,
    block_tokens_of,
    context_of,
    falls_short_by_blocks,
    geometry,
    identity,
    place_of,
    ranks_of,
    stage_of,
    wishes,
    with_exact_states,
)
from async_cache.integrations.vllm_reports import ReportingConnector, block_events

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger(__name__)


@dataclass
class Metadata(KVConnectorMetadata):  # type: ignore[misc]
    """The orders of a step, on their way to the workers."""

    orders: Orders


class AsyncCacheConnector(ReportingConnector, SupportsHMA):  # type: ignore[misc]
    """The connector's two sides: vLLM makes one in its scheduler, and one in each worker."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"):
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: PagedScheduler | None = None
        self._worker: PagedWorker | AbsentWorker | None = None
        self._geometry: Geometry | None = None
        self._failed_blocks: set[int] = set()
        self._told_embeds = False
        _log_as_vllm()
        stage = 0
        try:
            self._options = msgspec.convert(self._kv_transfer_config.kv_connector_extra_config, Options)
            stage = stage_of(vllm_config) if role is KVConnectorRole.WORKER else 0
            self._geometry = geometry(vllm_config, kv_cache_config, self._options, stage)
            if role is KVConnectorRole.SCHEDULER:
                self._events = block_events(vllm_config, kv_cache_config, self._options.chunk_tokens)
                self._scheduler = self._open_scheduler(self._geometry)
        except Exception as error:  # whatever it is, vLLM starts
            if role is KVConnectorRole.SCHEDULER or stage:  # which knows more of its layers
                _complain(error)

    @property
    def requires_kv_delivery(self) -> bool:
        """A chunk that is not saved is a miss later on, no fault."""
        return False

    def shutdown(self) -> None:
        """Close the clients."""
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()

    # The scheduler's side.

    def _open_scheduler(self, where: Geometry) -> PagedScheduler:
        transfer, options = self._kv_transfer_config, self._options
        client = OptionalClient(lambda: BlockingClient(options.url, options.namespace, token=options.token))
        layout = where.layout
        size_bytes = sum(
            layout.block_bytes[rank] for rank in ranks_of(where, self._vllm_config, self._kv_cache_config, 0)
        )
        log.info("chunks of %d tokens, %d bytes a rank, revision %s", layout.chunk_tokens, size_bytes, layout.revision)
        if transfer.kv_load_failure_policy != "recompute":
            log.warning(
                'set "kv_load_failure_policy": "recompute": as it is, a load that falls short fails its request'
            )
        return PagedScheduler(
            client,
            where,
            loads=transfer.is_kv_consumer,
            saves=transfer.is_kv_producer,
            threshold_seconds=options.load_threshold_seconds,
            advises=options.measure_prefill,
            free_blocks=self._free_blocks,
            known=self._events.know if self._events is not None else None,
        )

    def _free_blocks(self) -> float:
        manager = self._kv_cache_manager
        return math.inf if manager is None else manager.block_pool.get_num_free_blocks()

    def on_new_request(self, request: "Request") -> None:
        """Start the prefetch, before the request is anywhere near its turn."""
        if self._scheduler is None or request.resumable:
            return
        if request.prompt_embeds is not None:
            if not self._told_embeds:
                self._told_embeds = True
                log.warning("requests with prompt embeddings are not cached: they have no tokens to be known by")
            return
        held = 0
        if self._kv_cache_manager is not None:
            held = self._kv_cache_manager.get_computed_blocks(request)[1]
        load = not request.skip_reading_prefix_cache
        self._scheduler.add(request, identity(request), held, load=load)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        """The tokens that can be loaded beyond those computed, None to ask again, and whether that is asynchronous."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        """Note the blocks that a request has got, and order the load of its external tokens into them."""
        if self._scheduler is not None:
            self._scheduler.place(request, blocks.get_block_ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> Metadata:
        """The orders of a step, for the workers."""
        if self._scheduler is None:
            return Metadata(Orders())
        state = scheduler_output.kv_connector_block_state

        def tables(request_id: str) -> Tables | None:
            found = state.get_block_ids(request_id)
            offered = state.boundary_state_offloads.get(request_id, ())
            return None if found is None else with_exact_states(found, self._kv_cache_config, offered)

        scheduled = scheduler_output.num_scheduled_tokens
        return Metadata(self._scheduler.step(scheduled, tables, scheduler_output.preempted_req_ids or ()))

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        """Note the workers' loads and saves that have ended."""
        if self._scheduler is not None:
            self._scheduler.loaded(connector_output.finished_recving or ())
            self._scheduler.sent(connector_output.finished_sending or ())

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether the blocks are to stay until they are saved."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether the blocks are to stay until they are saved."""
        if self._scheduler is None:
            return False, None
        return self._scheduler.finish(
            request.request_id, prompt_tokens=request.num_prompt_tokens, wishes=wishes(request)
        ), None

    def reset_cache(self) -> bool | None:
        """Empty the server, as for new weights: of all engines that use it. Whether that was done, or there is none."""
        return None if self._scheduler is None else self._scheduler.reset()

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Make the worker: now there is memory to copy from and to."""
        where = self._geometry
        try:
            if where is not None:
                self._worker = self._made_worker(where, kv_caches)
                return
        except Exception as error:
            _complain(error)
        # What its scheduler orders has an end, whatever that knows of it.
        groups = enumerate(self._kv_cache_config.kv_cache_groups)
        pages = [Pages(table, block_tokens_of(group, self._vllm_config), ()) for table, group in groups]
        self._worker = AbsentWorker(pages, reader=self._rank()[1])

    def _made_worker(self, where: Geometry, kv_caches: Mapping[str, torch.Tensor]) -> PagedWorker:
        config, options = self._kv_cache_config, self._options
        rank, reader = self._rank()
        caches = {layer: group_kernel_blocks(cache, config.num_blocks) for layer, cache in kv_caches.items()}
        return PagedWorker(
            lambda: connect(options.url, options.namespace, token=options.token),
            where,
            device_of(where, caches),
            ranks=ranks_of(where, self._vllm_config, config, rank),
            reader=reader,
        )

    def _rank(self) -> tuple[int, int]:
        """This worker's rank in the layout, and which of the readers of that it is."""
        config = self._vllm_config
        return place_of(
            config,
            self._kv_cache_config,
            stage=stage_of(config),
            context=context_of(config),
            tensor=get_tensor_model_parallel_rank(),
        )

    def _orders(self) -> Orders:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Metadata)
        return metadata.orders

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Wait for what reads blocks that are about to change hands."""
        assert isinstance(kv_connector_metadata, Metadata)
        if self._worker is not None:
            self._worker.preempted(kv_connector_metadata.orders.preempted)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """Begin the loads of requests that are not in this step."""
        if self._worker is not None:
            self._worker.load(self._orders().loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: no step reads what is being loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: chunks are saved once the step has ended."""

    def wait_for_save(self) -> None:
        """Begin the saves: the step has ended."""
        if self._worker is not None:
            orders = self._orders()
            self._worker.save(orders.saves)
            self._worker.finish(orders.finished)
            if self._geometry is not None and self._changes_hands(self._geometry):
                self._worker.settle()

    def _changes_hands(self, where: Geometry) -> bool:
        """Whether blocks may be written to that `handle_preemptions` says nothing of, or says it too late.

        Those of a window or a state change hands while the request goes on. And where new blocks are zeroed, vLLM's
        second model runner does that before it tells of the requests that have lost theirs.
        """
        return bool(where.layout.objects.windows) or self._kv_cache_config.needs_kv_cache_zeroing

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """What has ended. Of a load that fell short its blocks have failed, or where that is not enough, all of it."""
        if self._worker is None:
            return KVConnectorTransferResults()
        received = self._worker.received()
        by_blocks = falls_short_by_blocks(self._kv_cache_config)
        self._failed_blocks |= received.failed_blocks if by_blocks else set()
        return KVConnectorTransferResults(
            finished_sending=self._worker.sent(),
            finished_recving=received.request_ids,
            failed_recving=set() if by_blocks else received.short,
        )

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """The requests whose saves have ended, and those whose loads have."""
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending, results.finished_recving

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks that vLLM is to compute, since it was last asked."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed


def _log_as_vllm() -> None:
    """Show the project's lines where vLLM shows its own."""
    ours, theirs = logging.getLogger("async_cache"), logging.getLogger("vllm")
    if not ours.hasHandlers():
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)


def _complain(error: Exception) -> None:
    expected = isinstance(error, AsyncCacheError | ValueError)
    log.error("vLLM serves without the cache: %s", error, exc_info=None if expected else error)


def device_of(where: Geometry, caches: Mapping[str, torch.Tensor]) -> Device:
    """What copies these pages, by where their tensors are. Raises ConfigError for pages that it cannot copy."""
    if any(caches[layer].is_cuda for pages in where.pages for layer in pages.layers):
        log.warning("this engine's pages are on a GPU: the cache was not run on one yet, see docs/engines.md")
        return CudaDevice(where, caches)
    return HostDevice(where, caches)
