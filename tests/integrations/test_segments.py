"""Prompts of parts on a tiny model: what is found is what is computed, bit by bit, wherever it stands."""

import asyncio
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path

import pytest
from contract.served import serve

from async_cache import AsyncCache, CacheConfig
from async_cache.l2 import Backend
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import FailingBackend

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="needs the extra async-kv-cache[transformers]")
segments = pytest.importorskip("async_cache.integrations.segments")
rotary = pytest.importorskip("async_cache.integrations.rotary")
prefix = pytest.importorskip("async_cache.integrations.transformers")
SegmentedPrefill, Segment, Text = segments.SegmentedPrefill, segments.Segment, segments.Text

TESTS = Path(__file__).parents[1]
CHUNK = 8
CONTEXT = [3, 1, 4, 1, 5]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def passage(number, tokens):
    return [(number * 31 + 7 * n * n) % 61 for n in range(tokens)]


PARTS = [Text(passage(1, 19)), Segment(passage(2, 29)), Segment(passage(3, 16)), Text(passage(4, 5))]
SEGMENT_CHUNKS = 5


def make_kind(kind, **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | sizes, name_or_path="tiny")
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def make_model(**sizes):
    return make_kind("Llama", **sizes)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return make_model()


@asynccontextmanager
async def open_cache(*backends: Backend, place: str = "embedded") -> AsyncIterator[AsyncCache]:
    config = CacheConfig(l1_bytes=2**20, l2=[])
    async with AsyncCache(config, backends) if place == "embedded" else serve(config, backends, place) as cache:
        yield cache
        stats = await cache.stats()
        assert (stats.requests, stats.leases, stats.reserved_bytes) == (0, 0, 0)
        cache.check_integrity()


def make(cache, model, **options):
    return SegmentedPrefill(cache, model, **{"context": CONTEXT, "chunk_tokens": CHUNK, "first_tokens": 4} | options)


def same(one, other):
    layers = zip(one.kv.layers, other.kv.layers, strict=True)
    equal = all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in layers)
    return equal and torch.equal(one.logits, other.logits)


def ids_of(parts):
    return [token for part in parts for token in part.tokens]


@pytest.mark.parametrize("place", ["embedded", "mapped", "framed", "bound"])
@pytest.mark.parametrize("where", ["L1", "L2", "evicted in part"])
async def test_what_is_found_is_what_is_computed_bit_by_bit(model, place, where):
    async with open_cache(MemoryBackend(), place=place) as cache:
        prefill = make(cache, model)
        cold = await prefill.prefill(PARTS)
        assert cold.result.chunks == 0
        if where == "L2":
            await cache.flush()
            await cache.clear("l1")
        if where == "evicted in part":
            await cache.delete(prefill.segment(PARTS[1].tokens))
            async with cache.store(prefill.segment(PARTS[1].tokens)) as writer:  # one of three, and not what it was
                next(iter(writer)).commit()
        warm = await make(cache, model).prefill(PARTS)
        found = [2, 1 if where == "evicted in part" else 3, 2]
        assert [part.chunks for part in warm.result.parts] == found
        anew = 3 + (4 + 5) + 4 + 5
        assert warm.computed_tokens == (anew + len(CONTEXT) + 24 if where == "evicted in part" else anew)
        assert same(cold, warm)


@pytest.mark.timeout(600)  # the other one imports torch
async def test_what_another_process_finds_is_the_same(model, tmp_path):
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[f"fs://{tmp_path}/l2"])) as cache:
        cold = await make(cache, model).prefill(PARTS)
    code = "import sys; from integrations.test_segments import found_at; print(*found_at(sys.argv[1]))"
    command = sys.executable, "-c", code, f"fs://{tmp_path}/l2"
    environ = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    told = await asyncio.to_thread(subprocess.run, command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    assert told.stdout.split() == [str(2 + SEGMENT_CHUNKS), digest(cold)]


def digest(blended):
    numbers = [blended.logits, *(part for layer in blended.kv.layers for part in (layer.keys, layer.values))]
    return sha256(b"".join(part.contiguous().numpy().tobytes() for part in numbers)).hexdigest()


def found_at(url):
    """Of a process of its own: how many chunks it finds, and what comes of them."""

    async def prefill():
        async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[url])) as cache:
            return await make(cache, make_model()).prefill(PARTS)

    torch.set_num_threads(1)
    blended = asyncio.run(prefill())
    return blended.result.chunks, digest(blended)


