"""L1: reserve, commit, lease, evict; exactly as much as is needed, the tail of a prefix before its head."""

import random

import pytest

from async_cache import ModelLayout, ObjectGroup
from async_cache.l1.store import L1Store
from async_cache.memory.arena import Arena
from async_cache.prompt.objects import PAGE_BYTES
from async_cache.retention.lru import LeastRecentlyUsed

PAGES = 16


def make_layout(pages: int, **options) -> ModelLayout:
    return ModelLayout(f"{pages} pages", (ObjectGroup((pages * PAGE_BYTES,), "uint8"),), chunk_tokens=1, **options)


ONE, TWO, THREE = make_layout(1), make_layout(2), make_layout(3)
RANKS = make_layout(1, world_size=2)
WINDOW = ModelLayout(
    "window", (ObjectGroup((8,), "uint8"), ObjectGroup((8,), "uint8", window_chunks=1)), chunk_tokens=1
)


@pytest.fixture
def unwritten():
    return []


@pytest.fixture
def deferred():
    return []


@pytest.fixture
def l1(unwritten, deferred):
    store = L1Store(
        Arena(PAGES * PAGE_BYTES), LeastRecentlyUsed(), unwritten.append, on_deferred_commit=deferred.append
    )
    yield store
    store.check_integrity()
    store.close()
    store.arena.close()


def put(l1, layout, names, rank=0):
    """Store a prefix whose chunks are named by single letters."""
    made = l1.reserve(layout, [(name.encode(), rank) for name in names])
    before = [None, *names]
    for reservation, after in zip(made, before, strict=False):
        l1.commit(reservation, layout.objects.rank_masks[rank], after and after.encode())
    l1.check_integrity()
    return len(made)


def resident(l1):
    return "".join(sorted(name.decode() for name in l1.index))


def test_blocks_are_whole_pages_that_do_not_overlap(l1):
    made = l1.reserve(WINDOW, [(b"a", 0), (b"b", 0)])
    assert [reservation.offset % PAGE_BYTES for reservation in made] == [0, 0]
    assert l1.reserved_bytes == 2 * PAGE_BYTES
    for reservation in made:
        l1.discard((reservation,))
        l1.discard((reservation,))
    assert l1.used_bytes == 0


def test_what_is_reserved_can_not_be_found_until_it_is_committed(l1):
    (reservation,) = l1.reserve(ONE, [(b"a", 0)])
    assert b"a" not in l1.index
    l1.commit(reservation, 1)
    assert l1.index[b"a"].present == 1


def test_eviction_takes_exactly_what_is_needed_and_the_tail_first(l1):
    assert put(l1, ONE, "abcdefghijklmnop") == 16
    assert put(l1, ONE, "123") == 3
    assert resident(l1) == "123abcdefghijklm"


def test_the_tail_goes_first_also_after_a_partial_read_and_with_a_shared_head(l1):
    put(l1, ONE, "abcdefgh")
    put(l1, ONE, "ABCDEFGH")
    for names in ("abc", "AB"):
        entries = [l1.index[name.encode()] for name in names]
        l1.lease(entries)
        for entry in reversed(entries):
            l1.release((entry,))
    put(l1, ONE, "12345")
    assert resident(l1) == "12345ABCDEFGHabc"
    put(l1, ONE, "678")
    assert resident(l1) == "12345678ABCDEabc"


def test_what_is_leased_or_held_stays(l1):
    put(l1, ONE, "abcdefghijklmnop")
    entries = [l1.index[name.encode()] for name in "op"]
    l1.lease(entries[:1])
    l1.pin(entries[1])
    assert put(l1, ONE, "0123456789ABCDEF") == 14
    assert resident(l1) == "0123456789ABCDop"
    l1.release((entries[0],))
    l1.unpin(entries[1])


def test_an_impossible_reservation_evicts_nothing(l1):
    put(l1, ONE, "abcdefghijklmnop")
    keep = [l1.index[name.encode()] for name in "bdfhjlnp"]  # no two pages in a row can be had
    l1.lease(keep)
    assert put(l1, TWO, "1") == 0
    assert put(l1, make_layout(17), "2") == 0
    assert resident(l1) == "abcdefghijklmnop"
    for entry in keep:
        l1.release((entry,))


def test_where_sizes_are_mixed_only_what_lies_in_the_way_is_evicted(l1):
    put(l1, ONE, "abcdefghijklmnop")
    l1.touch(name.encode() for name in "apbocndmelfkgjhi")  # the oldest are at the two ends
    assert put(l1, THREE, "1") == 1
    assert len(l1.index) == 16 - 3 + 1


def test_all_ranks_of_a_chunk_leave_together(l1):
    for rank in (0, 1):
        put(l1, RANKS, "abcdefgh", rank)
    assert put(l1, ONE, "1") == 1
    assert resident(l1) == "1abcdefg"
    assert l1.used_bytes == 15 * PAGE_BYTES


