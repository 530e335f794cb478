"""A tiny model, prefilled through a cache: embedded, and behind a server."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from contract.served import serve
from contract.support import Scripted, object_keys, settle

from async_cache import AsyncCache, BackendError, BlockingClient, CacheConfig, ServerConfig, TenantConfig, connect
from async_cache.l2 import Backend
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.memory import MemoryBackend
from async_cache.server import Server
from async_cache.testing import BitFlipBackend, FailingBackend, GatedBackend
from async_cache.values import Shortfall

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="needs the extra async-kv-cache[transformers]")
integration = pytest.importorskip("async_cache.integrations.transformers")
CachedPrefix, kv_layout = integration.CachedPrefix, integration.kv_layout

CHUNK = 8
TOKENS = [7 * n % 61 for n in range(3 * CHUNK + 5)]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PLACES = ["embedded", "mapped", "framed", "bound"]


def make_model(dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | sizes, name_or_path="tiny")
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices, on a machine that has other things to do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return make_model()


@asynccontextmanager
async def open_cache(*backends: Backend, place: str = "embedded", l1_bytes: int = 2**20) -> AsyncIterator[AsyncCache]:
    config = CacheConfig(l1_bytes=l1_bytes, l2=[])
    async with AsyncCache(config, backends) if place == "embedded" else serve(config, backends, place) as cache:
        yield cache
        stats = await cache.stats()
        assert (stats.requests, stats.leases, stats.reserved_bytes, stats.quarantined_bytes) == (0, 0, 0, 0)
        cache.check_integrity()


def make_prefix(cache, model, **options):
    return CachedPrefix(cache, model, **{"chunk_tokens": CHUNK} | options)


async def compute_cold(model, tokens=TOKENS):
    """What the model says where nothing is cached."""
    async with open_cache() as cache:
        logits, kv, result = await make_prefix(cache, model).prefill(tokens)
        assert result.chunks == 0
        return logits, kv


async def fill_l2(cache, prefix, kv, tokens=TOKENS) -> None:
    await prefix.store(tokens, kv)
    assert (await cache.flush()).pending == 0
    await cache.clear(tier="l1")


def assert_bit_equal(one, other) -> None:
    """Logits and KV."""
    assert torch.equal(one[0], other[0])
    for layer, same in zip(one[1].layers, other[1].layers, strict=True):
        assert torch.equal(layer.keys, same.keys)
        assert torch.equal(layer.values, same.values)


# The same, bit for bit.


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("chunks", [0, 1, 3])
async def test_kv_and_logits_are_bit_equal_whatever_was_cached(model, place, chunks) -> None:
    cold = await compute_cold(model)
    async with open_cache(place=place) as cache:
        prefix = make_prefix(cache, model)
        assert await prefix.store(TOKENS[: chunks * CHUNK], cold[1]) == chunks
        logits, kv, result = await prefix.prefill(TOKENS)
        assert (result.chunks, result.l1_chunks, result.shortfall) == (chunks, chunks, None)
        assert_bit_equal((logits, kv), cold)
        assert await prefix.store(TOKENS, kv) == 3 - chunks


@pytest.mark.parametrize("place", PLACES)
async def test_what_comes_from_storage_is_bit_equal(model, place) -> None:
    cold = await compute_cold(model)
    async with open_cache(MemoryBackend(), place=place) as cache:
        prefix = make_prefix(cache, model)
        await fill_l2(cache, prefix, cold[1])
        logits, kv, result = await prefix.prefill(TOKENS)
        assert (result.chunks, result.l2_chunks) == (3, 3)
        assert_bit_equal((logits, kv), cold)


async def test_bfloat16_is_bit_equal() -> None:
    model = make_model(torch.bfloat16)
    cold = await compute_cold(model)
    async with open_cache() as cache:
        prefix = make_prefix(cache, model)
        await prefix.store(TOKENS, cold[1])
        warm = await prefix.prefill(TOKENS)
        assert warm.result.chunks == 3
        assert_bit_equal(warm, cold)


async def test_the_loaded_kv_shares_no_memory_with_the_cache(model) -> None:
    async with open_cache() as cache:
        prefix = make_prefix(cache, model)
        await prefix.store(TOKENS, (await compute_cold(model))[1])
        kv, result = await prefix.load(TOKENS)
        assert result.chunks == 3
        kv.layers[0].keys.zero_()
        other, _ = await prefix.load(TOKENS)
        assert other.layers[0].keys.any()


# Lengths.


@pytest.mark.parametrize("count", [1, CHUNK - 1])
async def test_tokens_shorter_than_a_chunk_are_computed(model, count) -> None:
    cold = await compute_cold(model, TOKENS[:count])
    async with open_cache() as cache:
        prefix = make_prefix(cache, model)
        warm = await prefix.prefill(TOKENS[:count])
        assert_bit_equal(warm, cold)
        assert await prefix.store(TOKENS[:count], warm.kv) == 0


async def test_the_last_token_is_computed_and_its_chunk_is_stored(model) -> None:
    whole = TOKENS[: 2 * CHUNK]
    async with open_cache() as cache:
        prefix = make_prefix(cache, model)
        cold = await prefix.prefill(whole)
        assert await prefix.store(whole, cold.kv) == 2
        warm = await prefix.prefill(whole)
        assert warm.result.chunks == 1
        assert_bit_equal(warm, cold)
        assert (await prefix.load(TOKENS)).result.chunks == 2


async def test_only_what_the_kv_has_is_stored(model) -> None:
    async with open_cache() as cache:
        prefix = make_prefix(cache, model)
        kv = (await prefix.prefill(TOKENS[: CHUNK + 3])).kv
        assert await prefix.store(TOKENS, kv) == 1


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda tokens: torch.tensor(tokens, dtype=torch.int32)])
async def test_tokens_of_any_kind_are_the_same_prompt(model, kind) -> None:
    async with open_cache() as cache:
        prefix = make_prefix(cache, model)
        await prefix.store(TOKENS, (await compute_cold(model))[1])
        assert (await prefix.prefill(kind(TOKENS))).result.chunks == 3


# Faults.


@pytest.mark.parametrize("place", ["embedded", "mapped"])
@pytest.mark.parametrize(
    ("answer", "shortfall"), [(LoadOutcome.GONE, Shortfall.GONE), (LoadOutcome.CORRUPT, Shortfall.CORRUPT)]
)
@pytest.mark.parametrize("missing", [0, 1, 2])
async def test_what_falls_short_in_the_middle_is_computed(model, place, answer, shortfall, missing) -> None:
    cold = await compute_cold(model)
    backend = Scripted(MemoryBackend())
    async with open_cache(backend, place=place) as cache:
        prefix = make_prefix(cache, model)
        await fill_l2(cache, prefix, cold[1])
        (key,) = object_keys(prefix.prompt(TOKENS), chunks=[missing])
        backend.load_answers[key] = answer
        warm = await prefix.prefill(TOKENS)
        assert (warm.result.chunks, warm.result.shortfall) == (missing, shortfall)
        assert_bit_equal(warm, cold)


@pytest.mark.parametrize("place", ["embedded", "mapped"])
async def test_a_backend_that_fails_in_the_middle_of_the_load_gives_the_same_logits(model, place) -> None:
    cold = await compute_cold(model)
    backend = FailingBackend(MemoryBackend(), "load", nth=2, error=BackendError("the disk is gone"))
    async with open_cache(backend, place=place) as cache:
        prefix = make_prefix(cache, model)
        await fill_l2(cache, prefix, cold[1])
        assert (await prefix.load(TOKENS[: CHUNK + 1])).result.chunks == 1  # the first chunk is in memory
        warm = await prefix.prefill(TOKENS)
        assert (warm.result.chunks, warm.result.shortfall) == (1, Shortfall.BACKEND_ERROR)
        assert_bit_equal(warm, cold)


async def test_a_flipped_bit_reaches_no_model(model) -> None:
    cold = await compute_cold(model)
    async with open_cache(BitFlipBackend(MemoryBackend())) as cache:
        prefix = make_prefix(cache, model)
        await fill_l2(cache, prefix, cold[1])
        warm = await prefix.prefill(TOKENS)
        assert (warm.result.chunks, warm.result.shortfall) == (0, Shortfall.CORRUPT)
        assert_bit_equal(warm, cold)


async def test_a_cache_that_is_too_small_keeps_the_head(model) -> None:
    cold = await compute_cold(model)
    layout = kv_layout(model, chunk_tokens=CHUNK)
    async with open_cache(l1_bytes=2 * layout.objects.room_bytes[0]) as cache:
        prefix = make_prefix(cache, model)
        assert await prefix.store(TOKENS, cold[1]) == 2
        warm = await prefix.prefill(TOKENS)
        assert warm.result.chunks == 2
        assert_bit_equal(warm, cold)


async def test_a_request_that_was_ended_is_computed(model, caplog) -> None:
    async with open_cache() as cache:
        prefix = make_prefix(cache, model)
        prefetch = prefix.prefetch(TOKENS)
        await cache.end_request(prefetch.request_id)
        kv, result = await prefix.read(prefetch)
        assert (kv.get_seq_length(), result.chunks, result.shortfall) == (0, 0, Shortfall.BACKEND_ERROR)
        assert "computed without the cache" in caplog.text


async def test_without_its_server_the_model_computes_and_says_so(model, caplog, tmp_path) -> None:
    cold = await compute_cold(model)
    url = f"unix://{tmp_path}/s"
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache:
        server = Server(cache, ServerConfig(listen=(url,)))
        await server.__aenter__()
        async with connect(url) as client:
            prefix = make_prefix(client, model)
            await prefix.store(TOKENS, cold[1])
            assert (await prefix.prefill(TOKENS)).result.chunks == 3
            await server.close()
            warm = await prefix.prefill(TOKENS)
            assert (warm.result.chunks, warm.result.shortfall) == (0, Shortfall.BACKEND_ERROR)
            assert_bit_equal(warm, cold)
            assert await prefix.store(TOKENS, warm.kv) == 0
            await prefix.prefill(TOKENS)
            assert await prefix.store(TOKENS, warm.kv) == 0
    assert "computed without the cache" in caplog.text
    assert "not stored" in caplog.text
    assert len(caplog.records) <= 3, "it was lost, there is none, and nothing is stored: not once for each prompt"


@pytest.mark.parametrize("make", [AsyncCache, lambda: connect("unix:///nowhere/s")])
async def test_with_a_cache_that_is_not_open_the_model_computes_and_says_so(model, caplog, make) -> None:
    cold = await compute_cold(model)
    prefix = make_prefix(make(), model)
    for _ in range(3):
        assert_bit_equal(await prefix.prefill(TOKENS), cold)
        assert await prefix.store(TOKENS, cold[1]) == 0
    assert len(caplog.records) == 2


async def test_with_a_salt_that_its_token_may_not_use_the_model_computes_and_says_so(model, caplog, tmp_path) -> None:
    cold = await compute_cold(model)
    url = f"unix://{tmp_path}/s"
    tenants = {"tenant": TenantConfig(tokens=("secret-of-a-tenant",), salts=("mine",))}
    async with (
        AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache,
        Server(cache, ServerConfig(listen=(url,), tenants=tenants)),
        connect(url, token="secret-of-a-tenant") as client,
    ):
        mine, other = make_prefix(client, model, salt="mine"), make_prefix(client, model, salt="another's")
        assert await mine.store(TOKENS, cold[1]) == 3
        assert (await mine.prefill(TOKENS)).result.chunks == 3
        warm = await other.prefill(TOKENS)
        assert warm.result.chunks == 0
        assert_bit_equal(warm, cold)
        assert "computed without the cache: the token is not for the salt" in caplog.text
        assert await other.store(TOKENS, warm.kv) == 0


# Cancelling.


class Held:
    """Makes a function of a thread wait."""

    def __init__(self, function):
        self._function = function
        self.entered = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.released = threading.Event()

    def __call__(self, *args):
        self._loop.call_soon_threadsafe(self.entered.set)
        assert self.released.wait(60)
        return self._function(*args)


@pytest.mark.parametrize("place", ["embedded", "mapped", "framed"])
@pytest.mark.parametrize("verb", ["load", "store", "prefill"])
async def test_a_cancel_waits_for_whoever_touches_the_memory_and_leaves_nothing(
    model, monkeypatch, place, verb
) -> None:
    cold = await compute_cold(model)
    async with open_cache(place=place) as cache:
        prefix = make_prefix(cache, model)
        if verb == "store":
            held, call = Held(integration._copy_chunk), prefix.store(TOKENS, cold[1])
            monkeypatch.setattr(integration, "_copy_chunk", held)
        else:
            await prefix.store(TOKENS, cold[1])
            held, call = Held(prefix._rebuild), getattr(prefix, verb)(TOKENS)
            monkeypatch.setattr(prefix, "_rebuild", held)
        task = asyncio.create_task(call)
        await held.entered.wait()
        for _ in range(2):  # also the second cancel
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        stats = await cache.stats()
        assert stats.leases or stats.reserved_bytes
        assert not task.done()
        held.released.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task, call, held  # the cancel knows the frames that it passed, and they know a tensor
        gc.collect()
        async with asyncio.timeout(60):  # and so does the thread, until it has gone on
            while (await cache.stats()).quarantined_bytes:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert (await cache.stats()).l1_chunks == (0 if verb == "store" else 3)


@pytest.mark.parametrize("place", ["embedded", "mapped"])
async def test_a_cancelled_wait_for_the_load_ends_its_request(model, place) -> None:
    backend = GatedBackend(MemoryBackend())
    async with open_cache(backend, place=place) as cache:
        prefix = make_prefix(cache, model)
        await fill_l2(cache, prefix, (await compute_cold(model))[1])
        backend.hold("load")
        task = asyncio.create_task(prefix.load(TOKENS))
        await backend.reached("load")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await cache.stats()).requests == 0
        await settle()  # the load's memory goes when the load has ended


# Who never meets.


@pytest.mark.parametrize(
    "options",
    [{"name": "other"}, {"revision": "2"}, {"chunk_tokens": 4}, {"salt": "tenant"}, {"adapter": "lora"}],
    ids=lambda options: next(iter(options)),
)
async def test_another_identity_never_meets(model, options) -> None:
    async with open_cache() as cache:
        prefix = make_prefix(cache, model)
        await prefix.store(TOKENS, (await compute_cold(model))[1])
        other = make_prefix(cache, model, **options)
        assert (await other.prefill(TOKENS)).result.chunks == 0


@pytest.mark.parametrize(
    "sizes",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
        {"num_hidden_layers": 2},
        {"num_key_value_heads": 4},
        {"head_dim": 16},
    ],
    ids=lambda sizes: " ".join(map(str, next(iter(sizes.items())))),
)
async def test_a_model_of_another_dtype_or_shape_never_meets(model, sizes) -> None:
    other = make_model(**sizes)
    cold = await compute_cold(other)
    async with open_cache() as cache:
        await make_prefix(cache, model).store(TOKENS, (await compute_cold(model))[1])
        prefix = make_prefix(cache, other)
        warm = await prefix.prefill(TOKENS)
        assert warm.result.chunks == 0
        assert_bit_equal(warm, cold)
        await prefix.store(TOKENS, warm.kv)
        assert (await prefix.prefill(TOKENS)).result.chunks == 3


def test_a_model_has_the_name_and_the_commit_that_it_was_loaded_by() -> None:
    model = make_model()
    model.config.name_or_path, model.config._commit_hash = "owner/model", "c0ffee"
    layout = kv_layout(model)
    assert (layout.model, layout.revision, layout.chunk_tokens) == ("owner/model", "c0ffee sdpa", 256)
    assert layout.groups[0].shape == (2, 3, 2, 256, 8)
    assert kv_layout(model, name="mine", revision="7").revision == "7 sdpa"


# What can not be used.


@pytest.mark.parametrize("kind", ["MistralConfig", "Gemma3TextConfig", "Qwen3NextConfig", "T5Config"])
def test_a_model_without_full_attention_in_every_layer_is_refused(kind) -> None:
    with pytest.raises(ValueError, match="'m' cannot be cached: "):
        integration.check_cacheable(getattr(transformers, kind)(), "m")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_whose_positions_depend_on_what_follows_is_refused(kind) -> None:
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = transformers.LlamaConfig(**SIZES)
    config.rope_parameters = rope
    with pytest.raises(ValueError, match=f"'m' cannot be cached: its {kind} positions"):
        integration.check_cacheable(config, "m")


def test_a_model_with_one_latent_head_is_cached_by_the_shape_that_it_has_or_refused() -> None:
    """The configuration says something else than what is kept."""
    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=True
    )
    falcon = transformers.FalconForCausalLM(config).eval()
    assert kv_layout(falcon, name="m", chunk_tokens=CHUNK).groups[0].shape == (2, 2, 1, CHUNK, 8)
    sizes = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = transformers.DeepseekV3Config(**SIZES | sizes | {"num_key_value_heads": 4}, first_k_dense_replace=3)
    deepseek = transformers.DeepseekV3ForCausalLM(config).eval()
    with pytest.raises(ValueError, match="'m' cannot be cached: keys and values of a token are not all alike"):
        kv_layout(deepseek, name="m")


def test_a_model_without_a_name_is_refused() -> None:
    nameless = make_model()
    nameless.config.name_or_path = ""
    with pytest.raises(ValueError, match="pass `name`"):
        kv_layout(nameless)


def test_a_cache_that_does_not_await_is_refused(model) -> None:
    with pytest.raises(TypeError, match="not BlockingClient"):
        CachedPrefix(BlockingClient.__new__(BlockingClient), model)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="not LlamaConfig"):
        CachedPrefix(AsyncCache(), transformers.LlamaConfig(name_or_path="tiny"))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], ValueError, "must not be empty"),
        ([1, 64], ValueError, "token 64 is not one of the model's 64"),
        ([1, -2], ValueError, "between 0 and"),
        ([1.5], TypeError, "integers"),
        ("words", TypeError, "integers"),
        (torch.zeros(1, 9, dtype=torch.long), TypeError, "2 dimensions"),
    ],
)
async def test_tokens_that_the_model_can_not_read_are_refused(model, tokens, error, message) -> None:
    async with open_cache() as cache:
        with pytest.raises(error, match=message):
            await make_prefix(cache, model).prefill(tokens)


async def test_a_model_that_is_trained_is_refused() -> None:
    async with open_cache() as cache:
        with pytest.raises(ValueError, match="eval"):
            await make_prefix(cache, make_model().train()).prefill(TOKENS)


async def test_kv_of_another_model_is_refused(model) -> None:
    async with open_cache() as cache:
        prefix = make_prefix(cache, model)
        for sizes, message in [
            ({"num_hidden_layers": 2}, "2 layers"),
            ({"num_key_value_heads": 4}, r"\(1, 4, 29, 8\)"),
            ({"dtype": torch.float64}, "float64"),
        ]:
            _, kv = await compute_cold(make_model(**sizes))
            with pytest.raises(ValueError, match=message):
                await prefix.store(TOKENS, kv)
        static = transformers.StaticCache(config=model.config, max_cache_len=64)
        with pytest.raises(TypeError, match="not StaticCache"):
            await prefix.store(TOKENS, static)


async def test_kv_that_lacks_nothing_is_refused(model) -> None:
    _, kv = await compute_cold(model)
    async with open_cache() as cache:
        with pytest.raises(ValueError, match="nothing is left"):
            await make_prefix(cache, model).compute(TOKENS, kv)