# Where it stands.


async def keys_of(model, context, segment, start):
    """The keys of a segment that stands behind so many other tokens, none of it computed anew."""
    async with open_cache() as cache:
        prefill = make(cache, model, context=context, first_tokens=0)
        blended = await prefill.prefill([Text(passage(5, start)), segment, Text([1])])
    return torch.cat([layer.keys[:, :, start : start + len(segment.tokens)] for layer in blended.kv.layers])


def own_keys(model, context, segment, start):
    """Those that the model computes of it behind the context, at that place."""
    ids = torch.tensor([[*context, *segment.tokens]])
    positions = torch.arange(ids.shape[1])[None] + start - len(context)
    kv = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, position_ids=positions, cache=kv)
    return torch.cat([layer.keys[:, :, len(context) :] for layer in kv.layers])


def apart(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


async def test_keys_are_those_of_the_segment_behind_the_context_where_it_stands(model):
    segment = Segment(passage(2, 24))
    for start in (5, 8, 300):
        assert apart(await keys_of(model, CONTEXT, segment, start), own_keys(model, CONTEXT, segment, start)) < 2e-5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda start, to: (start, to + 1),
        lambda start, to: (to, start),
        lambda start, to: (start, start),
        lambda start, to: (start - len(CONTEXT), to),
    ],
    ids=["off by one", "the wrong way", "not at all", "as if there were no context"],
)
async def test_keys_that_are_moved_wrongly_are_told_in_every_layer(model, monkeypatch, wrong):
    segment, start, right = Segment(passage(2, 24)), 300, rotary.Rotary.turn

    def turn(self, begin, to, tokens):
        return right(self, *wrong(begin, to), tokens)

    async with open_cache() as cache:
        prefill = make(cache, model, first_tokens=0)  # the gate lets the model in
        monkeypatch.setattr(rotary.Rotary, "turn", turn)
        blended = await prefill.prefill([Text(passage(5, start)), segment, Text([1])])
    theirs = own_keys(model, CONTEXT, segment, start)
    for number, layer in enumerate(blended.kv.layers):
        assert apart(layer.keys[0, :, start : start + 24], theirs[number]) > 0.05


async def test_a_segment_is_found_at_every_offset(model):
    async with open_cache() as cache:
        prefill, segment = make(cache, model), Segment(passage(2, 24))
        await prefill.prefill([segment])
        for offset in range(2 * CHUNK + 1):
            parts = [Text(passage(5, offset)), segment, Text([1])]
            warm = await prefill.prefill(parts)
            assert warm.result.parts[-1].chunks == 3
            async with open_cache() as empty:
                assert same(warm, await make(empty, model).prefill(parts))


async def test_who_stored_a_common_beginning_first_does_not_matter(model):
    long, short = Segment(passage(2, 32)), Segment(passage(2, 16))
    answers = []
    for order in ([long], [short, long]):
        async with open_cache() as cache:
            for segment in order:
                blended = await make(cache, model).prefill([segment, Text([1, 2])])
            answers.append(blended)
    assert same(*answers)


async def test_two_at_once_compute_the_same_and_store_it(model):
    async with open_cache() as cache:
        prefill, parts = make(cache, model), PARTS[::-1]
        both = await asyncio.gather(prefill.prefill(PARTS), prefill.prefill(parts))
        again = [await prefill.prefill(PARTS), await prefill.prefill(parts)]
        assert [warm.result.chunks for warm in again] == [2 + SEGMENT_CHUNKS, SEGMENT_CHUNKS]
        assert all(map(same, both, again))