def test_the_first_commit_of_an_object_wins(l1):
    first, second = (l1.reserve(ONE, [(b"a", 0)])[0] for _ in range(2))
    entry = l1.commit(first, 1)
    assert l1.commit(second, 1) is entry
    assert entry.offset(0) == first.offset
    assert l1.used_bytes == PAGE_BYTES


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("leased", [False, True])
def test_an_incomplete_block_is_replaced_or_completed_if_somebody_reads_it_or_writes_it_back(l1, leased, pinned):
    part, whole = (l1.reserve(WINDOW, [(b"a", 0)])[0] for _ in range(2))
    entry = l1.commit(part, 1)
    if leased:
        l1.lease([entry])
    if pinned:
        l1.pin(entry)
    l1.arena.view[whole.offset : whole.offset + 16] = bytes(16 * [7])
    l1.commit(whole, 3)
    assert entry.present == 3
    assert entry.offset(0) == (part if leased or pinned else whole).offset
    begin, end = WINDOW.objects.spans[0][1]
    assert bytes(l1.arena.view[entry.offset(0) + begin : entry.offset(0) + end]) == bytes([7]) * (end - begin)
    assert l1.used_bytes == PAGE_BYTES
    l1.check_integrity()
    if pinned:
        l1.unpin(entry)
    if leased:
        l1.release((entry,))


@pytest.mark.parametrize("brings", [0, 2])
@pytest.mark.parametrize("removed", [False, True])
def test_what_is_committed_where_a_load_writes_to_is_there_when_that_has_ended(l1, deferred, brings, removed):
    part, whole, again = (l1.reserve(WINDOW, [(b"a", 0)])[0] for _ in range(3))
    entry = l1.commit(part, 1)
    loading, other = l1.reserve_within(entry, 0), l1.reserve_within(entry, 0)
    begin, end = WINDOW.objects.spans[0][1]
    for value, reservation in ((7, whole), (8, again)):
        l1.arena.view[reservation.offset + begin : reservation.offset + end] = bytes([value]) * (end - begin)
        assert l1.commit(reservation, 3) is entry
    assert (entry.present, l1.deferred) == (1, 2)
    l1.check_integrity()
    if removed:
        l1.remove((entry,))
    l1.discard((other,))
    assert l1.deferred == 2
    if brings:
        l1.commit(loading, brings)
    else:
        l1.discard((loading,))
    assert (entry.present, entry.filling, entry.pins, l1.deferred, l1.reserved_bytes) == (3, 0, 0, 0, 0)
    assert l1.arena.view[entry.offset(0) + begin] == (0 if brings else 7)
    assert deferred == ([] if brings or removed else [entry])


def test_a_removed_chunk_keeps_its_memory_until_it_is_released(l1):
    put(l1, ONE, "a")
    entry = l1.index[b"a"]
    l1.lease([entry])
    l1.remove((entry,))
    assert not l1.index
    assert put(l1, ONE, "a") == 1
    l1.check_integrity()
    assert l1.used_bytes == 2 * PAGE_BYTES
    l1.release((entry,))
    assert l1.used_bytes == PAGE_BYTES


def test_quarantined_room_is_counted_apart_and_comes_back(l1):
    (reservation,) = l1.reserve(ONE, [(b"a", 0)])
    l1.quarantine(reservation)
    assert (l1.reserved_bytes, l1.quarantined_bytes) == (0, PAGE_BYTES)
    l1.discard((reservation,))
    assert (l1.quarantined_bytes, l1.used_bytes) == (0, 0)


def test_what_is_evicted_unwritten_is_told(l1, unwritten):
    put(l1, ONE, "abcdefghijklmnop")
    l1.index[b"p"].unwritten = 1
    put(l1, ONE, "12")
    assert [entry.chunk_hash for entry in unwritten] == [b"p"]


def test_a_long_churn_of_mixed_sizes_neither_leaks_nor_collapses():
    dice = random.Random(1)
    l1 = L1Store(Arena(512 * PAGE_BYTES), LeastRecentlyUsed(), lambda entry: None)
    layouts, used = [make_layout(pages) for pages in (1, 3, 8)], []
    for turn in range(3000):
        layout = dice.choice(layouts)
        names = [b"%d/%d" % (turn, n) for n in range(dice.randint(1, 6))]
        made = l1.reserve(layout, [(name, 0) for name in names])
        assert len(made) == len(names)
        for reservation in made:
            l1.commit(reservation, 1)
        if l1.index and dice.random() < 0.5:
            l1.touch(dice.sample(list(l1.index), min(5, len(l1.index))))
        if turn > 500:
            used.append(l1.used_bytes / l1.arena.size_bytes)
    l1.check_integrity()
    assert sum(used) / len(used) > 0.9
    for entry in list(l1.index.values()):
        l1.remove((entry,))
    assert len(l1.reserve(make_layout(512), [(b"all", 0)])) == 1
