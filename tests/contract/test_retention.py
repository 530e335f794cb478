"""Retention: what somebody asks to be kept is kept until its time, in every tier, within his share, and he is told."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from random import Random
from typing import Any

import msgspec
import pytest

from async_cache import AsyncCache, CacheConfig, Clipped, ConfigError, Retained
from async_cache.errors import BackendError
from async_cache.l2.memory import MemoryBackend
from async_cache.l2.urls.registry import from_url
from async_cache.retention.policies import NAMES
from async_cache.testing import GatedBackend
from async_cache.write.retention import Note

from .support import (
    OBJECT_BYTES,
    Recorder,
    advance,
    assert_nothing_held,
    count_hits,
    fill,
    fill_l2,
    make_prompt,
    open_cache,
    read_back,
    seed,
    settle,
)


async def flood(cache: AsyncCache, chunks: int, number: int = 50) -> None:
    """Store other prompts, so many chunks of them, one after the other."""
    for n in range(chunks):
        await fill(cache, make_prompt(1, number=number + n))
        await cache.flush()


@pytest.mark.parametrize("policy", NAMES)
async def test_what_is_retained_stays_in_l1_until_its_time(policy: str) -> None:
    async with open_cache(pages=16, policy=policy) as cache:
        prompt = make_prompt(3)
        await fill(cache, prompt)
        assert await cache.retain(prompt, ttl_seconds=100) == Retained(12, 3, 100.0, None, "model")
        await flood(cache, 40)
        assert await count_hits(cache, prompt) == 3
        await advance(90)
        await flood(cache, 40, number=100)
        assert await count_hits(cache, prompt) == 3
        await advance(11)
        assert await cache.retained() == []
        await flood(cache, 60, number=200)
        assert await count_hits(cache, prompt) < 3
        await assert_nothing_held(cache)


async def test_what_is_retained_stays_in_a_bounded_backend() -> None:
    backend = MemoryBackend(capacity_bytes=16 * OBJECT_BYTES)
    async with open_cache(backend, pages=4) as cache:
        prompt = make_prompt(3)
        await fill_l2(cache, prompt)
        assert (await cache.retain(prompt)).chunks == 3
        await flood(cache, 40)
        assert await count_hits(cache, prompt) == 3
        assert (await cache.retain(prompt, ttl_seconds=0)).chunks == 0
        await flood(cache, 40)
        assert await count_hits(cache, prompt) == 0
        await assert_nothing_held(cache)
        assert backend.pins == 0


async def test_a_second_call_renews_and_changes_what_the_first_has_kept() -> None:
    async with open_cache(pages=40) as cache:
        prompt = make_prompt(4)
        await fill(cache, prompt)
        assert (await cache.retain(prompt, ttl_seconds=10)).chunks == 4
        await advance(8)
        assert (await cache.retain(prompt, tokens=11, ttl_seconds=10)).chunks == 2
        [kept] = await cache.retained()
        assert (kept.tokens, kept.chunks, kept.clipped) == (8, 2, None)
        await advance(8)
        await flood(cache, 60)
        assert await count_hits(cache, prompt) == 2
        [kept] = await cache.retained()
        assert kept.expires_in_seconds == pytest.approx(2, abs=0.5)
        await advance(3)
        assert await cache.retained() == []


async def test_what_is_retained_together_is_kept_until_the_last_lets_go() -> None:
    async with open_cache(pages=16) as cache:
        short, long = make_prompt(2), make_prompt(4)
        await fill(cache, long)
        await cache.retain(long, ttl_seconds=10)
        await cache.retain(short, ttl_seconds=30)
        assert [kept.chunks for kept in await cache.retained()] == [4, 2]
        await advance(11)
        await flood(cache, 40)
        assert await count_hits(cache, long) == 2
        await advance(20)
        await flood(cache, 40)
        assert await count_hits(cache, long) == 0


async def test_nothing_is_accepted_silently_in_part() -> None:
    async with open_cache(pages=16) as cache:  # a quarter of that is a share
        stored, absent, much = make_prompt(2), make_prompt(5), make_prompt(8, number=2)
        await fill(cache, stored)
        kept = await cache.retain(absent)
        assert (kept.chunks, kept.tokens, kept.clipped) == (2, 8, Clipped.NOT_STORED)
        await cache.retain(absent, ttl_seconds=0)
        await fill(cache, much)
        kept = await cache.retain(much)
        assert (kept.chunks, kept.clipped) == (4, Clipped.QUOTA)
        kept = await cache.retain(stored)
        assert (kept.chunks, kept.expires_in_seconds, kept.clipped) == (0, 0.0, Clipped.QUOTA)
        kept = await cache.retain(make_prompt(3, number=3))
        assert (kept.chunks, kept.clipped) == (0, Clipped.NOT_STORED)
        assert len(await cache.retained()) == 1


async def test_what_only_a_backend_has_that_can_promise_nothing_is_not_promised() -> None:
    backend = Recorder(MemoryBackend())
    async with open_cache(backend) as cache:
        prompt = make_prompt(2)
        await fill_l2(cache, prompt)
        kept = await cache.retain(prompt)
        assert (kept.chunks, kept.clipped) == (0, Clipped.MEMORY)
        assert (await cache.warm(prompt)).chunks == 2
        assert (await cache.retain(prompt)).chunks == 2
        await assert_nothing_held(cache, backend)


@pytest.mark.embedded
async def test_one_salt_takes_no_more_than_its_share_and_never_all() -> None:
    """Sixteen salts in pairs: the first takes what it can get, and the second finds its own all the same."""
    for first, second in [(2 * n, 2 * n + 1) for n in range(8)]:
        async with open_cache(pages=64) as cache:
            mine = make_prompt(32, salt=f"salt {first}")
            theirs = make_prompt(16, number=2, salt=f"salt {second}")
            await fill(cache, mine)
            await fill(cache, theirs)
            assert (await cache.retain(mine)).chunks == 16
            assert (await cache.retain(theirs)).chunks == 16
            await flood(cache, 80)
            assert (await count_hits(cache, mine), await count_hits(cache, theirs)) == (16, 16)
    async with open_cache(pages=256, retain_share=1.0) as cache:
        chunks = []
        for number in range(16):
            prompt = make_prompt(8, number=number, salt=str(number))
            await fill(cache, prompt)
            chunks.append((await cache.retain(prompt)).chunks)
        assert chunks == [8] * 16
        clipped = [kept.clipped for kept in await cache.retained()]
        assert clipped == [None] * 16
        last = make_prompt(64, number=99, salt="last")
        await fill(cache, last)
        kept = await cache.retain(last)
        assert (kept.chunks, kept.clipped) == (32, Clipped.MEMORY)


async def test_a_deletion_ends_a_retention_and_a_clear_of_l1_does_not() -> None:
    backend = MemoryBackend()
    async with open_cache(backend) as cache:
        prompt, other = make_prompt(2), make_prompt(2, number=2)
        for each in (prompt, other):
            await fill(cache, each)
            await cache.retain(each)
        await cache.flush()
        await cache.clear(tier="l1")
        assert (await cache.stats()).l1_chunks == 4
        assert (await cache.delete(prompt)).chunks == 2
        assert [kept.chunks for kept in await cache.retained()] == [2]
        assert (await cache.stats()).l1_used_bytes == 2 * 4096
        await cache.clear(tier="all")
        assert await cache.retained() == []
        await settle()
        assert backend.pins == 0


@pytest.mark.embedded
async def test_a_restart_keeps_what_is_retained_where_the_tier_outlives_it() -> None:
    backend = MemoryBackend(capacity_bytes=16 * OBJECT_BYTES)
    prompt, ended = make_prompt(3), make_prompt(1, number=9)
    async with open_cache(backend) as cache:
        for each in (prompt, ended):
            await fill(cache, each)
            await cache.flush()
            assert (await cache.retain(each, ttl_seconds=1000)).clipped is None
        await cache.retain(ended, ttl_seconds=0)
    assert backend.pins == 0
    async with open_cache(backend) as cache:
        [kept] = await cache.retained()
        assert (kept.chunks, kept.model) == (3, "model")
        assert 900 < kept.expires_in_seconds <= 1000
        await flood(cache, 60)
        assert await count_hits(cache, prompt) == 3
        await advance(1001)
        assert await cache.retained() == []
        await flood(cache, 60, number=500)
        assert await count_hits(cache, prompt) == 0
    async with open_cache(backend) as cache:
        assert await cache.retained() == []


@pytest.mark.embedded
@pytest.mark.parametrize("damage", [{"noted_at": math.nan}, {"lives_seconds": math.inf, "noted_at": math.inf}])
async def test_a_note_that_came_to_harm_keeps_nothing_and_no_other_from_its_end(damage: dict[str, float]) -> None:
    backend, harmed, whole = MemoryBackend(), make_prompt(2), make_prompt(3, number=2)
    async with open_cache(backend) as cache:
        for prompt in (harmed, whole):
            await fill(cache, prompt)
            await cache.flush()
            await cache.retain(prompt, ttl_seconds=100)
    name = harmed.chunk_hashes[-1].hex()
    note = msgspec.msgpack.decode(backend._notes[name], type=Note)
    backend._notes[name] = msgspec.msgpack.encode(msgspec.structs.replace(note, **damage))
    async with open_cache(backend) as cache:
        assert [kept.chunks for kept in await cache.retained()] == [3]
        await advance(101)
        assert await cache.retained() == []
        await settle()
        assert not backend.pins and not backend._notes


@pytest.mark.embedded
@pytest.mark.parametrize("how", ["delete", "clear"])
async def test_what_a_deletion_has_ended_no_restart_brings_back_however_soon_it_comes(how: str) -> None:
    class SlowToForget(MemoryBackend):
        async def keep_note(self, name: str, note: bytes | None) -> None:
            if note is None:
                await asyncio.sleep(0.5)
            await super().keep_note(name, note)

    backend, prompt = SlowToForget(), make_prompt(3)
    async with open_cache(backend) as cache:
        await fill(cache, prompt)
        await cache.flush()
        assert (await cache.retain(prompt)).chunks == 3
        await (cache.delete(prompt) if how == "delete" else cache.clear(tier="all"))
    async with open_cache(backend) as cache:
        assert await cache.retained() == []
        await assert_nothing_held(cache)
    assert backend.pins == 0


class AwayAtFirst(MemoryBackend):
    """Cannot tell its notes so often."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    async def notes(self) -> dict[str, bytes]:
        self.failures -= 1
        if self.failures >= 0:
            raise BackendError("away")
        return await super().notes()