async def test_all_of_it_computed_anew_is_a_full_prefill_bit_by_bit(model):
    parts = [Segment(passage(2, 29)), Segment(passage(3, 16)), Text(passage(4, 5))]
    kv = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(torch.tensor([ids_of(parts)]), cache=kv, logits_to_keep=1).logits[0, -1]
    async with open_cache() as cache:
        for _ in range(2):
            blended = await make(cache, model, first_tokens=10**6).prefill(parts)
            assert torch.equal(blended.logits, logits)
            for ours, full in zip(blended.kv.layers, kv.layers, strict=True):
                assert torch.equal(ours.keys, full.keys) and torch.equal(ours.values, full.values)


async def test_a_leading_text_is_an_exact_prompt(model):
    text = passage(1, 24)
    async with open_cache() as cache:
        exact = prefix.CachedPrefix(cache, model, chunk_tokens=CHUNK)
        _, kv, _ = await exact.prefill(text)
        await exact.store(text, kv)
        blended = await make(cache, model).prefill([Text(text), Segment(passage(2, 16)), Text([1])])
        assert blended.result.parts[0].chunks == 3
        for ours, theirs in zip(blended.kv.layers, kv.layers, strict=True):
            assert torch.equal(ours.keys[:, :, :24], theirs.keys)
    async with open_cache() as cache:
        await make(cache, model).prefill([Text(text), Segment(passage(2, 16))])
        assert (await prefix.CachedPrefix(cache, model, chunk_tokens=CHUNK).prefill([*text, 1])).result.chunks == 3


async def test_a_leading_text_of_which_a_part_is_there_is_what_is_computed_in_one_go(model):
    longer = [Text([*PARTS[0].tokens, *passage(6, 8)]), *PARTS[1:]]
    async with open_cache() as cache:
        cold = await make(cache, model).prefill(longer)
    async with open_cache() as cache:
        await make(cache, model).prefill(PARTS)
        warm = await make(cache, model).prefill(longer)
        assert [part.chunks for part in warm.result.parts] == [2, 3, 2]
        assert same(cold, warm)


async def test_segments_with_another_context_salt_or_adapter_are_others(model):
    async with open_cache() as cache:
        await make(cache, model).prefill(PARTS)
        for options in ({"context": CONTEXT[:-1]}, {"context": ()}, {"salt": "a"}, {"adapter": "a"}):
            result = (await make(cache, model, **options).prefill(PARTS)).result
            assert [part.chunks for part in result.parts[1:]] == [0, 0]


async def test_the_same_segment_may_stand_twice_and_is_computed_once(model):
    segment = Segment(passage(2, 16))
    async with open_cache() as cache:
        cold = await make(cache, model).prefill([segment, segment, Text([1])])
        assert cold.computed_tokens == len(CONTEXT) + 16 + 4 + 4 + 1
        assert same(cold, await make(cache, model).prefill([segment, segment, Text([1])]))


async def test_the_model_goes_on_behind_it(model):
    async with open_cache() as cache:
        blended = await make(cache, model, first_tokens=10**6).prefill(PARTS[1:])
        ids = ids_of(PARTS[1:])
        with torch.no_grad():
            more = model(torch.tensor([[9]]), cache=blended.kv).logits[0, -1]
            full = model(torch.tensor([[*ids, 9]])).logits[0, -1]
        assert blended.kv.get_seq_length() == len(ids) + 1
        assert torch.allclose(more, full, atol=1e-6)


async def test_what_was_blended_is_not_stored_as_if_it_were_exact(model):
    async with open_cache() as cache:
        blended = await make(cache, model).prefill(PARTS)
        with pytest.raises(ValueError, match="kv was blended from segments"):
            await prefix.CachedPrefix(cache, model, chunk_tokens=CHUNK).store(ids_of(PARTS), blended.kv)


async def test_a_cache_that_fails_makes_it_slower_and_no_other(model):
    async with open_cache() as cache:
        right = await make(cache, model).prefill(PARTS)
    failing = FailingBackend(MemoryBackend(), "load", times=None)
    async with open_cache(failing) as cache:
        await make(cache, model).prefill(PARTS)
        await cache.flush()
        await cache.clear("l1")
        assert same(right, await make(cache, model).prefill(PARTS))
        prefill = make(cache, model)
    assert same(right, await prefill.prefill(PARTS))  # closed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
