"""A small tree of chunks, and policies driven by random paths through it."""

from hashlib import blake2b
from random import Random
from typing import Any

from async_cache.retention.policy import EvictionPolicy
from async_cache.values import Removal


class Chunk:
    """An item of a policy."""

    def __init__(self, chunk_hash: bytes) -> None:
        self.chunk_hash = chunk_hash
        self.older: Chunk | None = None
        self.newer: Chunk | None = None
        self.node: Any = None


def chunk_hash(*steps: int) -> bytes:
    """The hash of the chunk at the end of these steps from the root."""
    return blake2b(repr(steps).encode(), digest_size=32).digest()


class Tree:
    """Chunks that are there, and a policy that knows them."""

    def __init__(self, policy: EvictionPolicy[Chunk], random: Random) -> None:
        self.policy, self.random = policy, random
        self.there: dict[bytes, Chunk] = {}
        self.parents: dict[bytes, bytes | None] = {}

    def path(self, most: int = 9, ways: int = 2) -> list[bytes]:
        """A path from the root."""
        steps: list[int] = []
        hashes = []
        for _ in range(self.random.randrange(1, most)):
            steps.append(self.random.randrange(ways))
            hashes.append(chunk_hash(*steps))
        return hashes

    def store(self, path: list[bytes]) -> None:
        """Add the chunks of a path that are not there."""
        before: Chunk | None = None
        for key in path:
            chunk = self.there.get(key)
            if chunk is None:
                chunk = self.there[key] = Chunk(key)
                self.parents[key] = before.chunk_hash if before is not None else None
                self.policy.enter(chunk, before)
            before = chunk

    def use(self, path: list[bytes]) -> None:
        """Use those chunks of a path that are there, the last one first."""
        for key in reversed(path):
            if key in self.there:
                self.policy.use(self.there[key])

    def remove(self, chunk: Chunk, removal: Removal = Removal.CAPACITY) -> None:
        """Take a chunk away."""
        self.policy.left(chunk, removal)
        del self.there[chunk.chunk_hash], self.parents[chunk.chunk_hash]

    def check_order(self) -> None:
        """Assert that every chunk is among the victims, once, and before what it builds on."""
        order = [chunk.chunk_hash for chunk in self.policy.victims()]
        assert sorted(order) == sorted(self.there)
        places = {key: place for place, key in enumerate(order)}
        for key, place in places.items():
            parent = self.parents[key]
            assert parent not in places or places[parent] > place
