"""What a connection holds under the numbers of its messages: the common part."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from contextvars import Context
from typing import Any

from async_cache.protocol import messages
from async_cache.protocol.connection import Connection


class Table(dict[int, "Held"]):
    """What a connection holds, by the numbers of the messages that asked for it."""

    __slots__ = ("over", "streams")

    def __init__(self) -> None:
        super().__init__()
        self.over = 0
        """How many of them are requests that are over: their client is told in the loop's next turn, and they go."""
        self.streams = 0
        """How many of them are streams of events."""

    @property
    def requests(self) -> int:
        """How many of them take one of the connection's requests."""
        return len(self) - self.over


class Held(ABC):
    """Something that a client asked for, and that is held under the number of its message until it is gone.

    A new one takes the place of what had the number before: a read that of the wait for it.
    """

    __slots__ = ("_connection", "_held", "_number")

    def __init__(self, number: int, held: Table, connection: Connection):
        self._number = number
        self._held = held
        self._connection = connection
        held[number] = self

    @property
    def number(self) -> int:
        """The number of its message."""
        return self._number

    @property
    def is_held(self) -> bool:
        """Whether it has its number still."""
        return self._held.get(self._number) is self

    def _gone(self) -> None:
        """Free the number, if nothing else has it by now."""
        if self.is_held:
            del self._held[self._number]

    @abstractmethod
    def undo(self) -> None:
        """Undo it, as if it had not been asked for: the client has given it up."""

    @abstractmethod
    def release(self) -> None:
        """Release what it has: the connection is gone."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._number}, {'held' if self.is_held else 'gone'}>"


class Wait(Held):
    """A task that answers a message. What it acquires for the client takes its place."""

    __slots__ = ("_undone", "task")

    def __init__(
        self,
        number: int,
        held: Table,
        connection: Connection,
        work: Coroutine[Any, Any, None],
        context: Context | None = None,
    ) -> None:
        super().__init__(number, held, connection)
        self._undone = False
        self.task = asyncio.get_running_loop().create_task(work, context=context)
        self.task.add_done_callback(lambda _: self._gone())

    def undo(self) -> None:
        """Cancel it, and answer that; what was answered already stays answered."""
        if not self._undone and self.task.cancel():
            self._undone = True
            self._connection.send(messages.Failed(self._number, "cancelled", "the client gave it up"))

    def release(self) -> None:
        """Cancel it; it is held until it has ended."""
        self.task.cancel()