@pytest.mark.embedded
@pytest.mark.parametrize("failures", [1, 2, 8])
async def test_what_is_retained_is_known_as_soon_as_a_backend_that_was_away_tells_it(failures: int) -> None:
    backend, prompts = AwayAtFirst(0), [make_prompt(3, number=number) for number in range(4)]
    async with open_cache(backend) as cache:
        for prompt in prompts:
            await fill(cache, prompt)
            await cache.flush()
            await cache.retain(prompt, ttl_seconds=1000)
    backend.failures = failures
    async with open_cache(backend) as cache:
        assert await cache.retained() == []
        await cache.delete(prompts[1])
        await cache.retain(prompts[2], ttl_seconds=3000)
        await advance(400)
        assert [kept.chunks for kept in await cache.retained()] == [3, 3, 3]
        assert 2000 < (await cache.retained())[-1].expires_in_seconds < 3000
        await advance(1001)
        assert len(await cache.retained()) == 1
        cache.check_integrity()
    assert len(backend._notes) == 1


@pytest.mark.embedded
async def test_what_was_cleared_while_a_backend_was_away_is_not_kept_again() -> None:
    backend = AwayAtFirst(0)
    async with open_cache(backend) as cache:
        await fill_l2(cache, make_prompt(3))
        await cache.retain(make_prompt(3), ttl_seconds=1000)
    backend.failures = 3
    async with open_cache(backend) as cache:
        await cache.clear(tier="all")
        await advance(400)
        assert await cache.retained() == [] and not backend._notes
        await assert_nothing_held(cache)