async def test_a_model_on_a_gpu_has_its_segments_moved_in_memory():
    model = make_model().to("cuda")
    async with open_cache() as cache:
        cold = await make(cache, model).prefill(PARTS)
        longer = [Text([*PARTS[0].tokens, *passage(6, 8)]), *PARTS[1:]]  # of a leading text a part is there
        assert (await make(cache, model).prefill(longer)).result.parts[0].chunks == 2
        assert same(cold, await make(cache, model).prefill(PARTS))


async def test_who_gives_up_holds_nothing(model):
    async with open_cache(MemoryBackend()) as cache:
        prefill = make(cache, model)
        await prefill.prefill(PARTS)
        for turns in range(12):
            task = asyncio.create_task(prefill.prefill(PARTS))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait((task,))
        assert (await cache.stats()).leases == 0


@pytest.mark.parametrize(("where", "least"), [("cold", 20), ("L1", 2), ("L2", 2)])
async def test_who_is_cancelled_in_any_thread_holds_nothing_and_the_next_answer_is_the_same(
    model, monkeypatch, where, least
):
    async with open_cache() as cache:
        right = await make(cache, model).prefill(PARTS)
    calls = {module: module.in_thread for module in (segments, prefix)}

    async def in_thread_until_struck(call, function, /, *args):
        nonlocal left
        left -= 1
        if left == 0:
            asyncio.current_task().cancel()
        return await call(function, *args)

    for strike in count(1):
        async with open_cache(MemoryBackend()) as cache:
            if where != "cold":
                await make(cache, model).prefill(PARTS)
            if where == "L2":
                await cache.flush()
                await cache.clear("l1")
            prefill, left = make(cache, model), strike
            with monkeypatch.context() as patch:
                for module, call in calls.items():
                    patch.setattr(module, "in_thread", partial(in_thread_until_struck, call))
                (done,) = await asyncio.gather(prefill.prefill(PARTS), return_exceptions=True)
            stats = await cache.stats()
            assert (stats.requests, stats.leases, stats.reserved_bytes) == (0, 0, 0)
            assert same(right, await prefill.prefill(PARTS))
            if left > 0:
                break
            assert isinstance(done, asyncio.CancelledError)
    assert strike > least and same(right, done)


async def test_kv_is_copied_in_threads_and_not_in_the_loop(model, monkeypatch):
    longer = [Text([*PARTS[0].tokens, *passage(6, 8)]), *PARTS[1:]]  # of a leading text a part is there
    threads = []

    def noted(call):
        def in_which_thread(*args, **options):
            threads.append(threading.current_thread())
            return call(*args, **options)

        return in_which_thread

    async with open_cache() as cache:
        prefill = make(cache, model)
        for copies, name in ((transformers.DynamicCache, "update"), (segments.BlendedCache, "__init__")):
            monkeypatch.setattr(copies, name, noted(getattr(copies, name)))
        for parts in (PARTS, longer):
            await prefill.prefill(parts)
    assert threads and threading.current_thread() not in threads


async def test_what_cannot_be_a_prompt_is_refused(model):
    async with open_cache() as cache:
        prefill = make(cache, model)
        for parts, error, words in (
            ([], ValueError, "must not be empty"),
            ([Segment([]), Text([])], ValueError, "must not be empty"),
            ([[1, 2]], TypeError, "must be a Segment or a Text, not a list"),
            ([Text([64])], ValueError, "token 64 is not one of the model's 64"),
            ([Segment("text")], TypeError, "token ids"),
            ([Segment(passage(2, CHUNK))] * 257, ValueError, "1 to 256 parts"),
        ):
            with pytest.raises(error, match=words):
                await prefill.prefill(parts)
        for options, words in (
            ({"first_tokens": -1}, "first_tokens must be"),
            ({"first_tokens": 1.0}, "first_tokens must be"),
            ({"context": [64]}, "token 64 is not one"),
            ({"salt": "\n"}, "salt contains"),
        ):
            with pytest.raises(ValueError, match=words):
                make(cache, model, **options)


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MLA = {
    "num_key_value_heads": 4,
    "first_k_dense_replace": 3,  # no layer has experts
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}


