"""A backend whose URL says how much may be written to it in a day is written no more, in whatever time, by whomever."""

import asyncio
import math
import time
from pathlib import Path

import msgspec
import pytest

from async_cache import AsyncCache, ConfigError
from async_cache.errors import BackendError
from async_cache.l2.guard.budget import DAY_SECONDS, SAVED_UP, Note, WriteBudget
from async_cache.l2.memory import MemoryBackend
from async_cache.l2.placement import Placement
from async_cache.l2.urls.registry import from_url

from .support import PAGE, advance, count_hits, fill, make_prompt, open_cache, read_back, settle

pytestmark = pytest.mark.embedded
CHUNK = PAGE  # what a chunk is taken for: its room in memory


def bounded(chunks: int, name: str = "memory") -> MemoryBackend:
    """A backend that may be written so many chunks at once, and eight times as many in a day."""
    backend = MemoryBackend(name)
    backend.placement = Placement(write_budget=int(chunks * CHUNK / SAVED_UP))
    return backend


def spend_as_it_is_promised(cache: AsyncCache) -> None:
    """Have each chunk count as what it takes in memory: it has 16 bytes, and would take long to wear anything out."""
    budget = cache.core.guards.current[0].budget
    assert budget is not None
    wrote = budget.wrote
    budget.wrote = lambda size_bytes: wrote(size_bytes // 16 * CHUNK)  # type: ignore[method-assign]


async def store(cache: AsyncCache, number: int, salt: str = "", chunks: int = 1) -> None:
    await fill(cache, make_prompt(chunks, number, salt=salt))
    await cache.flush()


async def ask(cache: AsyncCache, number: int, salt: str = "", chunks: int = 1) -> None:
    await read_back(cache, make_prompt(chunks, number, salt=salt))
    await settle()


async def test_no_more_is_written_than_a_day_has_and_who_was_refused_is_told() -> None:
    backend = bounded(8)
    async with open_cache(backend, pages=4) as cache:
        spend_as_it_is_promised(cache)
        for number in range(40):
            await store(cache, number)
        assert backend.usage().objects == 4, "the first half is for whatever comes"
        [status] = await cache.backends()
        assert status.refused == {"write_budget": 36} and status.write_budget == 64 * CHUNK
        assert status.budget_left_bytes == 4 * CHUNK
        await fill(cache, make_prompt(3, 50))
        assert (await cache.flush()).refused == 3
        span = (await cache.explain(make_prompt(1, 20))).spans[0]
        assert (span.state, span.removal, span.backend) == ("removed", "refused", "memory")
        assert (await cache.lookup(make_prompt(1, 20))).missed.removal == "refused"  # type: ignore[union-attr]
        for _ in range(24):
            await advance(3600)
            for number in range(100, 120):
                await store(cache, number)
        assert backend.usage().objects <= 64
        cache.check_integrity()


async def test_what_was_asked_for_again_is_written_when_there_is_little_left() -> None:
    backend = bounded(8)
    async with open_cache(backend, pages=16) as cache:
        spend_as_it_is_promised(cache)
        for number in range(5):
            await store(cache, number)
        assert backend.usage().objects == 4
        for _ in range(2):
            await ask(cache, 4)
        assert (await cache.flush()).pending == 0
        assert backend.usage().objects == 5
        for number in range(10, 20):
            for _ in range(3):
                await ask(cache, number)
            await store(cache, number)
        assert backend.usage().objects == 8
        assert (await cache.backends())[0].budget_left_bytes == 0


async def test_who_stores_much_leaves_the_others_theirs() -> None:
    backend = bounded(32)
    async with open_cache(backend, pages=64) as cache:
        spend_as_it_is_promised(cache)
        await store(cache, 98, "modest")
        for number in range(40):
            for _ in range(3):
                await ask(cache, number, "greedy")
            await store(cache, number, "greedy")
        assert backend.usage().objects == 1 + 15
        for _ in range(3):
            await ask(cache, 99, "modest", 4)
        await store(cache, 99, "modest", 4)
        await cache.clear(tier="l1")
        assert await count_hits(cache, make_prompt(4, 99, salt="modest")) == 4


def test_an_owner_beyond_its_part_leaves_the_second_half_to_others() -> None:
    now = [0.0]
    budget = WriteBudget(800, lambda: now[0])  # 100 at once
    for _ in range(6):
        assert budget.admits("greedy", 10, 9) or budget.left_bytes < 60
        budget.promise("greedy", 10)
    assert budget.admits("greedy", 10, 9), "while there is nobody else, all of it is its own"
    assert not budget.admits("greedy", 10, 1)
    budget.promise("modest", 1)
    assert not budget.admits("greedy", 10, 9) and budget.admits("modest", 10, 2)
    assert not budget.admits("modest", 40, 2)
    now[0] += DAY_SECONDS
    assert budget.left_bytes == 100 - 61


async def test_what_is_left_survives_a_restart_and_grows_meanwhile(tmp_path: Path) -> None:
    now = [1000.0]
    first = WriteBudget(8000, lambda: now[0])
    first.wrote(900)
    note = first.note(wall=50_000.0)
    for away, left in ((0, 100), (DAY_SECONDS / 70, 200), (10 * DAY_SECONDS, 1000), (-500, 100)):
        again = WriteBudget(8000, lambda: now[0])
        again.wrote(30)  # before it was known
        again.recall(note, 50_000.0 + away)
        assert again.left_bytes == pytest.approx(left - 30, abs=1)
    again.recall(b"\xc1", 0)
    assert again.left_bytes == pytest.approx(70, abs=1)


@pytest.mark.parametrize("left", [math.nan, math.inf, -math.inf, -1e300, 1e300])
@pytest.mark.parametrize("noted_at", [math.nan, 0.0])
async def test_a_note_that_came_to_harm_stops_neither_a_writer_nor_the_writing(left: float, noted_at: float) -> None:
    now = [1000.0]
    budget = WriteBudget(8000, lambda: now[0])
    budget.recall(msgspec.msgpack.encode(Note(left, noted_at)), 1000.0)
    assert budget.left_bytes <= 1000
    budget.admits("", 10, 1)
    now[0] += 3 * DAY_SECONDS
    assert budget.left_bytes == 1000 and budget.admits("", 10, 1)


@pytest.mark.real_time
async def test_a_directory_keeps_what_is_left_over_a_restart(tmp_path: Path) -> None:
    url = f"fs://{tmp_path}/store?write_budget={64 * PAGE}B"
    left, began = [], time.time()
    for number in range(2):
        async with open_cache(from_url(url)) as cache:
            await store(cache, number, chunks=4 - 4 * number)
            [status] = await cache.backends()
            left.append(status.budget_left_bytes)
    back = 64 * PAGE / 86400 * (time.time() - began) + 1  # 3 bytes in a second
    assert 8 * PAGE - 64 <= left[0] <= 8 * PAGE - 64 + back, "64 bytes were written"
    assert 0 <= left[1] - left[0] <= back


class Asked(MemoryBackend):
    """Knows what it was asked of its notes; it cannot tell one so often."""

    def __init__(self, failures: int = 0) -> None:
        super().__init__()
        self.placement = Placement(write_budget=64 * CHUNK)
        self.asked: list[str] = []
        self.failures = failures

    async def notes(self) -> dict[str, bytes]:
        self.asked.append("all")
        return await super().notes()

    async def note(self, name: str) -> bytes | None:
        self.asked.append(name)
        if len(self.asked) <= self.failures:
            raise BackendError("away")
        return self._notes.get(name)


async def test_of_all_notes_the_one_of_what_is_left_is_read() -> None:
    backend = Asked()
    backend.retains = False  # else all are read for what is retained
    async with open_cache(backend) as cache:
        await store(cache, 0)
    assert backend.asked == ["budget"]


@pytest.mark.parametrize("failures", [1, 3])
async def test_what_is_left_is_asked_for_again_where_the_backend_was_away(failures: int) -> None:
    backend = Asked()
    backend.retains = False
    async with open_cache(backend) as cache:
        spend_as_it_is_promised(cache)
        for number in range(3):
            await store(cache, number)
        [spent] = await cache.backends()
    assert spent.budget_left_bytes is not None and spent.budget_left_bytes <= 5 * CHUNK
    backend.asked, backend.failures = [], failures
    async with open_cache(backend) as cache:
        await settle()
        [status] = await cache.backends()
        assert status.budget_left_bytes == 8 * CHUNK, "it is not known yet"
        for number in range(10, 14):
            await store(cache, number)
            await advance(60)
        [status] = await cache.backends()
        assert status.budget_left_bytes is not None and status.budget_left_bytes < 6 * CHUNK
    assert backend.asked == ["budget"] * (failures + 1)


async def test_what_is_left_is_noted_though_the_cache_is_closed_while_a_note_is_under_way() -> None:
    class Hanging(MemoryBackend):
        kept = asyncio.Event()
        hangs = True

        async def keep_note(self, name: str, note: bytes | None) -> None:
            if self.hangs:
                self.hangs = False
                self.kept.set()
                await asyncio.Event().wait()
            await super().keep_note(name, note)

    backend = Hanging()
    backend.placement = Placement(write_budget=64 * CHUNK)
    async with open_cache(backend) as cache:
        await store(cache, 0)
        await backend.kept.wait()
    assert set(await backend.notes()) == {"budget"}


@pytest.mark.parametrize("value", ["0", "-1", "x", "", "none"])
def test_a_budget_that_cannot_be_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="write_budget"):
        from_url(f"memory://?write_budget={value}")
