"""Every policy: what it must keep to, and, of those from the literature, that they are what their authors describe."""

from collections.abc import Callable, Iterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_cache.errors import ConfigError
from async_cache.retention.arc import AdaptiveReplacement
from async_cache.retention.fifo import FirstInFirstOut
from async_cache.retention.policies import NAMES, make_policy
from async_cache.retention.policy import EvictionPolicy
from async_cache.retention.s3fifo import S3FIFO, SMALL_SHARE
from async_cache.values import Removal
from tests.retention.paths import Chunk, Tree, chunk_hash


def clock_of(random: Random) -> Callable[[], float]:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += random.expovariate(0.2)
        return now

    return clock


TREES = [name for name in NAMES if name != "fifo"]
"""Those that let a chunk leave only after what builds on it."""


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("seed", range(60))
def test_all_are_victims_once_and_none_comes_before_what_builds_on_it(name: str, seed: int) -> None:
    random = Random(seed)
    tree = Tree(make_policy(name, clock_of(random)), random)
    for _ in range(50):
        path = tree.path()
        if random.random() < 0.7:
            tree.policy.asked(path, 4 * len(path) + random.randrange(-2, 4), 4, random.choice([None, 0, 7, 1000]))
            tree.store(path)
            tree.use(path)
        else:
            wanted = random.randrange(6)
            victims = tree.policy.victims()
            chosen = [chunk for _, chunk in zip(range(wanted), victims, strict=False)]
            victims.close()  # type: ignore[attr-defined]
            for chunk in chosen:
                tree.remove(chunk)
        tree.check_order()


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("seed", range(20))
def test_what_came_may_leave_at_once_and_what_builds_on_what_was_passed_over_is_not_forgotten(
    name: str, seed: int
) -> None:
    random = Random(seed)
    tree = Tree(make_policy(name, clock_of(random)), random)
    for _ in range(40):
        path = tree.path()
        tree.policy.asked(path, 4 * len(path), 4)
        tree.store(path)
        for count, chunk in enumerate(tree.policy.victims()):
            if random.random() < 0.5 and chunk.chunk_hash not in tree.parents.values():
                tree.remove(chunk)
            if count > random.randrange(8):
                break
        tree.check_order()


@pytest.mark.parametrize("name", TREES)
def test_suspended_items_may_be_left_out_until_they_are_used(name: str) -> None:
    random = Random(0)
    tree = Tree(make_policy(name, clock_of(random)), random)
    path = [chunk_hash(0), chunk_hash(0, 1), chunk_hash(0, 1, 1)]
    tree.policy.asked(path, 12, 4)
    tree.store(path)
    for chunk in tree.policy.victims():
        tree.policy.suspend(chunk)
    tree.use(path)
    tree.check_order()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(40))
def test_what_is_suspended_is_looked_at_once_and_comes_back_in_its_place(name: str, seed: int) -> None:
    """A caller that keeps chunks for long, always with all that they build on, as one does that retains prefixes."""
    random = Random(seed)
    tree = Tree(make_policy(name, clock_of(random)), random)
    kept: set[bytes] = set()
    suspended: set[bytes] = set()
    for _ in range(60):
        path = tree.path()
        if random.random() < 0.6:
            tree.policy.asked(path, 4 * len(path), 4)
            tree.store(path)
            tree.use(path)
            suspended.difference_update(path)
            kept.update(path if random.random() < 0.2 else ())
        elif random.random() < 0.3:
            kept.difference_update(path)
            for key in kept.copy():  # what builds on what is kept no more
                parent = tree.parents[key]
                while parent is not None and parent in kept:
                    parent = tree.parents[parent]
                if parent is not None:
                    kept.discard(key)
            for key in [key for key in tree.there if key in suspended - kept]:  # what others build on first
                tree.policy.resume(tree.there[key])
                suspended.discard(key)
        wanted = min(random.randrange(4), len(tree.there.keys() - kept))
        for chunk in tree.policy.victims() if wanted else ():
            if chunk.chunk_hash in kept:
                assert name == "prefix" or chunk.chunk_hash not in suspended
                tree.policy.suspend(chunk)
                suspended.add(chunk.chunk_hash)
            elif chunk.chunk_hash not in tree.parents.values():
                tree.remove(chunk)
                wanted -= 1
            if not wanted:
                break
        order = [chunk.chunk_hash for chunk in tree.policy.victims()]
        assert len(set(order)) == len(order) and tree.there.keys() - suspended <= set(order)
        if name != "fifo":
            places = {key: place for place, key in enumerate(order)}
            for key in order:
                parent = tree.parents[key]
                assert parent is None or parent in suspended or places.get(parent, len(order)) > places[key]


