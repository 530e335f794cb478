"""The examples do what they say. The real model's weights are not needed: a tiny random one stands in."""

import importlib.util
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from async_cache.testing.virtual import run_virtual

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    """An example, as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quickstart_finds_and_reads_what_it_stored():
    assert run("quickstart.py").splitlines() == [
        "8 of 9 tokens are cached",
        "8 tokens are in memory",
        "the chunks begin with [b'\\x01\\x01', b'\\x02\\x02']",
    ]


def test_a_second_engine_computes_what_the_first_has_not_stored():
    assert run("engine.py").splitlines() == [
        "the first engine has computed 324 tokens, the second one 36",
        "with the same answers",
    ]


def test_what_one_engine_prefills_another_one_decodes():
    prefilled, decoded = run("two_engines.py").splitlines()
    (first,) = re.fullmatch(r"prefill: 100 tokens computed, the next one is (\d+)", prefilled).groups()
    # 96 of 100 tokens are whole chunks; of 8 new ones the last is not computed.
    assert re.fullmatch(rf"decode:  11 tokens computed, the next ones are \[{first}(, \d+){{7}}\]", decoded)


def test_the_earlier_a_scheduler_knows_the_count_the_shorter_its_queue():
    output = run("scheduler.py")
    rows = [re.findall(r"(\d+) / (\d+)", line) for line in output.splitlines() if " / " in line and line[0].isdigit()]
    assert len(rows) == 3
    for row in rows:
        queueing, first_token = zip(*(map(int, pair) for pair in row), strict=True)
        assert list(queueing) == sorted(queueing, reverse=True)
        assert list(first_token) == sorted(first_token, reverse=True)
    assert re.search(r"\d+ ms \(\d+%\) less than 'in order'", output)


@pytest.mark.parametrize(("load_time", "requests"), [(2.0, 64), (0.5, 8), (0.5, 64), (8.0, 8)])
def test_who_follows_the_advice_is_as_fast_as_the_better_of_loading_and_computing(load_time, requests):
    advice = load("advice")
    taken = {how: run_virtual(advice.measure(how, requests, load_time)) for how in advice.ENGINES}
    load_99, compute_99, advice_99 = (advice.percentile(times, 0.99) for times in taken.values())
    assert (load_99 > compute_99) == (load_time > 1)
    assert advice_99 <= 1.1 * min(load_99, compute_99)


@pytest.fixture(scope="module")
def real_model() -> ModuleType:
    pytest.importorskip("transformers", reason="needs the extra async-kv-cache[demo]")
    return load("real_model")


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


class Words:
    """Stands in for a tokenizer."""

    def apply_chat_template(self, messages, **options):
        return messages[0]["content"]

    def __call__(self, text):
        return {"input_ids": [ord(letter) % 61 for letter in text[:600]]}

    def decode(self, tokens, **options):
        return " ".join(map(str, tokens))


async def test_the_second_process_reuses_the_prompt_and_gives_the_same_answer(
    real_model, tiny_model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(real_model, "CacheConfig", partial(real_model.CacheConfig, l1_bytes=2**24))
    cold = await real_model.serve(tmp_path, None, tiny_model, Words())
    warm = await real_model.serve(tmp_path, None, tiny_model, Words())  # all but the directory is new
    assert (cold.prompt_tokens, cold.reused_tokens, warm.reused_tokens) == (600, 0, 512)
    assert cold.answer == warm.answer
    real_model.check(cold, warm)
    assert "The same answer" in capsys.readouterr().out


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


class FewWords(Words):
    def __call__(self, text):
        return {"input_ids": super().__call__(text)["input_ids"][:140]}


async def test_documents_are_found_wherever_they_stand(real_model, tiny_model, capsys, monkeypatch):
    segments = load("segments")
    monkeypatch.setattr(segments, "QUESTIONS", segments.QUESTIONS[::2])  # over the same three documents
    monkeypatch.setattr(segments, "ANSWER_TOKENS", 2)
    first, again = answered = await segments.answer_all(tiny_model, FewWords())
    segments.show(answered, FewWords())
    assert first.found == 0 and again.found > 3 * 120
    assert again.computed < 0.5 * first.computed
    assert "full prefill" in capsys.readouterr().out


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
