"""Why a chunk is missing, as far as that can be said at once."""

from collections.abc import Sequence

from async_cache.l1.store import L1Store
from async_cache.l2.tombstones import Tombstones
from async_cache.ledger.ledger import REMOVALS, Ledger, Left
from async_cache.read.filling import Filling
from async_cache.values import ChunkState, Missed, Removal


def _missed(state: ChunkState, removal: Removal | None = None) -> tuple[Missed, Missed]:
    """Both that there are, by whether the prompt diverges: to make one would cost more than to find out which it is."""
    return Missed(state, removal), Missed(state, removal, diverges=True)


_WRITING = _missed(ChunkState.WRITING)
_UNKNOWN = _missed(ChunkState.UNKNOWN)
_REMOVED = tuple(_missed(ChunkState.REMOVED, removal) for removal in REMOVALS)
_DELETED = _missed(ChunkState.REMOVED, Removal.DELETED)

_UNKNOWN_YET, _FILLED = ChunkState.UNKNOWN, ChunkState.WRITING


class Misses:
    """Explains what a lookup does not find. `filling`: the chunks that writers have room for."""

    def __init__(self, l1: L1Store, ledger: Ledger, tombstones: Tombstones, filling: Filling):
        self._l1 = l1
        self._ledger = ledger
        self._tombstones = tombstones
        self._filling = filling

    def missed(self, hashes: Sequence[bytes], number: int, *, failed: bool) -> Missed:
        """Why chunk `number` of a prompt with these hashes is missing, of which the one before it, if any, is not.

        It is not known where asking a backend has `failed`: that may have it.
        """
        chunk_hash = hashes[number]
        if chunk_hash in self._filling:
            missed = _WRITING
        elif self._tombstones and chunk_hash in self._tombstones:
            missed = _DELETED
        elif failed or (removal := self._ledger.number(chunk_hash)) < 0:
            missed = _UNKNOWN
        else:
            missed = _REMOVED[removal]
        return missed[number > 0 and self._diverges(hashes[number - 1], chunk_hash)]

    def _diverges(self, parent: bytes, chunk_hash: bytes) -> bool:
        entry = self._l1.find(parent)
        if entry is not None and (entry.forked or (entry.child is not None and entry.child != chunk_hash)):
            return True
        return self._ledger.has_other_child(parent, chunk_hash)

    def states(self, chunk_hashes: Sequence[bytes], *, failed: bool) -> list[ChunkState | Left]:
        """The state of chunks that are in no tier and not on their way, or how they left; `failed` as in `missed`."""
        lefts = self._ledger.find_all(chunk_hashes)
        states = [_UNKNOWN_YET if failed or left is None else left for left in lefts]
        if self._tombstones:
            for n, chunk_hash in enumerate(chunk_hashes):
                if chunk_hash in self._tombstones:
                    left = lefts[n]
                    states[n] = Left(Removal.DELETED, left.backend if left is not None else None, 0.0)
        if self._filling.any_of(chunk_hashes):
            for n, chunk_hash in enumerate(chunk_hashes):
                if chunk_hash in self._filling:
                    states[n] = _FILLED
        return states
