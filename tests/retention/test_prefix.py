"""The policy that learns which paths are asked for again."""

from random import Random

import pytest

from async_cache.retention import prefix
from async_cache.retention.prefix import PrefixPolicy
from tests.retention.paths import Chunk, Tree, chunk_hash


class Clock:
    """Time that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def policy_at() -> tuple[PrefixPolicy[Chunk], Clock]:
    clock = Clock()
    return PrefixPolicy(clock), clock


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_its_records_agree_after_every_step(seed: int, chained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where digests of an engine stand at many places: then its records may disagree, but nothing gets lost."""
    monkeypatch.setattr(prefix, "MIN_REMEMBERED", 40)
    random = Random(seed)
    policy, clock = policy_at()
    tree = Tree(policy, random)
    for _ in range(60):
        clock.now += random.expovariate(0.2)
        path = tree.path() if chained else [chunk_hash(random.randrange(12)) for _ in range(random.randrange(1, 9))]
        if random.random() < 0.6:
            policy.asked(path, 4 * len(path) + random.randrange(-2, 4), 4, random.choice([None, 0, 5, 1000]))
        if random.random() < 0.6:
            tree.store(path[: random.randrange(1, len(path) + 1)])
        else:
            wanted = random.randrange(6)
            chosen = []
            for chunk in policy.victims():
                chance = random.random()
                if chance < 0.2:
                    policy.suspend(chunk)
                elif chance < 0.6:
                    chosen.append(chunk)
                elif chance < 0.8 and chunk.chunk_hash not in tree.parents.values():
                    tree.remove(chunk)
                if len(chosen) >= wanted:
                    break
            for chunk in chosen[:: random.choice([1, 2])]:
                tree.remove(chunk)
            for chunk in tree.there.values():
                policy.use(chunk)
        if chained:
            policy.check_integrity()
        assert {chunk.chunk_hash for chunk in policy.victims()} == set(tree.there)


def ask(tree: Tree, path: list[bytes]) -> None:
    tree.policy.asked(path, 4 * len(path), 4)
    tree.store(path)
    tree.use(path)


def test_what_comes_back_is_kept_before_what_never_does() -> None:
    policy, clock = policy_at()
    tree = Tree(policy, Random(0))
    for turn in range(400):
        clock.now += 1.0
        if turn % 10 == 0:
            for number in range(3):  # these come back every ten seconds, twice as long as the others
                ask(tree, [chunk_hash(number), chunk_hash(number, 0)])
        else:
            ask(tree, [chunk_hash(turn, 1), chunk_hash(turn, 1, 1)])
    hot = {chunk_hash(number) for number in range(3)} | {chunk_hash(number, 0) for number in range(3)}
    assert {chunk.chunk_hash for chunk in list(policy.victims())[-len(hot) :]} == hot  # used last were others


def test_a_chunk_that_is_worth_less_than_all_that_are_there_is_not_admitted() -> None:
    policy, clock = policy_at()
    tree = Tree(policy, Random(0))
    for turn in range(300):
        clock.now += 1.0
        ask(tree, [chunk_hash(turn % 3)])
        policy.asked([chunk_hash(turn, 1)], 4, 4)  # never stored, and never asked for again
    policy.asked([chunk_hash(1000, 1)], 4, 4)
    assert not policy.admits(chunk_hash(1000, 1))
    policy.asked([chunk_hash(0)], 4, 4)
    assert policy.admits(chunk_hash(0))


def test_no_more_is_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "MIN_REMEMBERED", 100)
    policy, clock = policy_at()
    for turn in range(1000):
        clock.now += 1.0
        policy.asked([chunk_hash(turn), chunk_hash(turn, 1)], 8, 4)
    assert len(policy) <= 100
    policy.check_integrity()


def test_a_path_costs_by_the_branches_that_it_crosses_and_not_by_its_chunks() -> None:
    """What it takes over of a branch is one row, however long: counted in lessons."""
    policy, clock = policy_at()
    path = [chunk_hash(number) for number in range(4096)]
    for _ in range(10):
        clock.now += 1.0
        policy.asked(path, 4 * 4096, 4)
    assert policy.lessons < 40


def test_what_lies_before_a_suspended_item_may_leave_and_so_may_what_is_left_of_its_branch() -> None:
    policy, _ = policy_at()
    tree = Tree(policy, Random(0))
    path = [chunk_hash(0), chunk_hash(0, 1), chunk_hash(0, 1, 1)]
    ask(tree, path)
    deepest = tree.there[path[-1]]
    policy.suspend(deepest)
    assert {tree.there[key] for key in path[:-1]} <= set(policy.victims())
    policy.suspend(deepest)
    tree.remove(deepest)  # as it may while it is leased: deleted
    assert [chunk.chunk_hash for chunk in policy.victims()] == path[1::-1]
