"""The part that knows vLLM; the rest is in `test_paged.py`, and `make e2e` runs the real engine."""

import logging
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
torch = pytest.importorskip("torch")

from msgspec.msgpack import encode  # noqa: E402
from prometheus_client import REGISTRY, Gauge, Histogram  # noqa: E402
from prometheus_client import Counter as PromCounter  # noqa: E402
from vllm.config import KVTransferConfig  # noqa: E402
from vllm.distributed.kv_events import KVEventBatch  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum  # noqa: E402
from vllm.v1.core.kv_cache_manager import KVCacheManager  # noqa: E402
from vllm.v1.core.kv_cache_utils import (  # noqa: E402
    get_request_block_hasher,
    init_none_hash,
    maybe_convert_block_hash,
)
from vllm.v1.core.sched.output import KVConnectorBlockState  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: E402
from vllm.v1.request import Request as VllmRequest  # noqa: E402

from async_cache import ConfigError  # noqa: E402
from async_cache.integrations import vllm as connector  # noqa: E402
from async_cache.integrations import vllm_layouts  # noqa: E402
from async_cache.integrations.paged import HostDevice, LoadOrder  # noqa: E402
from tests.integrations.support import BOUND_TOKEN, Request, Served, until  # noqa: E402

FULL = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
WINDOW = SlidingWindowSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=300)


def config(**parallel: int) -> Any:
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "decode_context_parallel_size": 1}
    sizes |= {"prefill_context_parallel_size": 1, "cp_kv_cache_interleave_size": 1}
    model = SimpleNamespace(
        model="m", revision=None, dtype=torch.bfloat16, quantization=None, hf_overrides={}, get_head_size=lambda: 64,
        get_total_num_hidden_layers=lambda: 5,
    )  # fmt: skip
    return SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(**(sizes | parallel)),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        speculative_config=None,
    )


def drafted(method: str, **draft: Any) -> Any:
    """With drafts by a model of their own."""
    made = config()
    fields = {"model": "d", "revision": None, "dtype": torch.bfloat16, "quantization": None} | draft
    reads = method in ("eagle", "eagle3", "mtp", "dflash", "dspark")
    made.speculative_config = SimpleNamespace(
        method=method, draft_model_config=SimpleNamespace(**fields), use_eagle=lambda: reads
    )
    return made


def cached(*specs: Any, replicas: int = 1) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"{n}.0", f"{n}.1"], spec) for n, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups, kv_tp_replicas=replicas)


def request(**more: Any) -> Any:
    return SimpleNamespace(**({"mm_features": [], "lora_request": None, "cache_salt": None} | more))


