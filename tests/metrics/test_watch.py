"""What is counted of a cache is what its requests got: by tenant, model and tier, with its times and reasons."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from contract.support import CHUNK_TOKENS, LAYOUT, PAGE, fill, make_layout, make_prompt
from prometheus_client.parser import text_string_to_metric_families

from async_cache import AsyncCache, CacheConfig, Shortfall
from async_cache.l2 import Backend
from async_cache.l2.memory import MemoryBackend
from async_cache.metrics import Watch, exposition
from async_cache.metrics.names import OTHER
from async_cache.metrics.residence import Residence
from async_cache.metrics.traffic import Tokens
from async_cache.metrics.watch import Sample
from async_cache.prompt.layout import Prompt
from async_cache.testing.backends import FailingBackend, GatedBackend
from async_cache.testing.virtual import run_virtual
from async_cache.write.queue import WriteQueue


def tenant_of(request_id: str) -> str:
    return request_id.partition("/")[0]


@asynccontextmanager
async def watched(
    backends: Sequence[Backend] = (), l1_bytes: int = 16 * PAGE
) -> AsyncIterator[tuple[AsyncCache, Watch]]:
    async with AsyncCache(CacheConfig(l1_bytes=l1_bytes), backends) as cache:
        watch = Watch(cache.core, tenant_of)
        watch.open()
        try:
            yield cache, watch
        finally:
            await watch.close()


async def ask(cache: AsyncCache, prompt: Prompt, request_id: str) -> None:
    """A request, from its beginning to its end."""
    await cache.prefetch(prompt, request_id=request_id).load_done
    await cache.end_request(request_id)


async def values(watch: Watch) -> dict[str, float]:
    """What Prometheus reads, by name and labels."""
    text = (await exposition(watch)).decode()
    return {
        sample.name + "".join(f" {value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_tokens_are_counted_by_tenant_model_and_tier() -> None:
    async with watched([MemoryBackend()]) as (cache, watch):
        await fill(cache, make_prompt(3))
        await cache.flush()
        await ask(cache, make_prompt(4), "acme/1")
        await cache.clear("l1")
        await ask(cache, make_prompt(5), "acme/2")
        await ask(cache, make_prompt(2, layout=make_layout(model="other model")), "beta/1")
        assert watch.traffic.by_names == {
            ("acme", "model"): Tokens(2, 9 * CHUNK_TOKENS, 3 * CHUNK_TOKENS, 3 * CHUNK_TOKENS),
            ("beta", "other model"): Tokens(1, 2 * CHUNK_TOKENS),
        }
        shown = await values(watch)
        assert shown["async_cache_prefix_cache_queries_total model acme"] == 9 * CHUNK_TOKENS
        assert shown["async_cache_prefix_cache_hits_total model acme l1"] == 3 * CHUNK_TOKENS
        assert shown["async_cache_prefix_cache_hits_total model acme l2"] == 3 * CHUNK_TOKENS
        assert shown["async_cache_promises_kept_total"] == 3
        assert shown["async_cache_l1_removed_chunks_total deleted"] == 3
        assert shown["async_cache_backend_stored_bytes_total memory"] == 3 * 16
        assert shown["async_cache_backend_loaded_bytes_total memory"] == 3 * 16
        assert shown["async_cache_backend_calls_total memory succeeded load"] == 1


def test_lookup_gap_and_load_are_timed() -> None:
    async def main() -> None:
        gated = GatedBackend(MemoryBackend())
        async with watched([gated]) as (cache, watch):
            await fill(cache, make_prompt(2))
            await cache.flush()
            await cache.clear("l1")
            gated.hold("lookup", "load")
            asking = asyncio.create_task(ask(cache, make_prompt(2), "acme/1"))
            await gated.reached("lookup", gated.calls["lookup"] + 1)
            await asyncio.sleep(0.5)
            gated.release("lookup")
            await gated.reached("load")
            await asyncio.sleep(4)
            gated.release()
            await asking
            traffic = watch.traffic
            assert [round(it.total, 3) for it in (traffic.lookup, traffic.gap, traffic.load)] == [0.5, 4.0, 4.5]
            await ask(cache, make_prompt(2), "acme/2")
            assert [sum(it.counts) for it in (traffic.lookup, traffic.gap, traffic.load)] == [2, 1, 1]

    run_virtual(main())


async def test_a_broken_promise_is_counted_with_its_reason() -> None:
    async with watched([FailingBackend(MemoryBackend(), "load", times=1)]) as (cache, watch):
        await fill(cache, make_prompt(2))
        await cache.flush()
        await cache.clear("l1")
        await ask(cache, make_prompt(2), "acme/1")
        assert dict(watch.traffic.broken) == {"backend_error": 1}
        assert watch.traffic.kept == 0
        assert watch.traffic.recent[0].result.shortfall is Shortfall.BACKEND_ERROR
        shown = await values(watch)
        assert shown["async_cache_promises_broken_total backend_error"] == 1
        assert shown["async_cache_backend_calls_total memory failed load"] == 1


async def test_a_promise_that_was_trimmed_is_counted_with_its_reason() -> None:
    async with watched([MemoryBackend()], l1_bytes=4 * PAGE) as (cache, watch):
        for begin in range(8):
            await fill(cache, make_prompt(8), chunks=[begin])
            await cache.flush()
        await ask(cache, make_prompt(8), "acme/1")
        assert dict(watch.traffic.trimmed) == {"memory": 1}


async def test_a_chunk_that_is_larger_than_a_backend_is_counted_as_refused_for_its_capacity() -> None:
    async with watched([MemoryBackend("small", capacity_bytes=15)]) as (cache, watch):
        await fill(cache, make_prompt(3))
        await cache.flush()
        shown = await values(watch)
        refused = {why: shown[f"async_cache_backend_refused_chunks_total small {why}"] for why in WriteQueue.REFUSALS}
        assert refused == {"admit": 0, "write_budget": 0, "capacity": 3}


async def test_labels_are_bounded_whatever_clients_make_up() -> None:
    async with watched() as (cache, watch):
        for number in range(100):
            layout = make_layout(model=f"model {number % 40}")
            await ask(cache, make_prompt(1, layout=layout), f"tenant {number}/1")
        tokens = watch.traffic.by_names
        assert len({tenant for tenant, _ in tokens}) == 33 and len({model for _, model in tokens}) == 17
        assert sum(it.requests for it in tokens.values()) == 100
        for _ in range(20):
            await ask(cache, make_prompt(1), "tenant 99/1")
        assert all(tenant != "tenant 99" for tenant, _ in tokens)
        watch.traffic.rank()
        await ask(cache, make_prompt(1), "tenant 99/1")
        mine = [it.requests for (tenant, _), it in watch.traffic.by_names.items() if tenant == "tenant 99"]
        assert sum(mine) == 1, "it begins at 0: what was other stays there"
        assert len({tenant for tenant, _ in watch.traffic.by_names}) == 33
        assert watch.traffic.by_names[OTHER, OTHER].requests > 0
        assert watch.traffic.all.requests == 121, "also those that are not shown any more"


def test_the_last_five_minutes_are_kept() -> None:
    async def main() -> None:
        async with watched() as (cache, watch):
            await ask(cache, make_prompt(1), "acme/1")
            await asyncio.sleep(100.1)
            await fill(cache, make_prompt(1))
            await ask(cache, make_prompt(1), "acme/2")
            history = watch.history
            assert [round(sample.seconds) for sample in history] == [*range(0, 101, 2), 100]
            assert [sample.requests for sample in history] == [0, *[1] * 50, 2]
            assert history[-1] == Sample(history[-1].seconds, 2, 2 * CHUNK_TOKENS, CHUNK_TOKENS, 0)
            await asyncio.sleep(1000)
            assert [round(watch.history[-1].seconds - watch.history[0].seconds), len(watch.history)] == [298, 151]

    run_virtual(main())


def test_how_long_chunks_stay_is_seen_in_a_sample() -> None:
    index: set[bytes] = set()
    now = 0.0
    residence = Residence(index, lambda: now)
    prompts = [make_prompt(1, number) for number in range(400)]
    sample = [prompt for prompt in prompts if not prompt.chunk_hashes[0][0] % 8]
    assert 20 < len(sample) < 100
    for prompt in prompts:
        residence.asked(prompt.chunk_hashes)
        index.update(prompt.chunk_hashes)
    residence.look()
    now = 30.0
    for prompt in prompts:
        residence.asked(prompt.chunk_hashes)
    now = 100.0
    index.clear()
    residence.look()
    residence.look()
    seen = [(sum(it.counts), it.total) for it in (residence.reuse_gap, residence.lifetime, residence.idle)]
    assert seen == [(len(sample), len(sample) * seconds) for seconds in (30.0, 100.0, 70.0)]


async def test_the_sample_is_bounded() -> None:
    residence = Residence(set(), lambda: 0.0)
    for number in range(40_000):
        residence.asked(LAYOUT.prompt([number] * CHUNK_TOKENS).chunk_hashes)
    assert len(residence._stays) == 2048


def test_a_loop_that_is_held_lags() -> None:
    async def main() -> None:
        async with watched() as (_, watch):
            await asyncio.sleep(2)
            assert watch.worst_lag_seconds == 0
            clock = watch.clock
            watch.clock = lambda: clock() + 3.0
            await asyncio.sleep(0.4)
            watch.clock = lambda: clock() + 6.0
            await asyncio.sleep(0.2)
            assert watch.worst_lag_seconds == pytest.approx(3.0)
            await asyncio.sleep(11)
            assert watch.worst_lag_seconds == 0

    run_virtual(main())


async def test_nothing_is_counted_after_the_end() -> None:
    async with AsyncCache(CacheConfig(l1_bytes=16 * PAGE), []) as cache:
        watch = Watch(cache.core, tenant_of)
        watch.open()
        await ask(cache, make_prompt(1), "acme/1")
        await watch.close()
        await watch.close()
        await ask(cache, make_prompt(1), "acme/2")
        assert sum(it.requests for it in watch.traffic.by_names.values()) == 1


async def test_what_cannot_be_counted_is_logged_and_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def nobody(request_id: str) -> str:
        raise LookupError(request_id)

    async with AsyncCache(CacheConfig(l1_bytes=16 * PAGE), []) as cache:
        watch = Watch(cache.core, nobody)
        watch.open()
        await fill(cache, make_prompt(2))
        assert (await cache.prefetch(make_prompt(2), request_id="acme/1").load_done).chunks == 2
        assert "a request could not be counted" in caplog.text
        await watch.close()