@pytest.mark.embedded
async def test_a_backend_that_leaves_is_not_asked_any_more() -> None:
    backend = AwayAtFirst(1000)
    async with open_cache(MemoryBackend("other"), backend) as cache:
        await cache.remove_backend(backend.name)
        await advance(60)
        left = backend.failures
        await advance(1000)
        assert backend.failures == left


@pytest.mark.embedded
async def test_a_backend_that_comes_keeps_what_is_retained_and_one_that_goes_takes_its_own_along() -> None:
    first, second = MemoryBackend("first"), MemoryBackend("second", capacity_bytes=16 * OBJECT_BYTES)
    async with open_cache(first, pages=4) as cache:
        prompt = make_prompt(3)
        await fill_l2(cache, prompt)
        await cache.retain(prompt)
        await cache.add_backend(second)
        await cache.drain_backend("first")
        await cache.remove_backend("first")
        await flood(cache, 60)
        assert await count_hits(cache, prompt) == 3
        await cache.remove_backend("second")
        assert await cache.retained() == []


@pytest.mark.embedded
async def test_a_backend_may_come_while_a_prompt_is_being_retained() -> None:
    silent, other = GatedBackend(MemoryBackend("silent")), MemoryBackend("other")
    async with open_cache(silent, pages=4) as cache:
        prompt = make_prompt(3)
        await seed(silent.inner, prompt)
        silent.hold("lookup")
        retaining = asyncio.create_task(cache.retain(prompt))
        await silent.reached("lookup")
        await cache.add_backend(other)
        silent.release()
        assert (await retaining).chunks == 3
        assert [kept.chunks for kept in await cache.retained()] == [3]
        await cache.retain(prompt, ttl_seconds=0)
        await settle()
        assert silent.inner.pins == other.pins == 0