def scaled(rope_type, **scaling):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **scaling}}


@pytest.mark.parametrize(
    ("kind", "sizes", "why"),
    [
        ("Llama", scaled("dynamic", factor=2.0), "be cached: its dynamic positions depend on the length"),
        (
            "Phi3",
            IDS | scaled("longrope", factor=2.0, short_factor=[1.0] * 4, long_factor=[4.0] * 4),
            "be cached: its longrope positions depend on the length",
        ),
        ("Mistral", {"sliding_window": 8}, "be cached: layer 0 has no full attention"),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "be cached: layer 1 has no",
        ),
        ("Gemma3Text", {"head_dim": 8}, "be cached: layer 0 has no full attention"),
        ("DeepseekV3", MLA, "be cached: keys and values of a token are not all alike"),
        ("Mamba", {}, "be cached: layer 0 has no full attention"),
        ("GPT2", IDS | {"n_head": 4, "n_positions": 2048}, "have its KV moved: it has no rotary positions"),
        ("Falcon", IDS | {"alibi": True}, "have its KV moved: layer 0 at another position is not the same"),
    ],
)
async def test_a_model_whose_kv_depends_on_more_than_its_place_is_refused(kind, sizes, why):
    async with open_cache() as cache:
        with pytest.raises(ValueError, match=f"'tiny' cannot {why}"):
            make(cache, make_kind(kind, **sizes))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Qwen2", {}),
        ("Mistral", {"sliding_window": None}),
        ("Phi3", IDS),
        ("GPTNeoX", IDS),  # a quarter of the dimensions turns
        ("Llama", scaled("linear", factor=4.0)),
    ],
)
async def test_a_model_that_turns_its_keys_is_let_in_and_a_hit_is_what_it_computes(kind, sizes):
    model = make_kind(kind, **sizes)
    async with open_cache() as cache:
        cold = await make(cache, model).prefill(PARTS)
        warm = await make(cache, model).prefill(PARTS)
        assert (cold.result.chunks, warm.result.chunks) == (0, 2 + SEGMENT_CHUNKS)
        assert same(cold, warm)


def test_tokens_are_cut_behind_each_separator():
    assert segments.split_at([1, 0, 2, 3, 0, 4], [0]) == [[1, 0], [2, 3, 0], [4]]
    assert segments.split_at([1, 0, 0, 0, 0], [0, 0]) == [[1, 0, 0], [0, 0]]
    assert segments.split_at([1, 2], [3]) == [[1, 2]] and segments.split_at([], [3]) == [[]]
    with pytest.raises(ValueError, match="separator must not be empty"):
        segments.split_at([1], [])


async def test_the_benchmark_tells_what_each_method_costs(model, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(TESTS.parent / "benchmarks")
    benchmark = importlib.import_module("segments")
    documents = [passage(number, 70) for number in range(8)]
    material = benchmark.Material([1, 2, 3], [4] * 9, documents, [[5, 6], [7]])
    monkeypatch.setattr(benchmark, "load", lambda: (model, material))
    monkeypatch.setattr(benchmark, "L1_BYTES", 2**22)
    await benchmark.quality(2)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    told = {(row[0], row[1]): row[2:] for row in rows[1:]}
    assert len(told) == 3 * 7 and {len(row) for row in told.values()} == {7}

    class All(benchmark.DeviationPrefill):
        def __init__(self, *args, **options):
            super().__init__(*args, share=1.0, early=benchmark.EarlyKeys(args[1]), **options)

    monkeypatch.setattr(benchmark, "methods", lambda model: [benchmark.Method("all", All, 0.5)])
    await benchmark.quality(1, tmp_path / "results")
    capsys.readouterr()
    compared, compare = [], benchmark.compare

    async def count(*case):
        compared.append(case)
        return await compare(*case)

    monkeypatch.setattr(benchmark, "compare", count)
    for _ in range(2):
        await benchmark.quality(2, tmp_path / "results")
        row = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
        assert row[2:] == ["2", "0.000", "0.000", "2", "20.0", "2", "100%"]
        assert len(compared) == 3  # of each context the second case, once
