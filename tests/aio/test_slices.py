"""Slices of many items, and the turns of the loop between them."""

import asyncio
import gc

import pytest

from async_cache.aio.slices import InTurns, slices, working_for


@pytest.mark.parametrize("count", [1, 3, 4, 10, 11])
async def test_all_items_come_in_their_order_so_many_at_a_time(count: int) -> None:
    items = range(10)
    some = [part async for part in InTurns(items, count)]
    assert some == list(slices(items, count))
    assert [item for part in some for item in part] == list(items)
    assert all(len(part) == count for part in some[:-1]) and 0 < len(some[-1]) <= count


async def test_of_nothing_there_are_no_slices() -> None:
    assert [part async for part in InTurns([], 3)] == []


async def test_between_two_slices_the_loop_has_its_turn_and_before_the_first_it_has_not() -> None:
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        asyncio.get_running_loop().call_soon(turn)

    asyncio.get_running_loop().call_soon(turn)
    seen = [turns async for _ in InTurns(range(10), 3)]
    assert seen[0] == 0 and sorted(set(seen)) == seen


async def test_what_is_left_in_the_middle_leaves_no_task_behind() -> None:
    async for _ in InTurns(range(10), 3):
        break
    gc.collect()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_of_many_who_work_in_slices_a_few_have_each_turn_and_all_come_to_their_end():
    in_turn: list[int] = []

    async def work():
        async for _ in InTurns(range(40), 2):
            in_turn[-1] += 1

    tasks = [asyncio.create_task(work()) for _ in range(30)]
    tasks[3].cancel()
    given_up = asyncio.create_task(work())
    in_turn.append(0)
    await asyncio.sleep(0)  # the first slice of each is done at once
    in_turn.append(0)
    given_up.cancel()
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        in_turn.append(0)
    assert max(in_turn[1:]) <= 2 and sum(in_turn) >= 29 * 20


async def test_who_does_very_much_in_slices_has_as_many_turns_as_who_does_little():
    done: list[str] = []

    async def work(whose: str, slices: int) -> None:
        working_for.set(whose)
        async for _ in InTurns(range(slices), 1):
            pass
        done.append(whose)

    much = [asyncio.create_task(work("red", 1000)) for _ in range(30)]
    await asyncio.sleep(0)
    turns, little = 0, asyncio.create_task(work("blue", 20))
    while not little.done():
        await asyncio.sleep(0)
        turns += 1
    assert done == ["blue"] and turns < 50, "and not behind each of the thirty"
    for task in much:
        task.cancel()