@pytest.mark.embedded
async def test_a_backend_may_go_while_a_long_prompt_is_being_retained() -> None:
    silent, other = GatedBackend(MemoryBackend("silent")), MemoryBackend("other")
    prompt = make_prompt(300)  # more than are looked at in one step
    for backend in (silent.inner, other):
        await seed(backend, prompt)
    async with open_cache(silent, other, pages=4) as cache:
        silent.hold("lookup")
        retaining = asyncio.create_task(cache.retain(prompt))
        await silent.reached("lookup")
        removing = asyncio.create_task(cache.remove_backend("other"))
        await settle()
        silent.release()
        silent.hold("lookup")  # that of the second step
        await removing
        silent.release()
        assert (await retaining).chunks == 300
        await cache.retain(prompt, ttl_seconds=0)
        await settle()
        assert silent.inner.pins == other.pins == 0


async def test_a_load_that_warms_leaves_nothing_leased() -> None:
    async with open_cache(MemoryBackend()) as cache:
        prompt = make_prompt(3)
        await fill_l2(cache, prompt)
        result = await cache.warm(prompt)
        assert (result.request_id, result.chunks, result.l2_chunks) == ("", 3, 3)
        assert (await cache.lookup(prompt)).l1_chunks == 3
        await assert_nothing_held(cache)
        assert (await cache.warm(make_prompt(2, number=2))).chunks == 0


async def test_a_wait_for_a_load_that_warms_may_be_cancelled_or_have_an_end() -> None:
    backend = GatedBackend(MemoryBackend(), "load")
    async with open_cache(backend) as cache:
        prompt = make_prompt(3)
        await fill_l2(cache, prompt)
        assert (await cache.warm(prompt, deadline_seconds=1)).shortfall == "deadline"
        waiting = asyncio.ensure_future(cache.warm(prompt))
        await settle()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await settle()
        backend.release()
        await settle()
        await assert_nothing_held(cache)


async def test_hints_are_taken_and_promise_nothing() -> None:
    async with open_cache(pages=16, policy="prefix") as cache:
        prompt = make_prompt(3)
        await fill(cache, prompt)
        await cache.hint(prompt, output_tokens=100)
        await cache.hint(prompt, returns=True, within_seconds=5.0)
        await cache.hint(make_prompt(2, number=77), returns=False)
        await cache.hint(prompt, returns=False)
        assert await count_hits(cache, prompt) == 3


BAD: list[tuple[str, Callable[[Any, Any], Awaitable[Any]], type[Exception]]] = [
    ("no prompt", lambda c, p: c.retain("x"), TypeError),
    ("no number", lambda c, p: c.retain(p, tokens=1.5), TypeError),
    ("too many tokens", lambda c, p: c.retain(p, tokens=p.tokens + 1), ValueError),
    ("fewer than none", lambda c, p: c.retain(p, tokens=-1), ValueError),
    ("no time", lambda c, p: c.retain(p, ttl_seconds=None), TypeError),
    ("no finite time", lambda c, p: c.retain(p, ttl_seconds=float("inf")), ValueError),
    ("not a number", lambda c, p: c.retain(p, ttl_seconds=float("nan")), ValueError),
    ("a time that is over", lambda c, p: c.retain(p, ttl_seconds=-1), ValueError),
    ("centuries", lambda c, p: c.retain(p, ttl_seconds=1e10), ValueError),
    ("a deadline before", lambda c, p: c.warm(p, deadline_seconds=-1), ValueError),
    ("a guess", lambda c, p: c.hint(p, returns="maybe"), TypeError),
    ("a negative output", lambda c, p: c.hint(p, output_tokens=-1), ValueError),
    ("a time that is none", lambda c, p: c.hint(p, within_seconds=float("nan")), ValueError),
]


@pytest.mark.parametrize(("call", "error"), [pytest.param(*case[1:], id=case[0]) for case in BAD])
async def test_bad_input_is_refused_by_name(call: Callable[[Any, Any], Coroutine[Any, Any, Any]], error: Any) -> None:
    async with open_cache() as cache:
        prompt = make_prompt(2)
        await fill(cache, prompt)
        with pytest.raises(error):
            await call(cache, prompt)
        assert await cache.retained() == []
        await assert_nothing_held(cache)


