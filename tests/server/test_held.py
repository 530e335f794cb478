"""What a connection holds: prefetches that end with their requests, and waits that are undone."""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from contract.support import LAYOUT, fill, make_prompt, make_tokens

from async_cache import AsyncCache, CacheConfig, ServerConfig, connect
from async_cache.limits import UNLIMITED
from async_cache.protocol import messages
from async_cache.protocol.prompts import describe, pack
from async_cache.server import Server
from async_cache.server.access import Scope, Tenant
from async_cache.server.accounts import Account
from async_cache.server.held import Table, Wait
from async_cache.server.prefetches import HeldPrefetch, Holders, Holding

from .programs import server
from .support import Peer

SCOPE = Scope(Tenant(), "")
PROMPT = make_prompt(2)


class Sent:
    """Stands for a connection: keeps what is sent."""

    def __init__(self) -> None:
        self.held = Table()
        self.messages: list[Any] = []

    def send(self, message: Any) -> None:
        self.messages.append(message)

    def prefetch(self, number: int, cache: AsyncCache, holders: Holders, name: str = "id") -> HeldPrefetch:
        prefetch = cache.prefetch(PROMPT, request_id=SCOPE.inner(name))
        account = Account("", UNLIMITED, 2**20)
        account.take_request(1)
        return HeldPrefetch(number, self.held, self, prefetch, holders, SCOPE, Holding(account, 1, 1))  # type: ignore[arg-type]

    def kinds(self, number: int) -> list[str]:
        return [type(message).__name__ for message in self.messages if message.number == number]


@asynccontextmanager
async def open_cache() -> AsyncIterator[tuple[AsyncCache, Holders]]:
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache:
        await fill(cache, PROMPT)
        holders = Holders.of(cache)
        yield cache, holders
        holders.close()


