"""What decides which chunk leaves first. A policy knows an order, and nothing of leases, memory or disks."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from async_cache.values import Removal

T = TypeVar("T")


class EvictionPolicy(Protocol[T]):
    """The order in which items should be evicted: chunks of L1, or of a backend.

    An item is known from its `enter` until it has `left`. Whoever asks for victims decides how many of them go, and
    passes over those that must stay. An item that others build on must not come before these.
    """

    def asked(self, path: Sequence[bytes], tokens: int, chunk_tokens: int, output_tokens: int | None = None) -> None:
        """A request asked for the chunks of these hashes, which begin a prompt of so many tokens, there or not.

        `output_tokens`: what was generated behind it, where that is known.
        """

    def hint(
        self,
        path: Sequence[bytes],
        output_tokens: int | None = None,
        returns: bool | None = None,
        within_seconds: float | None = None,
    ) -> None:
        """What an engine knows of the future of a path that was asked for.

        How much was generated behind it, whether it will be asked for again, and within what time. It may be wrong.
        """

    def enter(self, item: T, parent: T | None, kept: bool = False) -> None:
        """An item came, which builds on another one, if that is there. `kept`: that one is leased."""

    def use(self, item: T, before: T | None = None) -> None:
        """An item, known or not, was used just now; or it is to leave right before another one.

        Those of a prompt come with the last one first.
        """

    def use_all(self, items: Iterable[T]) -> None:
        """Each of these was used just now, one after the other."""

    def suspend(self, item: T) -> None:
        """An item must stay for now, and need not be among the victims until its next `use` or `resume`."""

    def resume(self, item: T) -> None:
        """An item, suspended or not, may leave again. One that was suspended would have left by now: it goes first."""

    def left(self, item: T, removal: Removal) -> None:
        """An item, known or not, has gone, and why."""

    def admits(self, chunk_hash: bytes) -> bool:
        """Whether a chunk of the path that was asked for last is worth as much as what would have to leave for it."""

    def victims(self) -> Iterator[T]:
        """Iterate over all known items, in the order in which they should go. Those that came may leave."""

    def learned(self) -> Iterator[bytes]:
        """What it has learned beside the order, in pieces that each take a millisecond or two, to outlive a restart."""

    def recall(self, pieces: Iterable[bytes]) -> Iterator[None]:
        """Go on from what a policy of the same kind has learned, before any item is known. Each piece is a step.

        Raises ValueError for pieces that are of another kind.
        """
