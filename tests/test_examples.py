"""The examples do what they say. The real model's weights are not needed: a tiny random one stands in."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quickstart_finds_and_reads_what_it_stored():
    assert run("quickstart.py").splitlines() == [
        "8 of 9 tokens are cached, 256 bytes are to be loaded",
        "8 tokens are in memory",
        "chunk 0 begins with b'\\x01\\x01\\x01\\x01'",
        "chunk 1 begins with b'\\x02\\x02\\x02\\x02'",
    ]


def test_the_earlier_a_scheduler_knows_the_count_the_shorter_its_queue():
    output = run("scheduler.py")
    rows = [re.findall(r"(\d+) / (\d+)", line) for line in output.splitlines() if " / " in line and line[0].isdigit()]
    assert len(rows) == 3
    for row in rows:
        queueing, first_token = zip(*(map(int, pair) for pair in row), strict=True)
        assert list(queueing) == sorted(queueing, reverse=True)
        assert list(first_token) == sorted(first_token, reverse=True)
    assert re.search(r"\d+ ms \(\d+%\) less than 'in order'", output)


@pytest.fixture(scope="module")
def real_model() -> ModuleType:
    pytest.importorskip("transformers", reason="needs the extra async_cache[demo]")
    spec = importlib.util.spec_from_file_location("real_model", EXAMPLES / "real_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny_model(real_model):
    torch, transformers = sys.modules["torch"], sys.modules["transformers"]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_rebuilt_kv_is_bit_equal_and_so_are_the_logits_after_the_rest(real_model, tiny_model, chunks):
    torch = sys.modules["torch"]
    config, chunk_tokens = tiny_model.config, real_model.CHUNK_TOKENS
    tokens = torch.arange(3 * chunk_tokens + 5).remainder(61).tolist()
    cold = real_model.rebuild(config, [])
    cold_logits = real_model.prefill(tiny_model, tokens, cold)

    layout = real_model.kv_layout(config, tiny_model.dtype)
    stored = [torch.empty(layout.groups[0].shape, dtype=tiny_model.dtype) for _ in range(chunks)]
    for index, chunk in enumerate(stored):
        real_model.copy_chunk(cold, index, chunk)
    warm = real_model.rebuild(config, stored)
    assert warm.get_seq_length() == chunks * chunk_tokens
    assert torch.equal(real_model.prefill(tiny_model, tokens, warm), cold_logits)
    for one, other in zip(cold.layers, warm.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def test_the_demonstration_fails_if_nothing_was_reused_or_the_answer_changed(real_model, capsys):
    cold = report(real_model, reused_tokens=0, answer=[1, 2])
    real_model.check(cold, report(real_model, reused_tokens=512, answer=[1, 2]))
    assert "The same answer" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="only 256 of 600 tokens"):
        real_model.check(cold, report(real_model, reused_tokens=256, answer=[1, 2]))
    with pytest.raises(SystemExit, match="answers differ"):
        real_model.check(cold, report(real_model, reused_tokens=512, answer=[1, 3]))


def test_without_the_model_the_demonstration_says_how_to_get_it(real_model, monkeypatch, tmp_path):
    monkeypatch.setattr(real_model, "MODEL_DIR", tmp_path)
    monkeypatch.setattr(sys, "argv", ["real_model.py"])
    with pytest.raises(SystemExit, match="make demo"):
        real_model.main()


def report(real_model, *, reused_tokens: int, answer: list[int]):
    return real_model.Report(
        prompt_tokens=600,
        reused_tokens=reused_tokens,
        hits_known_seconds=0.1,
        loaded_seconds=0.1,
        rebuilt_seconds=0.1,
        prefill_seconds=0.1,
        first_token_seconds=1,
        answer=answer,
        text="",
    )


def test_the_readme_shows_the_quickstart():
    code = (EXAMPLES / "quickstart.py").read_text().split('"""\n', 1)[1].strip()
    assert code in (EXAMPLES.parent / "README.md").read_text()
