"""Which objects of a directory could not be read: a fault of an object is told from one of the disk."""

from collections.abc import Iterable, Sequence
from enum import Enum

from async_cache.prompt.keys import ObjectKey

_REMEMBERED = 65_536  # objects; what is forgotten is found again, and fails again


class FaultState(Enum):
    """What is held of an object that could not be read.

    SUSPECT     nothing else of its call could be read either: it may be the disk
    UNREADABLE  it failed beside others that did not, or once more: a lookup does not find it

    SUSPECT -> UNREADABLE. A store replaces both. Both are over when it is read, stored anew or removed.
    """

    SUSPECT = "suspect"
    UNREADABLE = "unreadable"


class Faults:
    """The objects that could not be read. Each call is one step of the loop."""

    def __init__(self) -> None:
        self._states: dict[ObjectKey, FaultState] = {}

    def __contains__(self, key: ObjectKey) -> bool:
        """Whether an object could not be read, so that a store is to replace it."""
        return key in self._states

    def __bool__(self) -> bool:
        return bool(self._states)

    def failed(self, keys: Sequence[ObjectKey], *, beside_others: bool) -> list[ObjectKey]:
        """Take note of objects that could not be read, beside others that could or not; return the UNREADABLE ones."""
        if len(self._states) > _REMEMBERED:
            self._states.clear()
        unreadable = [key for key in keys if beside_others or key in self._states]
        self._states |= dict.fromkeys(keys, FaultState.SUSPECT) | dict.fromkeys(unreadable, FaultState.UNREADABLE)
        return unreadable

    def over(self, keys: Iterable[ObjectKey]) -> None:
        """Forget what was held of objects."""
        if self._states:
            for key in keys:
                self._states.pop(key, None)
