"""Turns of bounded cost: who may begin, who waits, and that shares are equal. Counted in units, not in time."""

import asyncio

import pytest

from async_cache.server.turns import LIGHT, STEP, TURN_SECONDS, Turns

PING = 10


class Client:
    """A connection that always has one more message of a cost: `done` is what it was let do."""

    def __init__(self, turns, tenant, cost=PING, *, messages=10**9, heavy=False):
        self.turn = turns.of(tenant, self.go_on)
        self.cost, self.left, self.heavy, self.done = cost, messages, heavy, 0

    def go_on(self):
        if self.heavy:
            self.begin_next()
            return
        while self.left and self.turn.admits(self.cost):
            self.left -= 1
            self.done += self.cost

    def begin_next(self):
        if self.left:
            self.left -= 1
            self.turn.begin(self.cost, self.begun)

    def begun(self):
        self.done += self.cost
        asyncio.get_running_loop().call_soon(self.begin_next)


def jain(shares):
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


async def turn_over(count):
    for _ in range(count):
        await asyncio.sleep(0)


async def test_what_one_turn_of_the_loop_begins_is_bounded_however_many_ask():
    turns = Turns(lambda: 0.0)
    clients = [Client(turns, "red") for _ in range(200)]
    for client in clients:
        client.go_on()
    begun = sum(client.done for client in clients)
    assert STEP <= begun < STEP + PING
    before = begun
    await turn_over(1)
    begun = sum(client.done for client in clients)
    assert begun - before < STEP + len(clients) * PING
    for client in clients:
        client.left = 0
        client.turn.leave()


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("tenants", [2, 8, 64])
async def test_tenants_with_equal_demands_get_equal_shares(tenants, heavy):
    turns = Turns(lambda: 0.0)
    clients = [Client(turns, f"tenant {n}", cost=LIGHT * 4 if heavy else PING, heavy=heavy) for n in range(tenants)]
    for client in clients:
        client.go_on()
    await turn_over(20 * tenants)
    shares = [client.done for client in clients]
    assert jain(shares) >= 0.95, shares
    assert sum(shares) >= 15 * tenants * STEP / 2  # and nothing is left lying


async def test_sixty_four_connections_of_one_tenant_get_no_more_than_one():
    turns = Turns(lambda: 0.0)
    many = [Client(turns, "many") for _ in range(64)]
    one = Client(turns, "one")
    for client in [*many, one]:
        client.go_on()
    await turn_over(200)
    of_many = sum(client.done for client in many)
    assert of_many <= 1.05 * one.done + STEP
    assert jain([client.done for client in many]) >= 0.95


async def test_tenants_with_small_and_large_messages_get_the_same():
    turns = Turns(lambda: 0.0)
    small, large = (Client(turns, f"{n} steps", cost=n * STEP, heavy=True) for n in (1, 50))
    for client in (small, large):
        client.go_on()
    await turn_over(2000)
    assert 0.8 < small.done / large.done < 1.25


async def test_what_is_light_passes_what_is_heavy_also_of_one_tenant():
    turns = Turns(lambda: 0.0)
    heavy, light = Client(turns, "red", cost=500 * STEP, heavy=True), Client(turns, "red", messages=5)
    heavy.go_on()
    heavy.begin_next()
    assert heavy.done == heavy.cost
    light.go_on()
    assert light.left == 0  # at once
    await turn_over(100)
    assert heavy.done == heavy.cost  # not paid for yet


async def test_what_costs_much_is_spread_over_as_many_turns():
    turns = Turns(lambda: 0.0)
    client = Client(turns, "red", cost=100 * STEP, heavy=True)
    client.go_on()
    await turn_over(98)
    assert client.done == client.cost
    await turn_over(4)
    assert client.done == 2 * client.cost


async def test_nothing_runs_when_everything_is_paid_for_or_waits_for_a_thread():
    turns = Turns(lambda: 0.0)
    client = Client(turns, "red", cost=3 * STEP, messages=1, heavy=True)
    client.go_on()
    client.turn.hold()
    begun = []
    client.turn.begin(STEP, lambda: begun.append(True))
    await turn_over(20)
    assert not turns._active and not begun
    client.turn.let_go()
    await turn_over(2)
    assert begun


async def test_a_connection_that_is_gone_begins_nothing_and_leaves_nothing():
    turns = Turns(lambda: 0.0)
    red, other = Client(turns, "red", heavy=True, cost=2 * STEP, messages=2), Client(turns, "red", messages=0)
    red.go_on()
    begun = []
    other.turn.begin(STEP, lambda: begun.append(True))
    while other.turn.admits(PING):
        pass
    other.turn.leave()
    red.turn.leave()
    await turn_over(20)
    assert not begun and not turns._parties and not turns._active


async def test_one_that_waits_to_send_has_its_turn_and_one_that_gave_up_does_not_take_one():
    turns = Turns(lambda: 0.0)
    client = Client(turns, "red")
    client.go_on()
    waiting = [asyncio.create_task(client.turn.comes(100)) for _ in range(3)]
    waiting[1].cancel()
    client.left = 0
    await asyncio.wait(waiting, timeout=60)
    assert [task.cancelled() for task in waiting] == [False, True, False]


async def test_heavy_work_that_begins_late_and_is_paid_for_leaves_the_next_turn_nothing_to_do():
    faults = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    turns = Turns(lambda: 0.0)
    client = Client(turns, "red")
    client.turn.begin(STEP, lambda: None)
    client.turn.begin(LIGHT, lambda: None)
    await turn_over(10)
    assert not faults


class Thread:
    """Stands for the loop's thread, which computes for so long for a unit of what is begun."""

    def __init__(self):
        self.turns, self.begun, self.slow, self.seen = Turns(self.computed), 0, 1.0, []
        self.seconds = 0.0

    def computed(self):
        seconds = (self.turns.step - self.turns.left) * 1e-6 * self.slow if self.seconds else 1.0
        self.seen.append(seconds)
        self.seconds += seconds
        return self.seconds


async def test_less_is_begun_in_a_turn_where_it_takes_longer_and_as_much_as_ever_where_it_does_not():
    thread = Thread()
    client = Client(thread.turns, "red")
    client.go_on()
    for slow, step in ((1.2, TURN_SECONDS / 1.2e-6), (1000.0, STEP / 2), (1.0, TURN_SECONDS / 1e-6), (0.5, STEP)):
        thread.slow = slow
        await turn_over(30)
        assert thread.turns.step == pytest.approx(step, rel=0.15), slow
        assert slow == 1000.0 or thread.seen[-1] <= 1.15 * TURN_SECONDS
    client.left = 0


async def test_who_has_asked_for_nothing_yet_is_not_behind_those_who_fill_the_turn():
    turns = Turns(lambda: 0.0)
    many = [Client(turns, "many") for _ in range(64)]
    for client in many:
        client.go_on()
    await turn_over(10)
    for _ in range(10):
        assert turns.left <= 0
        ping, flood = Client(turns, "blue", messages=5), Client(turns, "green")
        ping.go_on()
        flood.go_on()
        assert not ping.left, "at once"
        assert flood.done < 2 * LIGHT, "but no more than what is light"
        flood.left = 0
        for client in (ping, flood):
            client.turn.leave()
        await turn_over(3)
