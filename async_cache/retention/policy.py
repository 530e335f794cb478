"""What decides which chunk leaves first. A policy knows an order, and nothing of leases, memory or disks."""

from collections.abc import Iterator
from typing import Protocol, TypeVar

from async_cache.values import Removal

T = TypeVar("T")


class EvictionPolicy(Protocol[T]):
    """The order in which items should be evicted: chunks of L1, or of a backend.

    An item is known from its first `use` until it has `left`. Whoever asks for victims decides how many of them go, and
    passes over those that must stay.
    """

    def use(self, item: T, before: T | None = None) -> None:
        """An item, known or not, was used just now; or it is to be evicted right before another one."""

    def suspend(self, item: T) -> None:
        """An item must stay for now, and need not be among the victims until its next `use`."""

    def left(self, item: T, removal: Removal) -> None:
        """An item, known or not, has gone, and why."""

    def victims(self) -> Iterator[T]:
        """Iterate over all known items, in the order in which they should go. The one that came last may leave."""