@pytest.mark.parametrize("name", ["lru", "fifo", "s3fifo", "arc"])
def test_what_was_suspended_comes_back_as_the_first(name: str) -> None:
    policy = make_policy(name, lambda: 0.0)
    chunks = [Chunk(chunk_hash(number)) for number in range(6)]
    for chunk in chunks:
        policy.enter(chunk, None)
    first = next(iter(policy.victims()))
    policy.suspend(first)
    assert next(iter(policy.victims())) is not first
    policy.resume(first)
    assert next(iter(policy.victims())) is first
    policy.resume(first)
    policy.left(first, Removal.CAPACITY)
    assert set(policy.victims()) == set(chunks) - {first}


def test_a_policy_that_there_is_none_of_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'lfu'.*prefix, lru, fifo, s3fifo, arc, tinylfu"):
        make_policy("lfu", lambda: 0.0)


# Against slow models, without trees.

Accesses = st.lists(st.integers(0, 11), max_size=200)


def evictions(policy: EvictionPolicy[Chunk], accesses: list[int], capacity: int) -> Iterator[int]:
    """What leaves, in order, where each access of something that is not there takes it in."""
    there: dict[int, Chunk] = {}
    for number in accesses:
        if number in there:
            policy.use(there[number])
            continue
        if len(there) == capacity:
            victim = next(iter(policy.victims()))
            gone = next(n for n, chunk in there.items() if chunk is victim)
            policy.left(there.pop(gone), Removal.CAPACITY)
            yield gone
        there[number] = Chunk(chunk_hash(number))
        policy.enter(there[number], None)


@given(Accesses, st.integers(1, 6))
def test_fifo_is_a_queue(accesses: list[int], capacity: int) -> None:
    queue: list[int] = []
    left = []
    for number in accesses:
        if number not in queue:
            if len(queue) == capacity:
                left.append(queue.pop(0))
            queue.append(number)
    assert list(evictions(FirstInFirstOut(), accesses, capacity)) == left


@given(Accesses, st.integers(1, 6))
def test_s3fifo_is_what_its_authors_describe(accesses: list[int], capacity: int) -> None:
    small: list[int] = []
    main: list[int] = []
    ghosts: list[int] = []
    uses: dict[int, int] = {}
    left = []
    for number in accesses:
        if number in uses:
            uses[number] = min(uses[number] + 1, 3)
            continue
        if len(uses) == capacity:
            small_first = len(small) >= SMALL_SHARE * capacity
            for queue in (small, main, main) if small_first else (main, small, main):
                gone = None
                while queue and gone is None:
                    oldest = queue.pop(0)
                    if uses[oldest] >= (2 if queue is small else 1):
                        uses[oldest] = 0 if queue is small else uses[oldest] - 1
                        main.append(oldest)
                    else:
                        gone = oldest
                        if queue is small:
                            ghosts = [*ghosts, gone][-(capacity - 1) :] if capacity > 1 else []
                if gone is not None:
                    break
            assert gone is not None
            del uses[gone]
            left.append(gone)
        (main if number in ghosts else small).append(number)
        if number in ghosts:
            ghosts.remove(number)
        uses[number] = 0
    assert list(evictions(S3FIFO(), accesses, capacity)) == left


@given(Accesses, st.integers(1, 6))
def test_arc_keeps_what_is_used_again_and_moves_its_boundary_by_what_comes_back(
    accesses: list[int], capacity: int
) -> None:
    once: list[int] = []
    again: list[int] = []
    once_left: list[int] = []
    again_left: list[int] = []
    wanted = 0.0
    left = []
    for number in accesses:
        if number in once + again:
            (once if number in once else again).remove(number)
            again.append(number)
            continue
        known = len(once) + len(again)
        if known == capacity:
            first = once if (once and (len(once) > wanted or not again)) else again
            gone = first.pop(0)
            ghosts = once_left if first is once else again_left
            ghosts.append(gone)
            known -= 1
            while len(ghosts) > known:
                ghosts.pop(0)
            left.append(gone)
        if number in once_left:
            wanted = min(wanted + max(1.0, len(again_left) / len(once_left)), known + 1)
            once_left.remove(number)
            again.append(number)
        elif number in again_left:
            wanted = max(wanted - max(1.0, len(once_left) / len(again_left)), 0.0)
            again_left.remove(number)
            again.append(number)
        else:
            once.append(number)
    assert list(evictions(AdaptiveReplacement(), accesses, capacity)) == left
