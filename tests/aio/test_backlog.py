"""A backlog does all that it is given, in order, and no more in a turn of the loop than it should."""

import asyncio
import random
from collections.abc import Sequence

from async_cache.aio.backlog import FEW, Backlog


async def test_what_is_few_is_done_at_once() -> None:
    done: list[int] = []
    backlog = Backlog(1000)
    for _ in range(10):
        backlog.do(done.extend, range(FEW))
    assert done == [*range(FEW)] * 10
    assert not backlog


async def test_what_is_much_is_done_in_order_and_so_much_in_a_turn() -> None:
    backlog, turns, turn = Backlog(1000), list[list[int]](), list[int]()
    seed = random.Random(1)
    pieces = [range(n * 10_000, n * 10_000 + seed.choice([1, FEW + 1, 900, 2500])) for n in range(30)]
    for piece in pieces:
        backlog.do(turn.extend, piece)
    while backlog:
        turns.append(list(turn))
        turn.clear()
        await asyncio.sleep(0)
    turns.append(list(turn))
    assert len(turns[0]) <= 1000 + FEW and max(map(len, turns[1:])) <= 1000
    assert [n for turn in turns for n in turn] == [n for piece in pieces for n in piece]


async def test_each_turn_has_its_own_measure() -> None:
    backlog, sizes = Backlog(1000), list[int]()

    def note(items: Sequence[int]) -> None:
        sizes.append(len(items))

    for _ in range(5):
        backlog.do(note, range(1000))
        assert sizes[-1] == 1000 and not backlog
        await asyncio.sleep(0)


async def test_whoever_cannot_wait_does_what_it_takes() -> None:
    backlog, done = Backlog(1000), list[int]()
    backlog.do(done.extend, range(3000))
    assert len(done) == 1000
    assert backlog.do_some(500) == 500
    assert len(done) == 1500
    backlog.do_all()
    assert done == list(range(3000))
    await asyncio.sleep(0)
    assert len(done) == 3000


async def test_what_is_few_goes_ahead_of_what_waits_where_it_may() -> None:
    backlog, done = Backlog(1000), list[int]()
    backlog.do(done.extend, range(3000))
    given = backlog.given
    backlog.do_ahead(done.extend, [-1] * FEW)
    assert done == [*range(1000), *[-1] * FEW]
    assert backlog.given == given and not backlog.has_done(given)
    backlog.do_ahead(done.extend, [-2] * (FEW + 1))
    await backlog.done()
    assert done[1000 + FEW :] == [*range(1000, 3000), *[-2] * (FEW + 1)]
    assert backlog.has_done(backlog.given)
