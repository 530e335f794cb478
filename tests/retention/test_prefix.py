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
    monkeypatch.setattr(prefix, "_LESSONS", 20 * (seed % 3))
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


def test_what_is_of_sessions_that_have_ended_leaves_first_and_of_that_the_least_worth() -> None:
    policy, clock = policy_at()
    tree = Tree(policy, Random(0))
    for turn in range(300):  # what is asked for anew each time is worth more than what never comes back
        clock.now += 1.0
        ask(tree, [chunk_hash(turn % 3)])
        ask(tree, [chunk_hash(turn, 1)])
        if turn < 290:
            tree.remove(tree.there[chunk_hash(turn, 1)])
    worthless, worth = [chunk_hash(turn, 1) for turn in range(290, 300)], chunk_hash(2)
    policy.hint([worthless[4]], returns=False)
    assert next(policy.victims()).chunk_hash == worthless[4]
    fresh = [[chunk_hash(number, 2), chunk_hash(number, 2, 2)] for number in range(2)]
    for path in fresh:
        policy.asked(path, 8, 4)
        tree.store(path)
    policy.asked(fresh[1], 8, 4)  # its second use: worth more than the other
    for path in reversed(fresh):
        policy.hint(path, returns=False)
    order = [chunk.chunk_hash for chunk in policy.victims()]
    assert {*order[:5]} == {worthless[4], *fresh[0], *fresh[1]}
    assert max(map(order.index, fresh[0])) < min(map(order.index, fresh[1])) < order.index(worth)


def test_a_night_without_requests_costs_as_much_as_a_pause() -> None:
    orders = []
    for night in (prefix._IDLE_SECONDS, 36_000.0):
        policy, clock = policy_at()
        tree, random = Tree(policy, Random(0)), Random(1)
        for turn in range(600):
            clock.now += night if turn % 60 == 0 else 1.0
            ask(tree, [chunk_hash(random.randrange(20)), chunk_hash(turn, 1)])
        orders.append([chunk.chunk_hash for chunk in policy.victims()])
    assert orders[0] == orders[1]


def recalled(policy: PrefixPolicy[Chunk], clock: Clock) -> PrefixPolicy[Chunk]:
    """A policy that goes on from what another one has learned."""
    after: PrefixPolicy[Chunk] = PrefixPolicy(clock)
    for _ in after.recall(list(policy.learned())):
        pass
    return after


@pytest.mark.parametrize("seed", range(20))
def test_after_a_restart_it_judges_what_comes_back_as_before(seed: int) -> None:
    """In whatever order it comes back, and without what lies before it being told."""
    random = Random(seed)
    policy, clock = policy_at()
    tree = Tree(policy, random)
    for _ in range(80):
        clock.now += random.expovariate(0.2)
        path = tree.path()
        policy.asked(path, 4 * len(path), 4, random.choice([None, 0, 5, 1000]))
        tree.store(path)
    for chunk in list(policy.victims())[:8]:
        tree.remove(chunk)
    after = recalled(policy, clock)
    came_back = Tree(after, random)
    for key in random.sample(sorted(tree.there), len(tree.there)):
        came_back.there[key] = Chunk(key)
        came_back.parents[key] = tree.parents[key]
        after.use(came_back.there[key])
    after.check_integrity()
    assert len(after) == len(policy) and after.lessons == policy.lessons
    came_back.check_order()
    for _ in range(20):
        path = tree.path()
        policy.asked(path, 4 * len(path), 4)
        after.asked(path, 4 * len(path), 4)
        assert [after.admits(key) for key in path] == [policy.admits(key) for key in path]
        after.check_integrity()


def test_what_cannot_be_what_it_has_learned_is_refused() -> None:
    policy, clock = policy_at()
    ask(Tree(policy, Random(0)), [chunk_hash(0), chunk_hash(0, 1)])
    learned = list(policy.learned())
    for pieces in ([b""], [learned[0][:-4]], [learned[0], b"\xc1"], [learned[0], b"\x91\x90"]):
        with pytest.raises(ValueError, match=r"these are|a branch has"):
            for _ in PrefixPolicy[Chunk](clock).recall(pieces):
                pass


def test_a_long_prompt_that_comes_back_from_its_end_costs_a_step_for_each_chunk() -> None:
    policy, clock = policy_at()
    path = [chunk_hash(number) for number in range(2048)]
    policy.asked(path, 4 * len(path), 4)
    after = recalled(policy, clock)
    steps = 0
    of = type(after._last or policy._last)
    assert of is not None
    places = of.place_of

    def counted(branch: object, chunk_hash: bytes) -> int:
        nonlocal steps
        steps += 1
        return places(branch, chunk_hash)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of, "place_of", counted)
        for key in reversed(path):
            after.use(Chunk(key))
    assert steps < 8 * len(path)
    after.check_integrity()
