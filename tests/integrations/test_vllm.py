"""The part that knows vLLM; the rest is in `test_paged.py`, and `make e2e` runs the real engine."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
torch = pytest.importorskip("torch")

from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from async_cache import ConfigError  # noqa: E402
from async_cache.integrations import vllm as connector  # noqa: E402

FULL = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
WINDOW = SlidingWindowSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=300)


def config(**parallel: int) -> Any:
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "decode_context_parallel_size": 1}
    sizes |= {"prefill_context_parallel_size": 1}
    model = SimpleNamespace(
        model="m", revision=None, dtype=torch.bfloat16, quantization=None, hf_overrides={}, get_head_size=lambda: 64
    )
    return SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(**(sizes | parallel)),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        speculative_config=None,
    )


def cached(*specs: Any, replicas: int = 1) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"{n}.0", f"{n}.1"], spec) for n, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups, kv_tp_replicas=replicas)


def request(**more: Any) -> Any:
    return SimpleNamespace(**({"mm_features": [], "lora_request": None, "cache_salt": None} | more))


def test_groups_become_object_groups_with_their_windows() -> None:
    where = connector.geometry(config(), cached(FULL, WINDOW), connector.Options())
    full, window = where.layout.groups
    assert full.shape == window.shape == (2, 2, 2 * 128 * 128)
    assert (full.window_chunks, window.window_chunks) == (None, 2)
    assert [pages.table for pages in where.pages] == [0, 1]


def test_ranks_that_hold_the_same_are_readers_of_one() -> None:
    layout = connector.geometry(config(tensor_parallel_size=8), cached(FULL, replicas=4), connector.Options()).layout
    assert (layout.world_size, layout.readers_per_rank) == (2, 4)


@pytest.mark.parametrize(
    ("made", "options", "says"),
    [
        (config(), {"chunk_tokens": 200}, "multiple of vLLM's block size 128"),
        (config(pipeline_parallel_size=2), {}, "tensor parallelism only"),
    ],
)
def test_what_is_not_supported_says_what_to_change(made: Any, options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        connector.geometry(made, cached(FULL), connector.Options(**options))


def test_layers_that_are_no_attention_are_not_supported() -> None:
    state = MambaSpec(block_size=128, shapes=((2, 2),), dtypes=(torch.float32,))
    with pytest.raises(ConfigError, match="MambaSpec"):
        connector.geometry(config(), cached(FULL, state), connector.Options())


def test_salt_lora_and_images_are_part_of_the_identity() -> None:
    image = SimpleNamespace(mm_position=SimpleNamespace(offset=5), identifier="h" * 100)
    other = SimpleNamespace(mm_position=SimpleNamespace(offset=2), identifier="hash")
    lora = SimpleNamespace(lora_name="a\n" * 100)
    made = connector.identity(request(mm_features=[image, other], lora_request=lora, cache_salt="tenant"))
    layout = connector.geometry(config(), cached(FULL), connector.Options(chunk_tokens=128)).layout
    tokens = list(range(128))
    prompts = [layout.prompt(tokens, **made), layout.prompt(tokens, **connector.identity(request()))]
    assert [offset for offset, _ in made["media"]] == [2, 5]
    assert prompts[0].chunk_hashes != prompts[1].chunk_hashes
    assert made["salt"] == "tenant"
