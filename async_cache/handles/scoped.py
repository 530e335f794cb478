"""How a lease or a writer is entered and left: by `async with`, or by `await` first, and a call or `with` later."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

C = TypeVar("C")


class Scoped(ABC, Generic[C]):
    """Something that is entered, is a sequence of chunks in order then, and is left."""

    keeps: object = None
    """What is to be there as long as it is."""

    @property
    def chunks(self) -> tuple[C, ...]:
        """The chunks in the order of the prompt. Raises RuntimeError before it is entered."""
        return tuple(self)

    @abstractmethod
    def __len__(self) -> int:
        """How many chunks there are; none before it is entered."""

    @abstractmethod
    def __getitem__(self, position: int) -> C:
        """A chunk, by its place among them."""

    @abstractmethod
    def _check_entered(self) -> None:
        """Raises RuntimeError if it was not: whoever forgot the `async` would find no chunk, and lose what he has."""

    @abstractmethod
    async def _enter(self) -> None:
        """Know the chunks; do nothing if that was done already."""

    @abstractmethod
    def _leave(self) -> None:
        """End it. May be called more than once."""

    def __await__(self) -> Generator[object, None, Self]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Self:
        await self._enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def __enter__(self) -> Self:
        """Return it: it was entered by `await`, or by a blocking call. Raises RuntimeError if it was not."""
        self._check_entered()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def __iter__(self) -> Iterator[C]:
        self._check_entered()
        return map(self.__getitem__, range(len(self)))
