"""How a lease or a writer is entered and left: by `async with`, or by `await` first, and a call or `with` later."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

C = TypeVar("C")


class Scoped(ABC, Generic[C]):
    """Something that is entered, is a sequence of chunks in order then, and is left."""

    _chunks: tuple[C, ...] = ()

    @property
    def chunks(self) -> tuple[C, ...]:
        """The chunks in the order of the prompt; none before it is entered."""
        return self._chunks

    @abstractmethod
    async def _enter(self) -> None:
        """Fill `_chunks`; do nothing if that was done already."""

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
        """Return it: it was entered by `await`, or by a blocking call."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def __iter__(self) -> Iterator[C]:
        return iter(self._chunks)

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, position: int) -> C:
        return self._chunks[position]
