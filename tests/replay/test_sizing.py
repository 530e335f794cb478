"""What a token takes, by the configs of models as they are published; what a trace asks for; the command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from async_cache.errors import ConfigError
from async_cache.recording.trace import Trace, TracedRequest
from async_cache.replay.model import read_model
from async_cache.replay.run import Found
from async_cache.replay.sizing import capacities, capacity_for, demand
from async_cache.replay.sweep import Point

TRACE = Path(__file__).parents[2] / "benchmarks" / "traces" / "mooncake_synthetic_trace.jsonl.gz"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_size": 8192,
    "torch_dtype": "bfloat16",
}
DEEPSEEK = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "torch_dtype": "bfloat16",
}
GEMMA3 = {
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
}
MISTRAL = LLAMA | {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "sliding_window": 4096}
QWEN = LLAMA | {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 70}
HYBRID = LLAMA | {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 128,
}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "dtype": "float32"}


def written(path: Path, fields: Any) -> Path:
    path.write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("fields", "dtype", "kib", "windows"),
    [
        (LLAMA, None, 320, 0),
        (LLAMA, "fp8", 160, 0),
        (DEEPSEEK, None, 68.625, 0),
        ({"torch_dtype": "bfloat16", "text_config": GEMMA3}, None, 496, 52),
        (GEMMA3 | {"model_type": "gemma2", "sliding_window_pattern": None}, "bf16", 496, 31),
        (MISTRAL, None, 128, 32),
        (QWEN, None, 320, 0),
        (QWEN | {"use_sliding_window": True}, None, 320, 10),
        (HYBRID, None, 12, 1),
        (HYBRID | {"num_kv_shared_layers": 1}, None, 8, 1),
        (GPT2, None, 72, 0),
        (GPT2 | {"multi_query": True}, None, 6, 0),
    ],
)
def test_a_token_takes_what_the_config_says(
    tmp_path: Path, fields: dict[str, Any], dtype: str | None, kib: float, windows: int
) -> None:
    written(tmp_path / "config.json", fields)
    model = read_model(tmp_path, dtype)
    assert (model.bytes_per_token, model.window_layers) == (kib * 1024, windows)


def test_layers_whose_window_slides_are_loaded_for_its_tokens_only(tmp_path: Path) -> None:
    model = read_model(written(tmp_path / "c", MISTRAL | {"num_hidden_layers": 1}))
    assert model.loaded_bytes(1_000_000) == model.loaded_bytes(4096) == 4096 * model.bytes_per_token
    assert model.loaded_bytes(10) == 10 * model.bytes_per_token


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ([], "no fields"),
        ({}, "num_hidden_layers is missing"),
        (LLAMA | {"num_hidden_layers": "many"}, "num_hidden_layers must be a whole number"),
        (LLAMA | {"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number"),
        (LLAMA | {"torch_dtype": None}, "say --kv-dtype"),
        (LLAMA | {"torch_dtype": "int3"}, "no dtype 'int3'"),
        (LLAMA | {"hidden_size": 8191}, "no multiple"),
        (LLAMA | {"is_encoder_decoder": True}, "encoder"),
        (LLAMA | {"layer_types": ["full_attention"]}, "1 layers, and not 80"),
        (HYBRID | {"layer_types": ["magic"] * 4}, "'magic'"),
        (HYBRID | {"layer_types": ["full_attention", {}, 1, None]}, "no layer_types"),
        (HYBRID | {"layer_types": ["mamba"] * 4}, "no layer has attention"),
        (DEEPSEEK | {"qk_rope_head_dim": None}, "qk_rope_head_dim is missing"),
    ],
)
def test_a_config_that_does_not_say_what_is_needed_is_refused(tmp_path: Path, fields: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_model(written(tmp_path / "c", fields))


def test_a_trace_asks_for_what_differs_and_for_what_came_before() -> None:
    paths = [[b"a", b"b"], [b"a", b"c"], [b"a", b"b"]]
    trace = Trace([TracedRequest(float(at), 20 - at, None, path, 10) for at, path in enumerate(paths)])
    of = demand(trace, measured_share=2 / 3)
    assert (of.requests, of.seconds, of.tokens, of.longest_tokens, of.distinct_tokens) == (3, 2.0, 57, 20, 29)
    assert (of.found.asked_tokens, of.found.hit_tokens) == (37, 10 + 18)
    assert capacities(of, 100) == [2048, 4096]
    points = [Point("lru", capacity, Found(100, hits, True)) for capacity, hits in ((1024, 10), (4096, 50))]
    assert [capacity_for(points, rate) for rate in (0.1, 0.3, 0.5, 0.6)] == [1024, 2048, 4096, None]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "async_cache", "size", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_sizes_tiers_by_a_trace(tmp_path: Path) -> None:
    model = written(tmp_path / "config.json", LLAMA)
    plot = tmp_path / "hits.svg"
    done = run(str(model), str(TRACE), "--capacity", "915GiB,4096GiB", "--json", "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["bytes_per_token"] == 320 * 1024
    assert told["most_hit_rate"] == pytest.approx(0.863, abs=0.001), "what perfect foresight finds with room for all"
    assert [round(100 * row["hit_rate"], 1) for row in told["hit_rates"]] == [45.3, 82.6]
    assert 915 < told["tiers"]["L2"] / 2**30 < 4096
    assert plot.read_text().startswith("<?xml")
    done = run(str(model), str(TRACE), "--capacity", "915GiB")
    assert "320 KiB" in done.stdout and "45.3" in done.stdout and "more than was replayed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--policy", "none"], "--policy: there is no policy 'none'"),
        (["--kv-dtype", "x"], "there is no dtype 'x'"),
        (["--capacity", "1MiB"], "--capacity: a chunk takes"),
    ],
)
def test_what_makes_no_sense_is_one_line(tmp_path: Path, arguments: list[str], told: str) -> None:
    done = run(str(written(tmp_path / "c", LLAMA)), str(TRACE), *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert told in done.stderr
