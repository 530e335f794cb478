"""How the prompts and layouts of a connection's messages are made: in its turn, and in a thread if that takes long."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any

from async_cache.protocol.connection import Connection
from async_cache.server.turns import Turn


class Making:
    """Makes what the messages of one connection are about, so that others have their turn.

    Nothing behind such a message is looked at meanwhile: messages are begun in the order in which they came. `fail`
    answers a message of which nothing can be made; `spawn` owns a task.
    """

    def __init__(
        self,
        connection: Connection,
        turn: Turn,
        makers: Executor,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        fail: Callable[[Any, Exception], None],
    ):
        self._connection = connection
        self._turn = turn
        self._makers = makers
        self._spawn = spawn
        self._fail = fail
        self._under_way = 0  # heavy messages: what one is made into may be heavy, too
        self._is_held_up = False  # until they have been begun

    def begin(
        self,
        message: Any,
        cost: int,
        make: Callable[[Any], Any],
        of: Any,
        then: Callable[[Any, Any], None],
        *,
        in_thread: bool,
    ) -> None:
        """Make something for a message, now or when it is this connection's turn, and go on with both."""
        self._under_way += 1
        work = self._make_in_thread if in_thread else self._make_at_once
        if not self._turn.begin(cost, lambda: work(message, make, of, then)):
            self._hold_up()

    def _make_at_once(
        self, message: Any, make: Callable[[Any], Any], of: Any, then: Callable[[Any, Any], None]
    ) -> None:
        try:
            then(message, make(of))
        except Exception as error:
            self._fail(message, error)
        self._go_on()

    def _make_in_thread(
        self, message: Any, make: Callable[[Any], Any], of: Any, then: Callable[[Any, Any], None]
    ) -> None:
        self._hold_up()
        self._turn.hold()
        self._spawn(self._made(message, make, of, then))

    async def _made(self, message: Any, make: Callable[[Any], Any], of: Any, then: Callable[[Any, Any], None]) -> None:
        try:
            made = await asyncio.get_running_loop().run_in_executor(self._makers, make, of)
            if self._connection.is_open:
                then(message, made)
        except Exception as error:
            self._fail(message, error)
        finally:
            self._turn.let_go()
            self._go_on()

    def _hold_up(self) -> None:
        self._is_held_up = True
        self._connection.pause_reading()

    def _go_on(self) -> None:
        self._under_way -= 1
        if self._is_held_up and not self._under_way:
            self._is_held_up = False
            self._connection.resume_reading()
