"""Which chunks leave, in which order, and no more of them than must."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from async_cache.l1.entry import Entry, Reservation
from async_cache.l1.store import L1Store
from async_cache.memory.arena import Arena
from async_cache.prompt.layout import ModelLayout
from async_cache.prompt.objects import PAGE_BYTES, ObjectGroup
from async_cache.retention.lru import LeastRecentlyUsed


def make_layout(pages: int, world_size: int = 1) -> ModelLayout:
    return ModelLayout("model", (ObjectGroup((pages * PAGE_BYTES,), "uint8"),), world_size=world_size)


ONE, TWO, FOUR = make_layout(1), make_layout(2), make_layout(4)
RANKS = make_layout(1, world_size=2)


class CountingPolicy(LeastRecentlyUsed):
    """Counts how many entries the store looks at."""

    looked_at = 0

    def victims(self) -> Iterator[Entry]:
        for entry in super().victims():
            self.looked_at += 1
            yield entry


def make_store(pages: int) -> L1Store:
    return L1Store(Arena(pages * PAGE_BYTES), CountingPolicy(), lambda entry: None)


def name(prefix: str, number: int) -> bytes:
    return f"{prefix}{number}".encode()


def put(l1: L1Store, layout: ModelLayout, prefix: str, chunks: int, first: int = 0) -> int:
    """Store chunks of a prefix, as a writer does; how many found room."""
    made = l1.reserve(
        layout, [(name(prefix, n), rank) for rank in range(layout.world_size) for n in range(first, chunks)]
    )
    for reservation in made:
        number = int(reservation.chunk_hash[1:])
        after = name(prefix, number - 1) if number else None
        l1.commit(reservation, layout.objects.rank_masks[reservation.rank], after)
    l1.check_integrity()
    return len(made)


def lease(l1: L1Store, prefix: str, numbers: Sequence[int]) -> list[Entry]:
    entries = [l1.index[name(prefix, number)] for number in numbers]
    l1.lease(entries)
    return entries


def release(l1: L1Store, entries: Sequence[Entry]) -> None:
    for entry in reversed(entries):
        l1.release((entry,))
    l1.check_integrity()


def left(l1: L1Store, prefix: str) -> list[int]:
    return sorted(int(chunk_hash[1:]) for chunk_hash in l1.index if chunk_hash.startswith(prefix.encode()))


# The tail before the head.


def test_the_tail_goes_first_when_ranks_were_stored_one_after_the_other() -> None:
    l1 = make_store(8)
    put(l1, RANKS, "a", 4)
    put(l1, ONE, "b", 3)
    assert left(l1, "a") == [0, 1]


def test_a_tail_that_is_stored_while_its_head_is_read_goes_before_it() -> None:
    l1 = make_store(8)
    put(l1, ONE, "a", 2)
    head = lease(l1, "a", range(2))
    put(l1, ONE, "a", 8, first=2)
    release(l1, head)
    for more in range(1, 9):
        put(l1, ONE, "b", more, first=more - 1)
        assert left(l1, "a") == list(range(8 - more))


def test_two_tails_go_before_the_head_that_they_share() -> None:
    l1 = make_store(6)
    put(l1, ONE, "a", 4)
    head = lease(l1, "a", range(2))
    for reservation in l1.reserve(ONE, [(b"c2", 0), (b"c3", 0)]):
        l1.commit(reservation, 1, b"a1" if reservation.chunk_hash == b"c2" else b"c2")
    release(l1, head)
    put(l1, ONE, "b", 4)
    assert (left(l1, "a"), left(l1, "c")) == ([0, 1], [])


def test_what_two_requests_read_stays_until_both_have_left() -> None:
    l1 = make_store(4)
    put(l1, ONE, "a", 4)
    first, second = lease(l1, "a", range(4)), lease(l1, "a", range(2))
    release(l1, first)
    assert put(l1, ONE, "b", 4) == 2
    assert left(l1, "a") == [0, 1]
    release(l1, second)
    assert put(l1, ONE, "c", 4) == 4


def test_a_hold_does_not_change_whose_turn_it_is() -> None:
    l1 = make_store(4)
    put(l1, ONE, "a", 4)
    tail = l1.index[b"a3"]
    l1.pin(tail)
    put(l1, ONE, "b", 1)
    assert left(l1, "a") == [0, 1, 3]
    l1.unpin(tail)
    put(l1, ONE, "b", 2, first=1)
    assert left(l1, "a") == [0, 1]


# Where sizes are mixed.


def make_scattered(pages: int) -> L1Store:
    """Full of chunks of a page, of which every sixth is older than all others."""
    l1 = make_store(pages)
    put(l1, ONE, "a", pages)
    l1.touch(name("a", n) for n in sorted(range(pages), key=lambda n: n % 6 != 5))
    return l1


def gone(l1: L1Store, chunks: int) -> list[int]:
    return sorted(set(range(chunks)).difference(left(l1, "a")))


def test_of_the_oldest_those_go_that_lie_side_by_side() -> None:
    l1 = make_store(16)
    put(l1, ONE, "a", 16)
    l1.touch(name("a", n) for n in (3, 9, 12, 10, 0, 5, 7, 1, 2, 4, 6, 8, 11, 13, 14, 15))
    assert put(l1, TWO, "b", 1) == 1
    assert left(l1, "a") == [n for n in range(16) if n not in (9, 10)]


def test_where_the_oldest_are_scattered_one_of_them_goes_with_its_neighbours() -> None:
    l1 = make_scattered(128)
    assert put(l1, FOUR, "b", 1) == 1
    assert gone(l1, 128) == [5, 6, 7, 8]


def test_neighbours_that_are_used_send_it_elsewhere() -> None:
    l1 = make_scattered(128)
    leased = lease(l1, "a", [7])
    held = l1.index[b"a12"]
    l1.pin(held)
    assert put(l1, FOUR, "b", 1) == 1
    assert gone(l1, 128) == [17, 18, 19, 20]
    release(l1, leased)
    l1.unpin(held)


@pytest.mark.parametrize("pages", [2, 16, 64])
def test_room_is_found_among_scattered_small_chunks_without_looking_at_all_of_them(pages: int) -> None:
    l1, count = make_store(4096), 20
    put(l1, ONE, "a", 4096)
    names = list(l1.index)
    random.Random(pages).shuffle(names)
    l1.touch(names)
    policy = l1.shares.of("").policy
    assert isinstance(policy, CountingPolicy)
    policy.looked_at = 0
    assert len(l1.reserve(make_layout(pages), [(name("b", n), 0) for n in range(count)])) == count
    assert policy.looked_at <= 5 * pages * count
    assert len(l1.index) == 4096 - pages * count


def test_what_can_not_be_evicted_for_it_is_found_out_at_once() -> None:
    l1 = make_store(4096)
    put(l1, ONE, "a", 4096)
    leased = lease(l1, "a", range(0, 4096, 2))
    order = [*l1._victims.of("")]
    assert put(l1, TWO, "b", 1) == 0
    assert [*l1._victims.of("")] == order and len(l1.index) == 4096
    release(l1, leased)


# In any order.


class L1Machine(RuleBasedStateMachine):
    """What is done to L1 in any order: its records agree after each step, and it never evicts what is in use."""

    PAGES = 24
    LAYOUTS = (ONE, make_layout(3), make_layout(5), RANKS)

    @initialize()
    def begin(self) -> None:
        self.l1 = make_store(self.PAGES)
        self.reserved: list[Reservation] = []
        self.leased: list[Entry] = []
        self.held: list[Entry] = []

    @rule(layout=st.sampled_from(LAYOUTS), first=st.integers(0, 5), chunks=st.integers(1, 6), rank=st.integers(0, 1))
    def reserve(self, layout: ModelLayout, first: int, chunks: int, rank: int) -> None:
        rank %= layout.world_size
        room = layout.objects.room_bytes[rank]
        before, free = dict(self.l1.index), self.l1.rooms.available_bytes
        in_use = [entry for entry in (*self.leased, *self.held) if not entry.detached]
        wanted = [(f"{self.LAYOUTS.index(layout)}/{n}".encode(), rank) for n in range(first, first + chunks)]
        made = self.l1.reserve(layout, wanted)
        assert [(r.chunk_hash, r.rank) for r in made] == wanted[: len(made)]
        assert len(made) == len(wanted) or free < len(wanted) * room or room > PAGE_BYTES  # pages never are fragmented
        assert not any(entry.detached for entry in in_use)
        assert made or self.l1.index == before
        self.reserved += made

    @rule(data=st.data(), end=st.sampled_from(["commit", "discard", "quarantine"]))
    def end_reservation(self, data: st.DataObject, end: str) -> None:
        if self.reserved:
            reservation = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
            if end == "commit":
                mask = reservation.layout.objects.rank_masks[reservation.rank]
                entry = self.l1.commit(reservation, mask)
                assert self.l1.index[reservation.chunk_hash] is entry and entry.present & mask
            elif end == "discard":
                self.l1.discard((reservation,))
            else:
                self.l1.quarantine(reservation)
                self.reserved.append(reservation)  # to be discarded, or never

    @rule(data=st.data(), use=st.sampled_from(["lease", "hold", "touch", "remove"]))
    def use(self, data: st.DataObject, use: str) -> None:
        if self.l1.index:
            entry = data.draw(st.sampled_from(list(self.l1.index.values())))
            if use == "lease":
                self.l1.lease([entry])
                self.leased.append(entry)
            elif use == "hold":
                self.l1.pin(entry)
                self.held.append(entry)
            elif use == "touch":
                self.l1.touch([entry.chunk_hash])
            else:
                self.l1.remove((entry,))

    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        if self.leased:
            self.l1.release((self.leased.pop(data.draw(st.integers(0, len(self.leased) - 1))),))
        if self.held:
            self.l1.unpin(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def records_agree(self) -> None:
        self.l1.check_integrity()

    def teardown(self) -> None:
        for entry in self.leased:
            self.l1.release((entry,))
        for entry in self.held:
            self.l1.unpin(entry)
        for reservation in self.reserved:
            self.l1.discard((reservation,))
        for entry in list(self.l1.index.values()):
            self.l1.remove((entry,))
        self.l1.check_integrity()
        assert len(self.l1.reserve(make_layout(self.PAGES), [(b"all", 0)])) == 1  # all of it is free, in one piece
        self.l1.arena.close()


TestL1 = L1Machine.TestCase
TestL1.settings = settings(max_examples=100, deadline=None, derandomize=True)


async def test_a_block_has_what_lies_side_by_side_once_it_is_given_back() -> None:
    with patch("async_cache.aio.backlog.FEW", 1), patch("async_cache.l1.store._AT_ONCE", 1):
        l1 = make_store(4)
        assert put(l1, ONE, "a", 4) == 4
        l1.release_soon([lease(l1, "a", [number])[0] for number in (0, 2, 1, 3)])
        await asyncio.sleep(0)
        assert l1.rooms.evictable_bytes == 2 * PAGE_BYTES  # enough, and not side by side
        assert put(l1, TWO, "b", 1) == 1
        l1.backlog.do_all()
        l1.check_integrity()
