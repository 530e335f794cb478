"""Whose messages are carried out next: turns of bounded cost, shared among tenants, and among the connections of each.

A cost is a whole number, of a microsecond or so each (`costs`), and known before anything is done. When work of a
`step` has begun, everything else waits for the loop's next turn. Then those who wait, or owe something, get equal
shares of a step, and begin while they have any of it left: so one message may cost more than a share, and is paid for
before the next (surplus round robin). What a heavy one costs is spread over as many turns as it may take to carry out.

Light messages and heavy ones are paid for from two balances: what is light passes what is heavy, also of one tenant. A
tenant that neither waits nor owes anything begins something light although the turn is full.

What a message takes of the processor may be more than its cost, on a slow machine for one: a step is as large as the
loop can compute in `TURN_SECONDS`, with all that follows from it.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable

STEP = 2000
"""The most that may be begun in a turn of the loop, of light messages, and of heavy ones as much again."""
TURN_SECONDS = 0.0015
"""What the loop should compute in a turn."""
_LEAST_STEP = STEP // 2
LIGHT = 250
"""The most that a light message may cost."""
_AT_A_TIME = 250  # what one connection may do before the next one of its tenant


class Party:
    """A tenant, as its connections take turns: two balances, and those who wait."""

    __slots__ = (
        "busy", "connections", "heavy", "heavy_waiting", "is_active", "light", "light_waiting", "name", "passed",
        "passed_in",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.light = self.heavy = STEP
        self.light_waiting: deque[Turn | Sending] = deque()
        self.heavy_waiting: deque[tuple[Turn, int, Callable[[], object]]] = deque()
        self.busy = 0  # heavy messages that a thread works on
        self.is_active = False  # it waits, or owes something
        self.connections = 0
        self.passed, self.passed_in = 0, -1  # what it has begun beyond a full turn, and in which

    @property
    def is_done(self) -> bool:
        """Whether nothing is owed, and nobody waits but for a thread."""
        waits = self.light_waiting or (self.heavy_waiting and not self.busy)
        return not waits and self.light > 0 and self.heavy > 0


class Sending:
    """One who waits to send a piece."""

    __slots__ = ("cost", "turn", "waiter")

    def __init__(self, turn: "Turn", cost: int, waiter: "asyncio.Future[None]"):
        self.turn, self.cost, self.waiter = turn, cost, waiter


class Turn:
    """A connection's place: what it may begin now, and how it goes on when it could not. `resume` is called then."""

    __slots__ = ("_left", "_party", "_turns", "_waits", "resume")

    def __init__(self, turns: "Turns", party: Party, resume: Callable[[], object]):
        self._turns, self._party, self.resume = turns, party, resume
        self._waits = False
        self._left = 0  # while it is its turn

    def admits(self, cost: int) -> bool:
        """Whether light work may begin now, which is paid for then; else `resume` is called when it may."""
        turns, party = self._turns, self._party
        if (
            party.light > 0
            and (not party.light_waiting or (turns.running is self and self._left > 0))
            and (turns.left > 0 or turns.may_pass(party))
        ):
            if turns.left <= 0:
                party.passed += cost
            turns.left -= cost
            party.light -= cost
            self._left -= cost
            return True
        if not self._waits:
            self._waits = True
            party.light_waiting.append(self)
            turns.activate(party)
        return False

    def charge(self, cost: int) -> None:
        """Pay for light work that was done, or is about to be."""
        turns, party = self._turns, self._party
        if turns.left <= 0:
            party.passed += cost
        turns.left -= cost
        party.light -= cost
        self._left -= cost

    def begin(self, cost: int, work: Callable[[], object]) -> bool:
        """Begin heavy work, now or in a later turn; whether it has begun."""
        turns, party = self._turns, self._party
        if turns.heavy_left > 0 and party.heavy > 0 and not party.busy and not party.heavy_waiting:
            turns.begin_heavy(party, cost, work)
            return True
        party.heavy_waiting.append((self, cost, work))
        turns.activate(party)
        return False

    def hold(self) -> None:
        """Begin no heavy work of this tenant until `let_go`: a thread works for it."""
        self._party.busy += 1

    def let_go(self) -> None:
        """Begin heavy work again."""
        self._party.busy -= 1
        self._turns.activate(self._party)

    async def comes(self, cost: int) -> None:
        """Wait until a piece of so much may be sent."""
        party = self._party
        if self._turns.left > 0 and party.light > 0 and not party.light_waiting:
            self.charge(cost)
            return
        sending = Sending(self, cost, asyncio.get_running_loop().create_future())
        party.light_waiting.append(sending)
        self._turns.activate(party)
        await sending.waiter

    def run(self) -> None:
        """Go on, as far as one connection may before the next."""
        self._waits = False
        self._left = _AT_A_TIME
        self._turns.running = self
        try:
            self.resume()
        finally:
            self._turns.running = None

    def leave(self) -> None:
        """The connection is gone: what it waits for is not begun."""
        self._turns.leave(self, self._party)
        self.resume = _nothing  # it knows the connection, which knows it