async def a_turn() -> None:
    """Return when all that was put off to the loop's next turn is done."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def requests(cache: AsyncCache) -> int:
    return (await cache.stats()).requests


async def test_a_request_that_is_ended_in_the_step_in_which_it_began_is_told_in_order() -> None:
    async with open_cache() as (cache, holders):
        sent = Sent()
        sent.prefetch(1, cache, holders)
        await cache.end_request(SCOPE.inner("id"))
        await a_turn()
        assert sent.kinds(1) == ["LookupDone", "LoadDone", "RequestOver"] and not sent.held


async def test_an_id_that_is_used_anew_in_the_step_of_its_end_is_another_request() -> None:
    """Nobody has heard of the end of the first yet when the second begins, and when the last that held it goes."""
    async with open_cache() as (cache, holders):
        one, other = Sent(), Sent()
        first = one.prefetch(1, cache, holders)
        await cache.end_request(SCOPE.inner("id"))
        second = other.prefetch(2, cache, holders)
        first.release()
        assert await requests(cache) == 1
        await a_turn()
        assert other.kinds(2) == ["LookupDone", "LoadDone"]
        holders.claimed(SCOPE.inner("id"), True)
        assert other.kinds(2)[2:] == ["RequestClaimed"] and one.kinds(1) == ["LookupDone", "LoadDone"]
        second.release()
        assert await requests(cache) == 0


async def test_a_request_ends_with_the_last_that_holds_it() -> None:
    async with open_cache() as (cache, holders):
        sent = Sent()
        held = [sent.prefetch(number, cache, holders) for number in range(3)]
        for prefetch in held:
            assert await requests(cache) == 1
            prefetch.release()
        assert await requests(cache) == 0 and not sent.held


async def test_the_claim_of_a_request_that_is_over_by_it_is_not_told() -> None:
    async with open_cache() as (cache, holders):
        sent = Sent()
        sent.prefetch(1, cache, holders)
        await cache.end_request(SCOPE.inner("id"))
        holders.claimed(SCOPE.inner("id"), True)
        await a_turn()
        assert sent.kinds(1) == ["LookupDone", "LoadDone", "RequestOver"]


async def test_what_is_answered_in_the_step_in_which_it_is_undone_stays_answered() -> None:
    sent = Sent()

    async def answer(number: int) -> None:
        sent.send(messages.Done(number))

    wait = Wait(1, sent.held, sent, answer(1))  # type: ignore[arg-type]
    asyncio.get_running_loop().call_soon(wait.undo)  # behind the only step of the task, and before it is gone
    await a_turn()
    assert sent.messages == [messages.Done(1)] and not sent.held


async def test_a_wait_that_is_undone_before_its_first_step_is_answered_once_and_gone() -> None:
    sent = Sent()
    wait = Wait(1, sent.held, sent, asyncio.sleep(3600))  # type: ignore[arg-type]
    wait.undo()
    await asyncio.wait((wait.task,))
    await a_turn()
    assert sent.kinds(1) == ["Failed"] and not sent.held


async def test_two_servers_of_one_cache_hold_nothing_of_requests_that_are_over(tmp_path: Any) -> None:
    """Each of them is told, and one that is closed is not told any more."""
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache:
        servers = [Server(cache, ServerConfig(listen=[f"unix://{tmp_path}/{name}"], max_requests=10)) for name in "ab"]
        for number, opened in enumerate(servers):
            await opened.open()
            async with connect(str(opened.addresses[0])) as client:
                for n in range(20):
                    prefetch = client.prefetch(PROMPT, request_id=f"{number}-{n}")
                    await prefetch.load_done
                    await client.end_request(prefetch.request_id)
                (session,) = opened._sessions
                assert not session.held
        for opened in servers:
            assert cache.core.observers.ending
            await opened.close()
        assert not cache.core.observers.ending
        with pytest.raises(Exception, match="opened once"):
            await servers[0].open()


@pytest.mark.parametrize("how", ["end", "last reader", "empty claim"])
async def test_who_holds_a_request_is_told_of_its_end_before_another_is_answered_who_has_ended_it(
    tmp_path: Any, how: str
) -> None:
    """So whoever hears from the other one may use the id anew."""
    prompt = LAYOUT.prompt(make_tokens(2))
    with server(tmp_path) as served:
        if how != "empty claim":
            async with connect(served.url) as cache:
                await fill(cache, prompt)
        with Peer(served.url) as holder, Peer(served.url) as other:
            holder.register(LAYOUT)
            for n in range(50):
                number = holder.number()
                holder.send(messages.Prefetch(number, pack(prompt, 0, trusted=True), f"r{n}"))
                holder.answers(2 if n else 3)
                read = other.number()
                if how == "end":
                    ends: messages.Message = messages.EndRequest(other.number(), f"r{n}")
                elif how == "last reader":
                    other.send(messages.AcquireRead(read, f"r{n}"))
                    other.answers(1)
                    ends = messages.ReleaseRead(other.number(), read)
                else:
                    ends = messages.QueryPrefetchStatus(other.number(), f"r{n}")
                other.send(messages.Ping(other.number()), ends)  # so that an answer is on its way when it ends
                other.answers(2)
                holder.socket.setblocking(False)
                assert holder.answers(1) == [messages.RequestOver(number)]
                holder.socket.settimeout(10)


async def calls_to_refuse(held: int) -> int:
    """The calls that one more message takes, of a connection that holds so much already."""
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache:
        opened = Server(cache, ServerConfig(listen=["unix:///unused"], max_requests=held))
        session = opened.session(Tenant(), "", None, mapped=False)
        session._handle(messages.RegisterLayout(1, 0, describe(LAYOUT)))
        for n in range(held):
            session._handle(messages.Prefetch(n, pack(make_prompt(1, n), 0, trusted=False), f"{n}"))
        assert session.held.requests == held
        wire, calls = pack(PROMPT, 0, trusted=False), Counter[str]()
        sys.setprofile(lambda frame, event, _: calls.update((event,)))
        session._handle(messages.Prefetch(held, wire, "one more"))
        sys.setprofile(None)
        assert held not in session.held
        session.connection.connection_lost(None)
        await opened.close()
        return calls["call"] + calls["c_call"]


async def test_what_a_refusal_costs_does_not_grow_with_what_is_held() -> None:
    """Else whoever holds all that it may hold makes each further message dear."""
    assert await calls_to_refuse(400) <= await calls_to_refuse(10) + 5
