"""Each metric and reason is planted, and seen in the text that Prometheus reads, where it was not before.

A family that nothing here plants fails a test of its own, and so does a reason.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest
from contract.support import CHUNK_TOKENS, OBJECT_BYTES, PAGE, fill, fill_l2, make_prompt, make_tokens, object_keys
from prometheus_client.parser import text_string_to_metric_families

from async_cache import AsyncCache, CacheConfig, Prefetch, Removal
from async_cache.l2.memory import MemoryBackend
from async_cache.metrics import Watch, exposition
from async_cache.metrics.traffic import REASONS
from async_cache.prompt.layout import Prompt
from async_cache.testing.backends import GatedBackend, flip_bit
from async_cache.testing.virtual import run_virtual
from async_cache.values import Shortfall

PAGES = 16
CAPACITY = 2**20
CONFIG = CacheConfig(
    l1_bytes=PAGES * PAGE,
    load_timeout_seconds=5,
    lookup_timeout_seconds=1,
    breaker_failures=2,
    breaker_reset_seconds=10,
)
TOKENS = make_tokens(3)
SAMPLED = next(prompt for n in range(100) if not (prompt := make_prompt(1, n)).chunk_hashes[0][0] % 8)
"""Of the chunks whose stay is looked at, as one in eight."""


class Rig(NamedTuple):
    """A cache that is watched, its only backend, and what is behind that."""

    cache: AsyncCache
    watch: Watch
    near: GatedBackend
    disk: MemoryBackend

    async def values(self) -> dict[str, float]:
        """What Prometheus reads, by name and labels."""
        families = text_string_to_metric_families((await exposition(self.watch)).decode())
        return {
            " ".join(
                [sample.name.removeprefix("async_cache_"), *(v for _, v in sorted(sample.labels.items()))]
            ): sample.value
            for family in families
            for sample in family.samples
        }

    async def ask(self, prompt: Prompt, **options: Any) -> Prefetch:
        """A request that has loaded, and holds what it has."""
        prefetch = self.cache.prefetch(prompt, request_id="acme/1", **options)
        await prefetch.load_done
        return prefetch

    async def promised(self, prompt: Prompt) -> Prefetch:
        """A request that was promised what is in the backend, which hangs in the load."""
        await fill_l2(self.cache, prompt)
        self.near.hold("load")
        prefetch = self.cache.prefetch(prompt, request_id="acme/1")
        await prefetch.lookup_done
        await self.near.reached("load", self.near.calls["load"] + 1)
        return prefetch

    def vanish(self) -> None:
        """Have the backend lose all that it has, and tell nobody."""
        self.disk._objects.clear()
        self.disk._index.clear(1)

    async def fill_l1(self, *prompts: Prompt) -> None:
        """Store prompts, of which nothing is written back."""
        self.near.hold("store")
        for prompt in prompts:
            await fill(self.cache, prompt)

    def fail(self, verb: str) -> None:
        """Have calls of one verb fail from now on."""

        async def fail(called: str, keys: object, buffers: object) -> None:
            if called == verb:
                raise OSError("the disk is gone")

        self.near.before = fail  # type: ignore[method-assign,assignment]


Plant = Callable[[Rig], Awaitable[None]]
SEEN: dict[Plant, dict[str, float]] = {}


def sees(seen: dict[str, float]) -> Callable[[Plant], Plant]:
    """What is to be seen after a plant, and was not before."""

    def add(plant: Plant) -> Plant:
        SEEN[plant] = seen
        return plant

    return add


# What is asked for, found and promised.


@sees({"requests_total model acme": 1, "prefix_cache_queries_total model acme": 4 * CHUNK_TOKENS})
async def a_request(rig: Rig) -> None:
    await rig.ask(make_prompt(4))


@sees({"prefix_cache_hits_total model acme l1": 3 * CHUNK_TOKENS, "promises_kept_total": 1, "lookup_seconds_count": 1})
async def hits_in_memory(rig: Rig) -> None:
    await fill(rig.cache, make_prompt(3))
    await rig.ask(make_prompt(4))


@sees(
    {"prefix_cache_hits_total model acme l2": 3 * CHUNK_TOKENS, "load_seconds_sum": 4, "gap_seconds_sum": 4}
    | {"loaded_objects_total": 3, "backend_loaded_bytes_total near": 3 * OBJECT_BYTES}
    | {"backend_calls_total near succeeded load": 1}
)
async def hits_in_storage(rig: Rig) -> None:
    prefetch = await rig.promised(make_prompt(3))
    await asyncio.sleep(4)
    rig.near.release()
    await prefetch.load_done


@sees({"shared_objects_total": 6, "loaded_objects_total": 3})
async def three_that_load_the_same(rig: Rig) -> None:
    first = await rig.promised(make_prompt(3))
    others = [rig.cache.prefetch(make_prompt(3)) for _ in range(2)]
    for other in others:
        await other.lookup_done
    rig.near.release()
    await asyncio.gather(*(prefetch.load_done for prefetch in (first, *others)))


# Why something is missing.


@sees({"misses_total unknown": 1})
async def a_prompt_that_nobody_had(rig: Rig) -> None:
    await rig.ask(make_prompt(1))


@sees({"misses_total diverges": 1})
async def a_prompt_that_goes_on_otherwise(rig: Rig) -> None:
    await fill(rig.cache, make_prompt(2))
    await rig.ask(make_prompt(1).layout.prompt([*TOKENS[:CHUNK_TOKENS], *TOKENS[:CHUNK_TOKENS]]))


@sees({"misses_total writing": 1, "l1_bytes reserved": PAGE})
async def a_prompt_that_is_being_written(rig: Rig) -> None:
    await rig.cache.store(make_prompt(1))
    await rig.ask(make_prompt(1))


@sees({"misses_total capacity": 1, "l1_removed_chunks_total capacity": 1, "writeback_dropped_chunks_total": 1})
async def a_memory_that_is_full(rig: Rig) -> None:
    await rig.fill_l1(make_prompt(1), make_prompt(PAGES, 2))
    await rig.ask(make_prompt(1))


@sees({"misses_total deleted": 1, "l1_removed_chunks_total deleted": 1, "backend_calls_total near succeeded delete": 1})
async def a_deletion(rig: Rig) -> None:
    await fill(rig.cache, make_prompt(1))
    await rig.cache.flush()
    await rig.cache.delete(make_prompt(1))
    await rig.ask(make_prompt(1))


@sees({"misses_total quota": 1})
async def a_backend_that_gives_each_its_share(rig: Rig) -> None:
    await fill_l2(rig.cache, make_prompt(1))
    rig.near.on_removed(make_prompt(1).chunk_hashes[0], Removal.QUOTA)
    rig.vanish()
    await rig.ask(make_prompt(1))


@sees({"misses_total expired": 1})
async def a_backend_whose_chunks_expire(rig: Rig) -> None:
    rig.near.ttl_seconds = 60.0
    await fill_l2(rig.cache, make_prompt(1))
    rig.vanish()
    await asyncio.sleep(61)
    await rig.ask(make_prompt(1))


@sees({"misses_total damaged": 1, "promises_broken_total corrupt": 1})
async def a_bit_that_flips(rig: Rig) -> None:
    await fill_l2(rig.cache, make_prompt(1))
    flip_bit(rig.disk, object_keys(make_prompt(1))[0])
    await rig.ask(make_prompt(1))
    await rig.cache.end_request("acme/1")
    await rig.ask(make_prompt(1))


@sees({"misses_total lost": 1, "promises_broken_total gone": 1})
async def an_object_that_vanishes(rig: Rig) -> None:
    prefetch = await rig.promised(make_prompt(1))
    rig.vanish()
    rig.near.release()
    await prefetch.load_done
    await rig.cache.end_request("acme/1")
    await rig.ask(make_prompt(1))


# Promises.


@sees({"promises_broken_total backend_error": 1, "backend_calls_total near failed load": 1})
async def a_load_that_fails(rig: Rig) -> None:
    await fill_l2(rig.cache, make_prompt(1))
    rig.fail("load")
    await rig.ask(make_prompt(1))


@sees({"promises_broken_total deadline": 1, "l1_bytes quarantined": PAGE})
async def a_load_that_hangs(rig: Rig) -> None:
    prefetch = await rig.promised(make_prompt(1))
    await prefetch.load_done


@sees({"promises_broken_total cancelled": 1, "backend_calls_total near abandoned load": 1})
async def a_load_that_is_given_up(rig: Rig) -> None:
    (await rig.promised(make_prompt(1))).cancel()
    rig.near.release()
    await asyncio.sleep(1)


@sees({"promises_trimmed_total memory": 1, "l1_bytes leased": (PAGES - 1) * PAGE, "leases": PAGES - 1})
async def a_prompt_that_memory_has_no_room_for(rig: Rig) -> None:
    await fill_l2(rig.cache, make_prompt(2, 2))
    await fill(rig.cache, make_prompt(PAGES - 1))
    await rig.cache.prefetch(make_prompt(PAGES - 1), request_id="other/1").load_done
    await rig.cache.store(make_prompt(1, 3))
    await rig.ask(make_prompt(2, 2))


@sees({"promises_trimmed_total deadline": 1})
async def a_lookup_after_its_deadline(rig: Rig) -> None:
    rig.near.hold("lookup")
    await rig.ask(make_prompt(1), deadline_seconds=0.5)


@sees({"promises_trimmed_total backend_error": 1, "backend_calls_total near failed lookup": 1})
async def a_lookup_that_hangs(rig: Rig) -> None:
    rig.near.hold("lookup")
    await rig.ask(make_prompt(1))


# What is held.


@sees({"requests_held pending": 1, "backend_queued_bytes near": 2 * OBJECT_BYTES, "backend_pins near": 2})
async def a_request_on_its_way(rig: Rig) -> None:
    await rig.promised(make_prompt(2))


@sees({"requests_held unclaimed": 1})
async def a_request_that_nobody_has_asked_for(rig: Rig) -> None:
    await rig.ask(make_prompt(1))


@sees({"requests_held in_use": 1})
async def a_request_that_is_read(rig: Rig) -> None:
    await fill(rig.cache, make_prompt(1))
    await rig.ask(make_prompt(1))
    await rig.cache.query_status("acme/1")
    await rig.cache.read("acme/1")


@sees({"swept_total result": 1})
async def a_result_that_nobody_takes(rig: Rig) -> None:
    await fill(rig.cache, make_prompt(1))
    await rig.ask(make_prompt(1))
    await asyncio.sleep(100)


@sees({"swept_total lease": 1})
async def a_lease_that_nobody_gives_back(rig: Rig) -> None:
    await fill(rig.cache, make_prompt(1))
    await rig.ask(make_prompt(1))
    await rig.cache.query_status("acme/1")
    await asyncio.sleep(400)


@sees({"swept_total reservation": 1})
async def a_writer_that_stops(rig: Rig) -> None:
    await rig.cache.store(make_prompt(1))
    await asyncio.sleep(400)


@sees({"l1_bytes idle": 2 * PAGE, "l1_chunks": 2})
async def chunks_that_nobody_uses(rig: Rig) -> None:
    await fill(rig.cache, make_prompt(2))


@sees(
    {"chunk_reuse_gap_seconds_sum": 30, "chunk_lifetime_seconds_count": 1, "chunk_idle_before_removal_seconds_count": 1}
)
async def a_chunk_that_comes_back_and_leaves(rig: Rig) -> None:
    await fill(rig.cache, SAMPLED)
    await rig.ask(SAMPLED)
    await rig.cache.end_request("acme/1")
    await asyncio.sleep(30)
    await rig.ask(SAMPLED)
    await rig.cache.end_request("acme/1")
    await rig.cache.delete(SAMPLED)
    await asyncio.sleep(2)


# Storage.


@sees({"writeback_pending_chunks": 2})
async def a_store_that_hangs(rig: Rig) -> None:
    await rig.fill_l1(make_prompt(2))


@sees(
    {"backend_stored_bytes_total near": 2 * OBJECT_BYTES, "backend_used_bytes near": 2 * OBJECT_BYTES}
    | {"backend_objects near": 2, "backend_calls_total near succeeded store": 1}
)
async def a_store(rig: Rig) -> None:
    await fill(rig.cache, make_prompt(2))
    await rig.cache.flush()


@sees({"backend_calls_total quick at_once lookup": 1})
async def a_lookup_that_needs_no_call(rig: Rig) -> None:
    await rig.cache.add_backend(rig.disk.__class__("quick"))
    await rig.cache.remove_backend("near")
    await rig.ask(make_prompt(1))


@sees({"backend_breaker near open": 1})
async def a_backend_that_fails(rig: Rig) -> None:
    rig.fail("lookup")
    for number in (1, 2):
        await rig.ask(make_prompt(1, number))
        await rig.cache.end_request("acme/1")


@sees({"backend_breaker near half-open": 1})
async def a_backend_that_is_tried_again(rig: Rig) -> None:
    await a_backend_that_fails(rig)
    del rig.near.before
    rig.near.hold("lookup")
    await asyncio.sleep(11)
    rig.cache.prefetch(make_prompt(1, 3))
    await asyncio.sleep(0.1)


@sees({"backend_capacity_bytes quick": CAPACITY, "backend_breaker quick closed": 1})
async def a_backend_that_comes(rig: Rig) -> None:
    await rig.cache.add_backend(f"memory://quick?capacity={CAPACITY}")


@sees(
    {
        "backend_write_budget_bytes small": 1,
        "backend_refused_chunks_total small write_budget": 1 + PAGES,
        "misses_total refused": 1,
    }
)
async def a_chunk_that_a_backend_does_not_admit(rig: Rig) -> None:
    await rig.cache.add_backend("memory://small?write_budget=8")
    await rig.cache.remove_backend("near")
    await fill(rig.cache, make_prompt(1))
    await rig.cache.flush()
    await fill(rig.cache, make_prompt(PAGES, 2))
    await rig.cache.flush()
    await rig.ask(make_prompt(1))


@sees({"loop_lag_seconds_bucket 0.001": 1})
async def a_loop_that_turns(rig: Rig) -> None:
    await asyncio.sleep(0.7)


@pytest.mark.parametrize("plant", SEEN, ids=lambda plant: plant.__name__)
def test_it_is_seen(plant: Plant) -> None:
    async def main() -> None:
        disk = MemoryBackend("near")
        near = GatedBackend(disk, stubborn=True)
        async with AsyncCache(CONFIG, [near]) as cache:
            watch = Watch(cache.core, lambda request_id: request_id.partition("/")[0])
            watch.open()
            rig = Rig(cache, watch, near, disk)
            before = await rig.values()
            await plant(rig)
            after = await rig.values()
            near.release()
            await watch.close()
        seen = SEEN[plant]
        assert {name: before.get(name, 0) for name in seen} == dict.fromkeys(seen, 0)
        assert {name: after.get(name) for name in seen} == {name: pytest.approx(value) for name, value in seen.items()}

    run_virtual(main())


async def test_nothing_that_is_shown_is_left_unplanted() -> None:
    """`l1_capacity_bytes` does not change, there are always `tasks`, and what the process takes is Prometheus' own."""
    names = {name.split()[0] for seen in SEEN.values() for name in seen}
    planted = {
        name.removesuffix("_total").removesuffix("_sum").removesuffix("_count").removesuffix("_bucket")
        for name in names
    }
    async with AsyncCache(CONFIG, [MemoryBackend("near", capacity_bytes=CAPACITY)]) as cache:
        text = (await exposition(Watch(cache.core, lambda request_id: ""))).decode()
    shown = {family.name.removeprefix("async_cache_") for family in text_string_to_metric_families(text)}
    assert {name for name in shown - planted if not name.startswith("process_")} == {"l1_capacity_bytes", "tasks"}


def labels_of(name: str) -> set[str]:
    return {label.split()[-1] for seen in SEEN.values() for label in seen if label.split()[0] == name}


def test_every_reason_is_planted() -> None:
    assert labels_of("misses_total") == set(REASONS)
    reasons = labels_of("promises_broken_total") | labels_of("promises_trimmed_total")
    assert reasons == {reason.value for reason in Shortfall}
    assert labels_of("l1_bytes") == {"leased", "idle", "reserved", "quarantined"}
    assert labels_of("requests_held") == {"pending", "unclaimed", "in_use"}
    assert labels_of("swept_total") == {"result", "lease", "reservation"}
    assert labels_of("backend_breaker") == {"open", "half-open", "closed"}
