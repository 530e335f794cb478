"""Quotas: how many bytes of a tier an owner may have, of one model or of all. Who is over his own loses his own."""

from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct

from async_cache.retention.bound import Bound
from async_cache.retention.lending import Lending


class Quota(Struct, frozen=True):
    """So many bytes of L1, and of each backend, for a salt, of one model or of all together. None: no bound.

    `salt` None: each salt that has no quota of its own for that has this one, for itself.
    """

    salt: str | None
    model: str | None
    l1_bytes: int | None = None
    l2_bytes: int | None = None


class Bounds:
    """The bounds of one tier; `most` says what a quota allows of it. False if there is none.

    What each owner has of each model is always counted, so that quotas may come later; the order of the chunks, which
    takes memory, is known of those alone that a quota bounds.
    """

    def __init__(self, quotas: Sequence[Quota] = (), most: Callable[[Quota], int | None] = lambda quota: None):
        self._allows = most
        self._most: dict[tuple[str | None, str | None], int] = {}
        self._used: dict[tuple[str, str], int] = {}
        self._bounds: dict[tuple[str, str | None], Bound] = {}
        self.lending = Lending()
        """Those of all models together: who gives way where the tier is full."""
        self.change(quotas)

    def change(self, quotas: Sequence[Quota]) -> None:
        """Go by other quotas from now on: whoever knows the chunks that are there is to `adopt` all of them.

        Who has more than that keeps it until he stores more.
        """
        self._most = {(q.salt, q.model): size for q in quotas if (size := self._allows(q)) is not None}
        for key, bound in list(self._bounds.items()):
            most = self._most_of(*key)
            if most is None:
                del self._bounds[key]
                self.lending.leave(bound)
            else:
                self.lending.allow(bound, most)

    def _most_of(self, owner: str, model: str | None) -> int | None:
        return self._most.get((owner, model), self._most.get((None, model)))

    def __bool__(self) -> bool:
        return bool(self._most)

    def __iter__(self) -> Iterator[Bound]:
        return iter(self._bounds.values())

    def of(self, owner: str | None, model: str) -> list[Bound]:
        """The bounds that a chunk of an owner and a model counts for; none where it is not known whose it is."""
        if owner is None or not self._most:
            return []
        bounds = []
        for of_model in (None, model):
            bound = self._bounds.get((owner, of_model))
            if bound is None:
                most = self._most_of(owner, of_model)
                if most is None:
                    continue
                used = sum(size for key, size in self._used.items() if key[0] == owner and of_model in (None, key[1]))
                bound = self._bounds[owner, of_model] = Bound(owner, of_model, most, used)
                if of_model is None:
                    self.lending.join(bound)
            bounds.append(bound)
        return bounds

    def add(self, owner: str | None, model: str, size_bytes: int) -> None:
        """So many bytes more are there or reserved, or fewer. Who has nothing any more is forgotten."""
        if owner is None:
            return
        bounds, key = self.of(owner, model), (owner, model)
        if left := self._used.get(key, 0) + size_bytes:
            self._used[key] = left
        else:
            self._used.pop(key, None)
        for bound in bounds:
            bound.used_bytes += size_bytes
            self.lending.grew(bound, size_bytes)
            if not bound.used_bytes and not len(bound):
                del self._bounds[bound.salt, bound.model]
                self.lending.leave(bound)

    def lends(self, owner: str) -> bool:
        """Whether there is a quota for all models of an owner."""
        return (owner, None) in self._bounds

    def enter(
        self, chunk_hash: bytes, owner: str | None, model: str, parent: bytes | None, *, is_oldest: bool = False
    ) -> None:
        """A chunk came, whose bytes `add` counts; `is_oldest`: it leaves before all others."""
        for bound in self.of(owner, model):
            bound.enter(chunk_hash, parent, is_oldest=is_oldest)

    def adopt(self, chunk_hash: bytes, owner: str, model: str) -> None:
        """A chunk is there, whose bytes were counted, and may be new to a quota."""
        for bound in self.of(owner, model):
            if chunk_hash not in bound:
                bound.enter(chunk_hash, None, is_oldest=True)

    def use(self, chunk_hash: bytes, owner: str | None, model: str) -> None:
        """A chunk was used just now."""
        for bound in self.of(owner, model):
            bound.use(chunk_hash)

    def left(self, chunk_hash: bytes, owner: str | None, model: str) -> None:
        """A chunk has gone, whose bytes `add` counts."""
        for bound in self.of(owner, model):
            bound.left(chunk_hash)

    def room(self, owner: str | None, model: str) -> int | None:
        """How many bytes more are within all quotas, less than none where they are exceeded; None: no bound."""
        return min((bound.most_bytes - bound.used_bytes for bound in self.of(owner, model)), default=None)

    def victims(
        self, owner: str | None, model: str, size_bytes: int, size_of: Callable[[bytes], int]
    ) -> list[bytes] | None:
        """The chunks that leave so that so much more is within all quotas; None where what may leave does not suffice.

        `size_of` says what a chunk would give back: 0 where it has to stay.
        """
        chosen: dict[bytes, int] = {}
        for bound in reversed(self.of(owner, model)):  # what leaves of one model leaves of all models, too
            lacks = bound.used_bytes + size_bytes - bound.most_bytes - sum(chosen.values())
            for chunk_hash in bound if lacks > 0 else ():
                if chunk_hash not in chosen and (size := size_of(chunk_hash)):
                    chosen[chunk_hash] = size
                    lacks -= size
                    if lacks <= 0:
                        break
            if lacks > 0:
                return None
        return list(chosen)