def test_groups_become_object_groups_with_their_windows() -> None:
    where = connector.geometry(config(), cached(FULL, WINDOW), connector.Options())
    full, window = where.layout.groups
    assert full.shape == window.shape == (2, 2, FULL.num_heads, FULL.num_states, FULL.state_content_size_bytes // 2)
    assert full.size_bytes == 2 * 2 * FULL.page_size_bytes
    assert (full.window_chunks, window.window_chunks) == (None, 2)
    assert [pages.table for pages in where.pages] == [0, 1]


def root(made: Any, *specs: Any) -> bytes:
    """The hash of a first chunk, by which it is found."""
    return connector.geometry(made, cached(*specs), connector.Options()).layout.prompt(range(256)).chunk_hashes[0]


def test_blocks_that_are_as_large_and_arranged_otherwise_never_meet() -> None:
    specs = [
        replace(FULL, num_kv_heads=heads, head_size=keys, head_size_v=values)
        for heads, keys, values in ((8, 128, 128), (16, 64, 64), (8, 192, 64))
    ]
    packed = [replace(spec, num_head_slots=2, state_content_bytes=2 * 8 * 128) for spec in specs]
    assert len({spec.page_size_bytes for spec in specs + packed}) == 1
    assert len({root(config(), spec) for spec in specs}) == 3
    assert len({root(config(), spec) for spec in packed}) == 3, "vLLM may say how large a block is, and no more"
    assert len({root(config(), FULL, spec) for spec in packed}) == 3


def test_the_draft_model_is_part_of_the_identity() -> None:
    ngram = drafted("draft_model")
    ngram.speculative_config.draft_model_config = ngram.model_config
    suffix = drafted("draft_model")
    suffix.speculative_config.draft_model_config = None
    assert root(config(), FULL) == root(ngram, FULL) == root(suffix, FULL)
    method = "draft_model"
    others = [drafted(method), drafted(method, model="e"), drafted(method, revision="2")]
    others += [drafted(method, quantization="fp8"), *map(drafted, ("eagle", "eagle3", "mtp"))]
    assert len({root(made, FULL) for made in [config(), *others]}) == 8
    assert root(drafted(method), FULL) == root(drafted(method), FULL)


def test_ranks_that_hold_the_same_are_readers_of_one() -> None:
    layout = connector.geometry(config(tensor_parallel_size=8), cached(FULL, replicas=4), connector.Options()).layout
    assert (layout.world_size, layout.readers_per_rank) == (2, 4)


@pytest.mark.parametrize(
    ("made", "options", "says"),
    [
        (config(), {"chunk_tokens": 200}, "multiple of vLLM's block size 128"),
        (config(decode_context_parallel_size=4), {}, "multiple of vLLM's block size 512"),
        (drafted("dflash"), {}, "drafts by dflash are not supported"),
    ],
)
def test_what_is_not_supported_says_what_to_change(made: Any, options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        connector.geometry(made, cached(FULL), connector.Options(**options))


def test_a_gpu_is_for_those_who_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, device_type="cuda", device_name="a GPU")
    monkeypatch.setattr(vllm_layouts, "current_platform", platform)
    with pytest.raises(ConfigError, match="was not run on a GPU yet: gpu = true"):
        connector.geometry(config(), cached(FULL), connector.Options())
    assert connector.geometry(config(), cached(FULL), connector.Options(gpu=True)).pages


def staged(stage: int, layers: int, *, of: int = 3) -> Any:
    group = KVCacheGroupSpec([f"{stage}.{n}" for n in range(layers)], FULL)
    cache = KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[group], kv_tp_replicas=2)
    made = config(pipeline_parallel_size=of, tensor_parallel_size=4)
    return connector.geometry(made, cache, connector.Options(), stage)


def test_all_stages_of_a_pipeline_know_the_same_layout_and_each_its_own_layers() -> None:
    counts = [2, 2, 1]  # vLLM gives the last one less
    stages = [staged(stage, count) for stage, count in enumerate(counts)]
    layout = stages[0].layout
    assert all(where.layout == layout for where in stages)
    assert (layout.world_size, layout.readers_per_rank) == (6, 2)
    assert [(group.shape[0], group.ranks) for group in layout.groups] == [(2, (0, 1)), (2, (2, 3)), (1, (4, 5))]
    for stage, where in enumerate(stages):
        assert [len(pages.layers) for pages in where.pages] == [n * (k == stage) for k, n in enumerate(counts)]


def test_stages_that_have_other_layers_than_the_model_are_not_supported() -> None:
    with pytest.raises(ConfigError, match="stage 2 of the pipeline caches 2 layers, and has 1"):
        staged(2, 2)  # as with a draft's, which the scheduler does not know of
    made = config(pipeline_parallel_size=2)
    with pytest.raises(ConfigError, match="all alike"):
        connector.geometry(made, cached(FULL, WINDOW), connector.Options())


def test_both_sides_have_one_layout_of_layers_of_different_shapes() -> None:
    narrow = replace(FULL, head_size=32)
    layers = {"0.0": FULL, "0.1": narrow, "0.2": FULL}
    tensors = [
        KVCacheTensor(size=8 * 2 * FULL.page_size_bytes, layers=["0.0", "0.2"], layer_stride=8 * FULL.page_size_bytes,
                      block_stride=FULL.page_size_bytes),
        KVCacheTensor(size=8 * narrow.page_size_bytes, layers=["0.1"], layer_stride=8 * narrow.page_size_bytes,
                      block_stride=narrow.page_size_bytes),
    ]  # fmt: skip
    sides = []
    for spec in (UniformTypeKVCacheSpecs(block_size=128, kv_cache_specs=layers), FULL):  # as workers have it, and not
        group = KVCacheGroupSpec(list(layers), spec)
        cache = KVCacheConfig(num_blocks=8, kv_cache_tensors=tensors, kv_cache_groups=[group])
        sides.append(connector.geometry(config(), cache, connector.Options()))
    worker, scheduler = sides
    assert worker == scheduler
    assert [group.shape for group in worker.layout.groups] == [
        (2, 2, FULL.page_size_bytes),
        (1, 2, narrow.page_size_bytes),
    ]
    assert [pages.layers for pages in worker.pages] == [("0.0", "0.2"), ("0.1",)]


