"""The policy that knows the future. What it finds is what any policy could find at most, but for very little."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from math import inf
from typing import Any

from async_cache.l1.entry import Entry
from async_cache.recording.trace import Trace
from async_cache.values import Removal


class PerfectForesight:
    """A policy that evicts the leaf whose next use is farthest away, and takes in nothing that is used still later."""

    def __init__(self, trace: Trace):
        self._uses: dict[bytes, list[int]] = {}
        for turn, request in enumerate(trace.requests):
            for chunk_hash in request.path:
                self._uses.setdefault(chunk_hash, []).append(turn)
        self._turn = -1
        self._children: dict[bytes, int] = {}
        self._parents: dict[bytes, bytes] = {}
        self._entries: dict[bytes, Entry] = {}
        self._leaves: list[tuple[float, float, bytes]] = []  # the last one to be used again first

    def asked(self, path: Sequence[bytes], tokens: int, chunk_tokens: int, output_tokens: int | None = None) -> None:
        """A turn goes by."""
        self._turn += 1
        for chunk_hash in path:
            if chunk_hash in self._entries:
                self._offer(chunk_hash)

    def hint(
        self,
        path: Sequence[bytes],
        output_tokens: int | None = None,
        returns: bool | None = None,
        within_seconds: float | None = None,
    ) -> None:
        """It is known."""

    def learned(self) -> Iterator[bytes]:
        """Nothing is learned."""
        return iter(())

    def recall(self, pieces: Iterable[bytes]) -> Iterator[None]:
        """Nothing, neither."""
        return iter(())

    def enter(self, item: Entry, parent: Entry | None, kept: bool = False) -> None:
        """An item came."""
        if parent is not None:
            self._parents[item.chunk_hash] = parent.chunk_hash
            self._children[parent.chunk_hash] = self._children.get(parent.chunk_hash, 0) + 1
        self._entries[item.chunk_hash] = item
        self._offer(item.chunk_hash)

    def use(self, item: Entry, before: Entry | None = None) -> None:
        """It was known."""

    def use_all(self, items: Iterable[Entry]) -> None:
        """They were known."""

    def suspend(self, item: Entry) -> None:
        """It is passed over."""

    def resume(self, item: Entry) -> None:
        """It is passed over no more."""

    def left(self, item: Entry, removal: Removal) -> None:
        """An item has gone, and what it built on may be a leaf now."""
        if self._entries.pop(item.chunk_hash, None) is not None:
            parent = self._parents.pop(item.chunk_hash, None)
            if parent is not None:
                self._children[parent] -= 1
                self._offer(parent)

    def admits(self, chunk_hash: bytes) -> bool:
        """Whether it is used again before the leaf that would leave for it."""
        leaf = next(self.victims(), None)
        return leaf is not None and self._next_use(chunk_hash) < self._next_use(leaf.chunk_hash)

    def victims(self) -> Iterator[Entry]:
        """The leaves, and what they build on, those first that are used again last."""
        passed: list[Any] = []
        try:
            while self._leaves:
                leaf = heappop(self._leaves)
                entry = self._entries.get(leaf[2])
                if entry is None or self._children.get(leaf[2]) or -leaf[0] != self._next_use(leaf[2]):
                    continue
                passed.append(leaf)
                yield entry
        finally:
            for leaf in passed:
                heappush(self._leaves, leaf)

    def _offer(self, chunk_hash: bytes) -> None:
        if chunk_hash in self._entries and not self._children.get(chunk_hash):
            heappush(self._leaves, (-self._next_use(chunk_hash), len(self._leaves), chunk_hash))

    def _next_use(self, chunk_hash: bytes) -> float:
        uses = self._uses[chunk_hash]
        after = bisect_right(uses, self._turn)
        return uses[after] if after < len(uses) else inf