async def test_a_prompt_that_fills_no_chunk_is_not_stored() -> None:
    async with open_cache() as cache:
        kept = await cache.retain(make_prompt(0))
        assert (kept.chunks, kept.clipped) == (0, Clipped.NOT_STORED)


@pytest.mark.embedded
@pytest.mark.parametrize("seed", range(8))
async def test_what_is_retained_outlives_everything_but_its_end(seed: int) -> None:
    """Random stores, retentions, deletions and waits, against a model that knows only what was promised."""
    random = Random(seed)
    backend = MemoryBackend(capacity_bytes=24 * OBJECT_BYTES)
    promised: dict[tuple[int, str], tuple[int, float]] = {}
    async with open_cache(backend, pages=24, policy=random.choice(NAMES)) as cache:
        now = asyncio.get_running_loop().time
        for _ in range(120):
            number, salt, chunks = random.randrange(5), random.choice(["", "a"]), random.randrange(1, 6)
            prompt = make_prompt(5, number=number, salt=salt)
            match random.randrange(8):
                case 0 | 1 | 2:
                    await fill(cache, prompt, chunks=range(chunks))
                    await cache.flush()
                case 3 | 4:
                    ttl = random.choice([0, 5, 50])
                    kept = await cache.retain(prompt, tokens=4 * chunks, ttl_seconds=ttl)
                    assert kept.chunks == chunks or kept.clipped is not None or not ttl
                    promised[number, salt] = kept.chunks, now() + ttl
                case 5:
                    await advance(random.choice([0.5, 7, 60]))
                case 6:
                    if random.random() < 0.3:
                        await cache.delete(prompt)
                        promised.pop((number, salt), None)
                case 7:
                    await flood(cache, 10, number=random.randrange(50, 5000))
            promised = {which: (n, until) for which, (n, until) in promised.items() if n and until > now()}
            for (number, salt), (kept_chunks, _) in promised.items():
                assert await count_hits(cache, make_prompt(5, number=number, salt=salt)) >= kept_chunks
            assert len(await cache.retained()) == len(promised)
            cache.check_integrity()


@pytest.mark.embedded
async def test_a_note_that_cannot_be_kept_is_a_line_in_the_log_and_the_retention_stands(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Forgetful(MemoryBackend):
        async def keep_note(self, name: str, note: bytes | None) -> None:
            raise OSError("no room for notes")

        async def notes(self) -> dict[str, bytes]:
            return {"aa" * 32: b"no note"}

    async with open_cache(Forgetful()) as cache:
        prompt = make_prompt(2)
        await fill(cache, prompt)
        assert (await cache.retain(prompt)).chunks == 2
        assert len(await cache.retained()) == 1
    assert "not known there after a restart" in caplog.text
    assert "cannot be read" in caplog.text


@pytest.mark.embedded
@pytest.mark.parametrize("policy", NAMES)
async def test_a_backend_evicts_by_its_policy_and_knows_what_lies_before_what(policy: str) -> None:
    backend = from_url(f"memory://?capacity={24 * OBJECT_BYTES}B&policy={policy}")
    assert isinstance(backend, MemoryBackend)
    async with open_cache(backend, pages=8) as cache:
        random = Random(policy)
        for number in range(60):
            prompt = make_prompt(random.randrange(1, 5), number=random.randrange(12))
            await read_back(cache, prompt)
            await fill(cache, prompt)
            await cache.flush()
            if number % 10 == 0:
                await cache.hint(prompt, returns=False)
            backend.check_integrity()
        if policy != "fifo":  # no chunk leaves before those that build on it
            await cache.clear(tier="l1")
            stored = {key.chunk_hash async for key, _ in backend.keys()}
            for number in range(12):
                there = [chunk_hash in stored for chunk_hash in make_prompt(4, number=number).chunk_hashes]
                assert there == sorted(there, reverse=True)


@pytest.mark.embedded
def test_a_policy_that_there_is_none_of_is_refused_in_a_url_too() -> None:
    for url in ("memory://?policy=best", "fs:///tmp/x?policy="):
        with pytest.raises(ConfigError, match="policy"):
            from_url(url)


async def test_what_is_retained_is_listed_in_turns_however_often_it_is_asked():
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache:
        prompt = make_prompt(2)
        await fill(cache, prompt)
        await cache.retain(prompt)
        lists, turns = [asyncio.create_task(cache.retained()) for _ in range(30)], 0
        while not all(one.done() for one in lists):
            await asyncio.sleep(0)
            turns += 1
        assert turns >= len(lists) / 2 and all(len(one.result()) == 1 for one in lists)
