"""What `lru` would have found, against the policy itself."""

from random import Random

import pytest

from async_cache.retention.duel import Duel
from async_cache.retention.lru import LeastRecentlyUsed
from async_cache.retention.prefix import PrefixPolicy
from async_cache.values import Removal
from tests.retention.paths import Chunk, Tree, chunk_hash

CAPACITY = 400


@pytest.mark.parametrize("seed", range(3))
def test_it_knows_what_lru_would_have_within_a_part_of_a_hundred(seed: int) -> None:
    random, duel = Random(seed), Duel()
    lru: LeastRecentlyUsed[Chunk] = LeastRecentlyUsed()
    there: dict[int, Chunk] = {}
    used: dict[int, float] = {}
    found = would = 0
    for turn in range(20_000):
        number = min(int(random.paretovariate(0.4)), 2000)
        found += number in there
        lru.use(there.setdefault(number, Chunk(chunk_hash(number))))
        if number in used:
            would += duel.has(used[number], 1)
        used[number] = float(turn)
        duel.asked(1, float(turn), CAPACITY, is_full=True)
        if len(there) > CAPACITY:
            oldest = next(lru.victims())
            lru.left(oldest, Removal.CAPACITY)
            del there[next(key for key, chunk in there.items() if chunk is oldest)]
    assert abs(found - would) < 0.01 * found


def test_who_is_behind_does_as_lru_does_until_as_much_again_was_asked_for() -> None:
    duel = Duel()
    duel.score(1000, 500, 510, CAPACITY)
    assert not duel.is_behind, "that may be chance"
    duel.score(1000, 500, 540, CAPACITY)
    assert duel.is_behind
    duel.score(1999, 500, 500, CAPACITY)
    assert duel.is_behind
    duel.score(1, 0, 0, CAPACITY)
    assert not duel.is_behind
    duel.score(1000, 600, 500, CAPACITY)
    duel.score(1000, 500, 590, CAPACITY)
    assert not duel.is_behind, "what was gained before counts, too"


def test_a_policy_that_is_behind_lets_go_first_what_was_used_first() -> None:
    now = [0.0]
    policy: PrefixPolicy[Chunk] = PrefixPolicy(lambda: now[0])
    tree, random = Tree(policy, Random(0)), Random(1)
    used: list[bytes] = []
    for turn in range(300):
        now[0] += 1.0
        key = chunk_hash(random.randrange(20) if turn % 3 else 1000 + turn)
        policy.asked([key], 4, 4)
        tree.store([key])
        used = [other for other in used if other != key] + [key]
    assert [chunk.chunk_hash for chunk in policy.victims()] != used
    policy._leaves.as_lru = True
    left = []
    for chunk in policy.victims():
        left.append(chunk.chunk_hash)
        tree.remove(chunk)
    assert left == used
    policy.check_integrity()