class Turns:
    """The turns of all connections of a server. `clock`: what the loop's thread has computed, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self.step = STEP
        """What may be begun in a turn of the loop."""
        self.left = self.heavy_left = STEP
        """What may be begun in this one."""
        self._number = 0  # of this turn
        self._computed: float | None = None  # what the thread had at its beginning, if the one before it is to be known
        self.running: Turn | None = None
        self._parties: dict[str, Party] = {}
        self._active: deque[Party] = deque()
        self._comes_again = False
        self._loop = asyncio.get_running_loop()

    def of(self, tenant: str, resume: Callable[[], object]) -> Turn:
        """The place of a new connection of a tenant, which has to `leave`."""
        party = self._parties.get(tenant)
        if party is None:
            party = self._parties[tenant] = Party(tenant)
        party.connections += 1
        return Turn(self, party, resume)

    def leave(self, turn: Turn, party: Party) -> None:
        """Forget a connection."""
        if party.light_waiting or party.heavy_waiting:
            party.light_waiting = deque(waiting for waiting in party.light_waiting if waiting is not turn)
            party.heavy_waiting = deque(waiting for waiting in party.heavy_waiting if waiting[0] is not turn)
        party.connections -= 1
        if not party.connections:
            del self._parties[party.name]

    def may_pass(self, party: Party) -> bool:
        """Whether a tenant may begin something light although the turn is full."""
        if party.is_active or self.left <= -STEP:
            return False
        if party.passed_in != self._number:
            party.passed_in, party.passed = self._number, 0
        return party.passed < LIGHT

    def activate(self, party: Party) -> None:
        """Come back to a tenant in the loop's next turn, and in those after it until it is done."""
        if not party.is_active:
            party.is_active = True
            self._active.append(party)
        if not self._comes_again:
            self._comes_again = True
            self._loop.call_soon(self._next)

    def begin_heavy(self, party: Party, cost: int, work: Callable[[], object]) -> None:
        """Begin heavy work, and have it paid for."""
        party.heavy -= cost
        self.heavy_left -= min(cost, STEP)
        self.activate(party)
        work()

    def _next(self) -> None:
        """The next turn of the loop: everybody gets his share, and goes on in order."""
        self._comes_again = False
        self._fit_step()
        self._number += 1
        self.left = self.heavy_left = self.step
        active, self._active = self._active, deque()
        share = max(self.step // max(len(active), 1), 1)
        for party in active:
            party.light = min(party.light + share, STEP)
            party.heavy = min(party.heavy + share, STEP)
        waiting_still = deque[Party]()
        while active:
            party = active.popleft()
            self._run(party)
            if party.is_done:
                party.is_active = False
            elif self.left > 0:
                self._active.append(party)
            else:
                waiting_still.append(party)  # the others first, next time
        self._active.extendleft(reversed(waiting_still))
        if self._active and not self._comes_again:
            self._comes_again = True
            self._loop.call_soon(self._next)
        if not self._comes_again:
            self._computed = None  # the next turn is not that of the loop

    def _fit_step(self) -> None:
        """Make a step smaller where the loop computed for too long in the turn that is over, or larger again."""
        computed = self._clock()
        if self._computed is not None:
            seconds = computed - self._computed
            if seconds > TURN_SECONDS or self.left <= 0:
                fitting = self.step * min(max(TURN_SECONDS / max(seconds, 1e-6), 0.5), 1.25)
                self.step = min(max(int(fitting), _LEAST_STEP), STEP)
        self._computed = computed

    def _run(self, party: Party) -> None:
        """Go on with what waits for a tenant, as far as its balances go."""
        while party.light_waiting and party.light > 0 and self.left > 0:
            waiting = party.light_waiting.popleft()
            if isinstance(waiting, Sending):
                if not waiting.waiter.done():
                    waiting.turn.charge(waiting.cost)
                    waiting.waiter.set_result(None)
            else:
                waiting.run()
        while party.heavy_waiting and party.heavy > 0 and self.heavy_left > 0 and not party.busy:
            _, cost, work = party.heavy_waiting.popleft()
            self.begin_heavy(party, cost, work)


def _nothing() -> None:
    return
