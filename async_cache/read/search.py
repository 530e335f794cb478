"""How far a prompt is found, from its head on: in time that follows what is found, and not what is asked.

The first chunk that lacks what every prefix needs ends a prompt that is asked for alone, wherever that is known at
once: L1 and what is on its way there are, and so is a backend that answers from memory. What has to be asked a disk or
a network is asked for all chunks, in one go; so are those of several prompts, each of which may end.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from async_cache.l2.guard import Guard
from async_cache.l2.tombstones import Tombstones
from async_cache.prompt.layout import ModelLayout
from async_cache.read.lookup import Asked, Found

_FEW_CHUNKS = 32  # are looked at in one part
_SECOND_CHUNKS = 255  # of the part behind the first chunk, by which most prompts that are not cached are known
_GROWTH = 8  # of a part over the one before: so many times what is found may be asked in vain
_AT_ONCE = 4096  # objects of a part, in a step of the loop: a few milliseconds


class Search:
    """What is looked up, part by part, and what was found of it in L2, pinned until it is closed.

    `one_run`: whether it is one prompt, which the first chunk ends that is not there.
    `asked` is what L1 lacks of the parts so far. `found` has what a backend said at once that it holds of that. It is
    None where that cannot be said at once: then all that is asked has to be, when the search has ended.
    """

    def __init__(
        self,
        layout: ModelLayout,
        hashes: Sequence[bytes],
        guards: Sequence[Guard],
        tombstones: Tombstones,
        owner: str = "",
        *,
        one_run: bool = True,
    ):
        self.asked = Asked(layout, hashes, {}, owner)
        self.found: Found | None = Found(self.asked, [(guard, {}) for guard in guards])
        self._tombstones = tombstones
        self._removed: Tombstones | None = None
        self._ends_with = layout.objects.prefix_mask if one_run else 0
        self._ended = False

    def parts(self) -> Iterator[tuple[int, int]]:
        """The parts to look at, as (begin, end), each longer than the one before; `ask` comes after each."""
        count = len(self.asked.hashes)
        most = self.asked.layout.objects.chunks_with(_AT_ONCE)
        begin, end, size = 0, 1 if self._ends_with and count > _FEW_CHUNKS else most, _SECOND_CHUNKS
        while begin < count and not self._ended:
            yield begin, min(end, count)
            begin, end, size = end, end + min(size, most), size * _GROWTH

    def ask(self, missing: Mapping[int, int]) -> "Found | None":
        """Ask for the objects that L1 lacks of a part, by chunk number.

        Where that cannot be said at once, but perhaps a little later: what is to `hear`, before it is asked once more.
        """
        self.asked.masks.update(missing)
        if self.found is None:
            return None
        there = self.found.ask_more(missing)
        if there is None:
            if self.found.follows:
                return self.found
            self.found.let_go()
            self.found = None
            return None
        if self._tombstones:
            self.found.leave_out(self._tombstones, missing)
            there = {number: self.found.mask_of(number) for number in missing}
        if there != missing:
            needed = self._ends_with
            self._ended = any(mask & ~there.get(number, 0) & needed for number, mask in missing.items())
        return None

    def wait(self) -> None:
        """Others have their turn now: what they delete meanwhile is not to be found."""
        if self._removed is None:
            self._removed = self._tombstones.watcher()

    def leave_out_removed(self, numbers: Collection[int]) -> None:
        """Leave out those of these chunks that were deleted since the first `wait`."""
        if self.found is not None and self._removed:
            self.found.leave_out(self._removed, numbers)

    def close(self) -> None:
        """Unpin what nobody took. Once is enough, twice does no harm."""
        if self._removed is not None:
            self._tombstones.dismiss(self._removed)
            self._removed = None
        if self.found is not None:
            self.found.let_go()
