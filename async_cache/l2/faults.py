"""Which objects of a store could not be read: a store replaces them, and of some a lookup is to find nothing."""

from collections.abc import Iterable, Sequence
from enum import Enum

from async_cache.prompt.keys import ObjectKey

_REMEMBERED = 65_536  # objects; what is forgotten is found again, and fails again


class FaultState(Enum):
    """What is held of an object that could not be read.

    SUSPECT     it may be the disk, or the way to the store, and not the object
    UNREADABLE  it is the object: damaged and still there, or refused while others came. A lookup does not find it

    SUSPECT -> UNREADABLE. A store replaces both. Both are over when it is read, stored anew or removed.
    """

    SUSPECT = "suspect"
    UNREADABLE = "unreadable"


class Faults:
    """The objects that could not be read. Each call is one step of the loop."""

    def __init__(self) -> None:
        self._states: dict[ObjectKey, FaultState] = {}

    def __len__(self) -> int:
        """How many objects could not be read, of those that are remembered."""
        return len(self._states)

    def __contains__(self, key: ObjectKey) -> bool:
        """Whether an object could not be read, so that a store is to replace it."""
        return key in self._states

    def hides(self, key: ObjectKey) -> bool:
        """Whether an object is UNREADABLE, so that a lookup is not to find it."""
        return self._states.get(key) is FaultState.UNREADABLE

    def suspect(self, keys: Iterable[ObjectKey]) -> None:
        """Take note of objects that could not be read; what is UNREADABLE remains so."""
        self._bound()
        for key in keys:
            self._states.setdefault(key, FaultState.SUSPECT)

    def hide(self, keys: Iterable[ObjectKey]) -> None:
        """Take note of objects that are UNREADABLE."""
        self._bound()
        self._states |= dict.fromkeys(keys, FaultState.UNREADABLE)

    def failed(self, keys: Sequence[ObjectKey], *, beside_others: bool) -> list[ObjectKey]:
        """Take note of objects that could not be read; return those that are UNREADABLE by that.

        These are all that failed beside others that did not, and else those that have failed before.
        """
        unreadable = [key for key in keys if beside_others or key in self._states]
        self.suspect(keys)
        self.hide(unreadable)
        return unreadable

    def over(self, keys: Iterable[ObjectKey]) -> None:
        """Forget what was held of objects."""
        if self._states:
            for key in keys:
                self._states.pop(key, None)

    def _bound(self) -> None:
        if len(self._states) > _REMEMBERED:
            self._states.clear()