def test_more_of_a_window_is_kept_for_drafts_of_several_layers() -> None:
    windows = [replace(WINDOW, sliding_window=257, extra_retained_tokens=extra) for extra in (0, 2)]
    made = [connector.geometry(config(), cached(FULL, window), connector.Options()).layout for window in windows]
    assert [layout.groups[1].window_chunks for layout in made] == [1, 2]


def test_prompt_embeddings_are_not_cached_and_that_is_said_once(
    server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    side = made(caplog, KVConnectorRole.SCHEDULER, url=server.url)
    try:
        for _ in range(2):
            embedded = asked(prompt_embeds=torch.zeros(600, 4))
            side.on_new_request(embedded)
            assert side.get_num_new_matched_tokens(embedded, 0) == (0, False)
            assert not side.build_connector_meta(step()).orders.saves
            assert side.request_finished_all_groups(embedded, ([],)) == (False, None)
        assert ["prompt embeddings" in line for line in lines(caplog)] == [True]
    finally:
        side.shutdown()


class OnGpu(torch.Tensor):
    is_cuda = True


def test_what_copies_pages_follows_from_where_their_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    where = connector.geometry(config(), cached(FULL), connector.Options())
    pages = {layer: torch.zeros(8, 2, 128, 64) for layer in ("0.0", "0.1")}
    on_host = connector.device_of(where, pages)
    assert isinstance(on_host, HostDevice)
    on_host.close()
    monkeypatch.setattr(connector, "CudaDevice", lambda *given: given)
    on_gpu = {layer: cache.as_subclass(OnGpu) for layer, cache in pages.items()}
    assert connector.device_of(where, on_gpu) == (where, on_gpu)


def test_a_worker_whose_pages_cannot_be_copied_fails_what_is_ordered_and_vllm_serves_on(
    server: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("these pages are none")

    monkeypatch.setattr(connector, "device_of", refuse)
    monkeypatch.setattr(connector, "get_tensor_model_parallel_rank", lambda: 0)
    worker = made(caplog, KVConnectorRole.WORKER, url=server.url)
    worker.register_kv_caches({layer: torch.zeros(8, 2, 128, 64) for layer in ("0.0", "0.1")})
    assert "these pages are none" in lines(caplog)[0]
    order = LoadOrder("a", "r", 256, 512, ([1, 2, 3, 4],))
    worker.bind_connector_metadata(connector.Metadata(connector.Orders(loads=[order], finished=["b"])))
    worker.start_load_kv(None)
    worker.wait_for_save()
    ended = worker.get_transfer_results(set())
    assert (ended.finished_recving, ended.finished_sending) == ({"a"}, {"b"})
    assert worker.get_block_ids_with_load_errors() == {3, 4}
    worker.shutdown()


def test_engines_of_other_tensor_parallel_sizes_meet_where_their_ranks_hold_the_same_heads() -> None:
    def first_chunk(size: int, spec: Any, replicas: int) -> bytes:
        where = connector.geometry(
            config(tensor_parallel_size=size), cached(spec, replicas=replicas), connector.Options()
        )
        assert where.layout.world_size * where.layout.readers_per_rank == size
        return where.layout.prompt(range(256)).chunk_hashes[0]

    latent = MLAAttentionSpec(block_size=128, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    assert first_chunk(1, latent, 1) == first_chunk(8, latent, 8)
    single = replace(FULL, num_kv_heads=1)  # of two that the model has
    assert first_chunk(2, single, 1) == first_chunk(8, single, 4) != first_chunk(1, FULL, 1)


def state_of(**more: Any) -> MambaSpec:
    return MambaSpec(
        **{"block_size": 128, "shapes": ((3, 8), (2, 4)), "dtypes": (torch.bfloat16, torch.float32),
           "mamba_cache_mode": "align", "page_size_padded": FULL.page_size_bytes} | more
    )  # fmt: skip


@pytest.mark.parametrize(
    ("specs", "contexts", "blocks", "all_of_it"),
    [
        ((FULL,), 1, {3, 4, 5}, set()),
        ((FULL,), 2, {2, 3}, set()),  # a block has twice as many tokens
        ((FULL, FULL), 1, set(), {"a"}),
        ((WINDOW,), 1, set(), {"a"}),  # a shorter prefix needs blocks that were not loaded
        ((state_of(),), 1, set(), {"a"}),  # and another state
    ],
)
def test_a_load_that_falls_short_is_told_by_blocks_where_they_leave_a_shorter_prefix(
    specs: Any, contexts: int, blocks: set[int], all_of_it: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "get_tensor_model_parallel_rank", lambda: 0)
    whole = config(decode_context_parallel_size=contexts, tensor_parallel_size=contexts)
    whole.kv_transfer_config = KVTransferConfig(
        kv_connector="AsyncCacheConnector", kv_role="kv_both", kv_connector_extra_config={"chunk_tokens": 100}
    )
    worker = connector.AsyncCacheConnector(whole, KVConnectorRole.WORKER, cached(*specs))
    worker.register_kv_caches({})  # which cannot be: all loads fail
    order = LoadOrder("a", "r", 256, 640, tuple([1, 2, 3, 4, 5] for _ in specs))
    worker.bind_connector_metadata(connector.Metadata(connector.Orders(loads=[order])))
    worker.start_load_kv(None)
    ended = worker.get_transfer_results(set())
    assert (ended.finished_recving, ended.failed_recving) == ({"a"}, all_of_it)
    assert worker.get_block_ids_with_load_errors() == blocks
    worker.shutdown()


def test_states_are_of_ranks_of_their_own_and_the_last_one_is_enough() -> None:
    made, cache = config(tensor_parallel_size=4), cached(FULL, state_of(), replicas=2)
    where = connector.geometry(made, cache, connector.Options(chunk_tokens=128))
    full, state = where.layout.groups
    assert (where.layout.world_size, where.layout.readers_per_rank) == (4, 2)
    assert (full.ranks, full.window_chunks) == ((0, 1), None)
    assert (state.ranks, state.window_chunks, state.dtype) == ((2, 3), 1, "uint8")
    assert state.shape == (2, 1, 1, 3 * 8 * 2 + 2 * 4 * 4), "what a page is filled up with is not stored"
    assert [list(vllm_layouts.ranks_of(where, made, cache, rank)) for rank in (0, 1)] == [[0, 2], [1, 3]]
    cache = cached(state_of())
    alone = connector.geometry(made, cache, connector.Options(chunk_tokens=128))
    assert (alone.layout.world_size, alone.layout.groups[0].ranks) == (4, None)
    assert list(vllm_layouts.ranks_of(alone, made, cache, 3)) == [3]
    cache = cached(FULL, replicas=2)
    plain = connector.geometry(made, cache, connector.Options())
    assert list(vllm_layouts.ranks_of(plain, made, cache, 1)) == [1]


def test_each_rank_of_a_decode_context_has_some_tokens_of_each_block() -> None:
    made, cache = config(tensor_parallel_size=4, decode_context_parallel_size=2), cached(FULL)
    where = connector.geometry(made, cache, connector.Options(chunk_tokens=512))
    (group,) = where.layout.groups
    assert group.shape[:2] == (2, 2) and where.pages[0].block_tokens == 256
    assert where.pages[0].blocks(([5, 6, 7, 8],), 512, 1024) == [7, 8]
    assert (where.layout.world_size, where.layout.readers_per_rank) == (4, 1)
    apart = replace(FULL, dcp_sharded=False)  # as a draft's, which all have
    assert connector.geometry(made, cached(apart), connector.Options()).pages[0].block_tokens == 128


def places(made: Any, cache: KVCacheConfig, contexts: int) -> list[tuple[int, int]]:
    """Of the workers of two stages, where vLLM counts contexts before tensor ranks."""
    return [
        vllm_layouts.place_of(made, cache, stage=stage, context=context, tensor=tensor)
        for stage in range(2)
        for context in range(contexts)
        for tensor in range(4)
    ]


def test_ranks_of_a_prefill_context_have_the_same_unless_tokens_are_shared_out() -> None:
    sizes = {"tensor_parallel_size": 4, "prefill_context_parallel_size": 2, "pipeline_parallel_size": 2}
    made, cache = config(**sizes), cached(FULL, replicas=2)
    cache.kv_cache_groups[0].layer_names.append("0.2")  # five layers: three here, and two
    layout = connector.geometry(made, cache, connector.Options()).layout
    assert (layout.world_size, layout.readers_per_rank) == (4, 4)
    assert places(made, cache, 2) == [
        (0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3),
        (2, 0), (2, 1), (3, 0), (3, 1), (2, 2), (2, 3), (3, 2), (3, 3),
    ]  # fmt: skip
    for size in (2, 8):
        made, cache = config(decode_context_parallel_size=size, **sizes), cached(FULL)
        cache.kv_cache_groups[0].layer_names.append("0.2")
        layout = connector.geometry(made, cache, connector.Options(chunk_tokens=1024)).layout
        assert (layout.world_size, layout.readers_per_rank) == (16, 1)
        assert places(made, cache, 2) == [(rank, 0) for rank in range(16)]


def test_blocks_of_which_tokens_are_shared_out_otherwise_never_meet() -> None:
    sizes = {"tensor_parallel_size": 8, "decode_context_parallel_size": 2}
    made = [config(tensor_parallel_size=8), config(**sizes), config(**sizes, cp_kv_cache_interleave_size=16)]
    made.append(config(tensor_parallel_size=8, decode_context_parallel_size=4))
    options = connector.Options(chunk_tokens=512)
    prompts = [connector.geometry(it, cached(FULL), options).layout.prompt(range(512)) for it in made]
    assert len({prompt.chunk_hashes[0] for prompt in prompts}) == 4


def test_a_context_beside_recurrent_states_is_not_supported() -> None:
    for size in ("decode", "prefill"):
        with pytest.raises(ConfigError, match="context parallelism beside recurrent states"):
            connector.geometry(
                config(**{f"{size}_context_parallel_size": 2}),
                cached(FULL, state_of()),
                connector.Options(chunk_tokens=128),
            )


def test_where_blocks_are_zeroed_or_windows_pass_a_step_waits_until_its_blocks_are_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    exact = replace(FULL, dtype=torch.float32)
    for specs, waits in (((FULL,), False), ((FULL, WINDOW), True), ((FULL, exact), True)):
        worker = made(caplog, KVConnectorRole.WORKER, *specs)
        calls: list[str] = []
        worker._worker = SimpleNamespace(
            save=lambda _: None, finish=lambda _: None, settle=lambda calls=calls: calls.append("settle")
        )
        worker.bind_connector_metadata(connector.Metadata(connector.Orders()))
        worker.wait_for_save()
        assert calls == ["settle"] * waits


def test_states_that_are_as_large_and_made_otherwise_never_meet() -> None:
    specs = [state_of(), state_of(shapes=((8, 3), (2, 4))), state_of(mamba_type=MambaAttentionBackendEnum.SHORT_CONV)]
    options = connector.Options(chunk_tokens=128)
    layouts = [connector.geometry(config(), cached(FULL, spec), options).layout for spec in specs]
    assert len({layout.groups for layout in layouts}) == 1
    assert len({layout.prompt(range(128)).chunk_hashes[0] for layout in layouts}) == 3


@pytest.mark.parametrize(
    ("spec", "chunk_tokens", "says"),
    [
        (state_of(), 256, "chunk_tokens 256 is not vLLM's block size 128, at which .* set it to 128"),
        (state_of(mamba_cache_mode="all"), 128, "--mamba-cache-mode align, and not all"),
        (state_of(mamba_cache_mode="none"), 128, "--enable-prefix-caching"),
        (state_of(num_speculative_blocks=1), 128, "drafts beside recurrent states"),
    ],
)
def test_states_that_vllm_does_not_keep_exactly_are_not_supported(
    spec: MambaSpec, chunk_tokens: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        connector.geometry(config(), cached(FULL, spec), connector.Options(chunk_tokens=chunk_tokens))


def test_of_states_only_those_count_that_vllm_offers_at_the_end_of_a_block() -> None:
    tables = ([1, 2, 3], [4, 5, 6])
    exact = partial(vllm_layouts.with_exact_states, tables, cached(FULL, state_of()))
    assert exact(()) == ([1, 2, 3], [0, 0, 0])
    assert exact([(1, 9, 128), (1, 8, 300), (1, 7, 384)]) == ([1, 2, 3], [9, 0, 7])
    assert exact([(1, 9, 512), (1, 9, 0)]) == ([1, 2, 3], [0, 0, 0])
    assert tables == ([1, 2, 3], [4, 5, 6])
    assert vllm_layouts.with_exact_states(tables, cached(FULL, WINDOW), ()) == tables


class RealScheduler:
    """vLLM's own manager of blocks, a request that it computes, and the connector's orders for each of its steps."""

    def __init__(self, side: connector.AsyncCacheConnector, cache: KVCacheConfig, tokens: list[int]):
        self.side = side
        init_none_hash(sha256)
        self.manager = KVCacheManager(
            cache, max_model_len=4096, scheduler_block_size=128, hash_block_size=128, enable_caching=True
        )
        self.request = VllmRequest(
            "a", tokens, SamplingParams(max_tokens=64), None, block_hasher=get_request_block_hasher(128, sha256)
        )
        side.bind_kv_cache_manager(self.manager)
        side.on_new_request(self.request)

    def step(self, tokens: int) -> Any:
        """Compute so many tokens more."""
        request, manager = self.request, self.manager
        manager.new_step_starts()
        assert manager.allocate_slots(request, tokens) is not None
        state = KVConnectorBlockState({"a"}, manager.get_block_ids, manager.take_boundary_state_offloads())
        output = SimpleNamespace(
            kv_connector_block_state=state, num_scheduled_tokens={"a": tokens}, preempted_req_ids=None
        )
        orders = self.side.build_connector_meta(output).orders
        request.num_computed_tokens += tokens
        return orders


def test_in_vllms_own_manager_of_blocks_states_are_saved_where_a_step_ends(
    server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    whole = config()
    whole.kv_transfer_config = KVTransferConfig(
        kv_connector="AsyncCacheConnector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"url": server.url, "chunk_tokens": 128},
    )
    cache = replace(cached(FULL, state_of()), num_blocks=40)
    with caplog.at_level(logging.INFO, "async_cache"):
        side = connector.AsyncCacheConnector(whole, KVConnectorRole.SCHEDULER, cache)
    try:
        made = RealScheduler(side, cache, list(range(700)))
        kept = []
        for tokens in (256, 384, 60, *[1] * 70):
            if made.request.num_computed_tokens == made.request.num_tokens:
                made.request.append_output_token_ids(7)
            for order in made.step(tokens).saves:
                attention, states = order.tables
                at = [n for n, block in enumerate(states) if block]
                assert all(attention[order.start_chunk : len(order.prompt)])
                kept.append((order.start_chunk, len(order.prompt), at))
                assert all(states[n] == made.manager.get_block_ids("a")[1][n] for n in at)
        assert kept == [(0, 2, [1]), (2, 5, [4]), (5, 6, [5])]
    finally:
        side.shutdown()


def test_salt_lora_and_images_are_part_of_the_identity() -> None:
    image = SimpleNamespace(mm_position=SimpleNamespace(offset=5), identifier="h" * 100)
    other = SimpleNamespace(mm_position=SimpleNamespace(offset=2), identifier="hash")
    lora = SimpleNamespace(lora_name="a\n" * 100, lora_path="/adapters/a")
    moved = SimpleNamespace(lora_name=lora.lora_name, lora_path="/adapters/b")
    made = connector.identity(request(mm_features=[image, other], lora_request=lora, cache_salt="tenant"))
    layout = connector.geometry(config(), cached(FULL), connector.Options(chunk_tokens=128)).layout
    tokens = list(range(128))
    prompts = [layout.prompt(tokens, **made), layout.prompt(tokens, **connector.identity(request()))]
    assert [offset for offset, _ in made["media"]] == [2, 5]
    assert prompts[0].chunk_hashes != prompts[1].chunk_hashes
    assert made["salt"] == "tenant"
    identities = [connector.identity(request(lora_request=it))["adapter"] for it in (lora, moved)]
    assert identities[0] == made["adapter"] != identities[1]


def made(
    caplog: pytest.LogCaptureFixture, role: KVConnectorRole, *specs: Any, **options: Any
) -> connector.AsyncCacheConnector:
    whole = config()
    whole.kv_transfer_config = KVTransferConfig(
        kv_connector="AsyncCacheConnector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=options,
    )
    with caplog.at_level(logging.INFO, "async_cache"):
        return connector.AsyncCacheConnector(whole, role, cached(*specs or [FULL]))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings of ours; vLLM's handlers may show them once more."""
    ours = [r for r in caplog.records if r.name.startswith("async_cache") and r.levelno >= logging.WARNING]
    return list(dict.fromkeys(record.message for record in ours))


def asked(**more: Any) -> Any:
    plain = {"prompt_embeds": None, "resumable": False, "skip_reading_prefix_cache": False}
    plain |= {"kv_transfer_params": None, "num_prompt_tokens": 600} | more
    tokens = Request("a", list(range(600)))
    return request(
        **plain, request_id="a", all_token_ids=tokens.all_token_ids, num_tokens=600, num_computed_tokens=0,
        num_preemptions=0,
    )  # fmt: skip


def step() -> Any:
    """One in which the first request computes all that it has."""
    state = SimpleNamespace(get_block_ids=lambda _: ([1, 2, 3, 4, 5],))
    return SimpleNamespace(
        kv_connector_block_state=state, num_scheduled_tokens={"a": 600}, preempted_req_ids=None
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": "unix:///nowhere/s"}, "there is no server at unix:///nowhere/s"),
        ({"chunk_tokens": 100}, "multiple of vLLM's block size 128"),
        ({"chunk_size": 256}, "chunk_size"),
        ({"chunk_tokens": 0}, "Expected `int` >= 1"),
        ({"load_threshold_seconds": float("nan")}, "Expected `float` >= 0"),
        ({"model": ""}, "`str` of length >= 1"),
        ({"url": 5}, "Expected `str | null`, got `int` - at `$.url`"),
    ],
)
def test_what_can_not_be_used_is_one_line_and_vllm_serves_on(
    caplog: pytest.LogCaptureFixture, options: Any, says: str
) -> None:
    side = made(caplog, KVConnectorRole.SCHEDULER, **options)
    assert [says in line for line in lines(caplog)] == [True]
    side.on_new_request(asked())
    assert side.get_num_new_matched_tokens(asked(), 0) == (0, False)
    orders = side.build_connector_meta(step()).orders
    assert not (orders.loads or orders.saves)
    assert side.request_finished_all_groups(asked(), ([],)) == (False, None)
    side.shutdown()
    worker = made(caplog, KVConnectorRole.WORKER, **options)
    worker.bind_connector_metadata(connector.Metadata(connector.Orders()))
    worker.start_load_kv(None)
    worker.wait_for_save()
    assert not worker.get_transfer_results(set()).finished_recving
    worker.shutdown()


def test_a_salt_that_the_token_may_not_use_is_one_line(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    side = made(caplog, KVConnectorRole.SCHEDULER, url=server.url, token=BOUND_TOKEN)
    try:
        for salt, count in (("one", 0), ("other", 1), ("other", 1)):
            side.on_new_request(asked(cache_salt=salt))
            match = partial(side.get_num_new_matched_tokens, asked(), 0)
            answer = until(lambda match=match: (a := match())[0] is not None and a)
            assert answer == (0, False)
            side.request_finished_all_groups(asked(), ([],))
            assert len(lines(caplog)) == count
    finally:
        side.shutdown()
    assert "the token is not for the salt 'other'" in lines(caplog)[0]


# What it tells.


def telling(caplog: pytest.LogCaptureFixture, server: Served) -> Any:
    whole = config()
    whole.kv_transfer_config = KVTransferConfig(
        kv_connector="AsyncCacheConnector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"url": server.url, "chunk_tokens": 256},
    )
    whole.kv_events_config = SimpleNamespace(enable_kv_cache_events=True)
    whole.cache_config = SimpleNamespace(
        cache_dtype="auto", block_size=128, prefix_match_unit=None, enable_prefix_caching=True
    )
    with caplog.at_level(logging.INFO, "async_cache"):
        return connector.AsyncCacheConnector(whole, KVConnectorRole.SCHEDULER, cached(FULL))


def test_events_of_the_server_are_those_of_the_engines_blocks(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    side = telling(caplog, server)
    try:
        asked_for = asked(block_hashes=[bytes([n]) * 32 for n in range(4)])
        assert list(side.take_events()) == []
        side.on_new_request(asked_for)
        until(lambda: side.get_num_new_matched_tokens(asked_for, 0)[0] is not None)
        where = side._geometry.layout
        store(server, where, asked_for)
        seen: list[Any] = []
        until(lambda: seen.extend(side.take_events()) or len(seen) >= 4)
        first, second = [event for event in seen if event.medium == "CPU"]
        hashes = list(map(maybe_convert_block_hash, asked_for.block_hashes))
        assert [event.medium for event in seen].count("STORAGE") == 2
        assert first.block_hashes == hashes[:2] and first.parent_block_hash is None
        assert second.block_hashes == hashes[2:] and second.parent_block_hash == hashes[1]
        assert second.token_ids == list(range(256, 512)) and second.block_size == 128
        assert (second.lora_id, second.lora_name, second.group_idx) == (None, None, 0)
        assert msgspec_of(seen)
        side.reset_cache()
        removed: list[Any] = []
        until(lambda: removed.extend(side.take_events()) or len(removed) >= 4)
        assert {(type(event).__name__, event.medium) for event in removed} == {
            ("BlockRemoved", "CPU"),
            ("BlockRemoved", "STORAGE"),
        }
    finally:
        side.shutdown()


def msgspec_of(events: list[Any]) -> bytes:
    """As vLLM publishes them."""
    return encode(KVEventBatch(ts=0.0, events=events))


def store(server: Served, layout: Any, asked_for: Any) -> None:
    async def fill(cache: Any) -> None:
        async with cache.store(layout.prompt(asked_for.all_token_ids, **connector.identity(asked_for))) as writer:
            for chunk in writer:
                chunk.commit()
        await cache.flush()

    server.run(fill)


def test_without_events_in_vllms_configuration_there_are_none(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    side = made(caplog, KVConnectorRole.SCHEDULER, url=server.url)
    try:
        assert side.take_events() == () and side._events is None
    finally:
        side.shutdown()


def test_what_was_hit_where_is_told_and_counted(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    side = made(caplog, KVConnectorRole.SCHEDULER, url=server.url)
    try:
        asked_for = asked()
        store(server, side._geometry.layout, asked_for)
        server.run(lambda cache: cache.clear("l1"))
        first = request(**vars(asked_for) | {"request_id": "b", "all_token_ids": list(range(257)), "num_tokens": 257})
        for each in (first, asked_for):  # the second finds a chunk in memory, and one in storage
            side.on_new_request(each)
            until(lambda each=each: side.get_num_new_matched_tokens(each, 0)[0])
        tokens, _ = side.get_num_new_matched_tokens(asked_for, 0)
        side.update_state_after_alloc(asked_for, SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4],)), tokens)
        assert side.get_external_cache_hit_sources(asked_for, tokens) == {
            CacheHitSource.HOST: 256,
            CacheHitSource.DISK: 256,
        }
        assert side.get_external_cache_hit_sources(asked_for, 0) == {}
        until(lambda: len(side._scheduler.tally._counts.load_seconds) == 2)
        stats = side.get_kv_connector_stats()
        again = connector.AsyncCacheConnector.build_kv_connector_stats(stats.to_dict())
        assert again.data["lookups"] == 2 and again.data["asked_tokens"] == 256 + 599
        assert (again.data["l1_tokens"], again.data["l2_tokens"]) == (256, 512)
        assert side.get_kv_connector_stats() is None
        both = again.aggregate(connector.AsyncCacheConnector.build_kv_connector_stats(stats.to_dict()))
        assert both.data["lookups"] == 4 and len(both.data["load_seconds"]) == 4 and not both.is_empty()
        assert both.reduce()["hit rate (%)"] == round(100 * 1536 / (2 * 855), 1)
        both.reset()
        assert both.is_empty() and both.reduce()["async_cache lookups"] == 0
    finally:
        side.shutdown()


def test_the_metrics_are_beside_vllms_own() -> None:
    whole = config()
    whole.kv_transfer_config = None
    kinds = {Gauge: Gauge, PromCounter: PromCounter, Histogram: Histogram}
    metrics = connector.AsyncCacheConnector.build_prom_metrics(whole, kinds, ["engine"], {0: ["0"], 1: ["1"]})
    data = {"lookups": 1, "asked_tokens": 9, "l1_tokens": 4, "l2_tokens": 2, "missed": {"capacity": 3}}
    metrics.observe(data | {"shortfalls": {"gone": 1}, "load_seconds": [0.02]}, 1)
    for name, labels, value in (
        ("asked_tokens_total", {}, 9),
        ("hit_tokens_total", {"tier": "l1"}, 4),
        ("hit_tokens_total", {"tier": "l2"}, 2),
        ("missed_total", {"reason": "capacity"}, 3),
        ("shortfalls_total", {"reason": "gone"}, 1),
        ("load_seconds_count", {}, 1),
    ):
        assert REGISTRY.get_sample_value(f"vllm:async_cache_{name}", {"engine": "1", **labels}) == value
