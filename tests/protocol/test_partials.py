"""Frames that have begun: all of them are bounded in bytes and in time, and who sends in earnest notices nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import async_solipsism

from async_cache.limits import TenantLimits
from async_cache.protocol.frames import frame
from async_cache.protocol.messages import Failed, Ping, StoreData, encode
from async_cache.protocol.partials import Partials
from async_cache.server.accounts import Account
from async_cache.server.partials import TenantPartials

from .test_connection import End

SECONDS = 0.05
DATA = frame(encode(StoreData(1, 0, 0, memoryview(bytes(2000)))))


class Receiver:
    """A connection that only says how it was failed."""

    def __init__(self, *, is_paused: bool = False):
        self.is_paused = is_paused
        self.error: Exception | None = None

    def fail(self, error: Exception) -> None:
        self.error = error


def in_virtual_time(work: Any) -> None:
    with asyncio.Runner(loop_factory=async_solipsism.EventLoop) as runner:
        runner.run(work)


def test_a_frame_that_is_not_complete_in_time_is_given_up_and_the_next_in_its_own_time() -> None:
    async def work() -> None:
        partials = Partials(10.0)
        first, second, third = Receiver(), Receiver(), Receiver()
        partials.keep(first, 1, 100)
        await asyncio.sleep(6)
        partials.keep(second, 1, 100)
        partials.keep(third, 1, 100)
        partials.keep(first, 1, 200)  # more of the same
        await asyncio.sleep(5)
        assert "not complete within 10 s" in str(first.error) and second.error is third.error is None
        partials.keep(third, 2, 50)  # another
        await asyncio.sleep(6)
        assert second.error is not None and third.error is None and partials.size_bytes == 50
        await asyncio.sleep(5)
        assert third.error is not None and partials.size_bytes == 0
        fourth = Receiver()
        partials.keep(fourth, 1, 1)
        await asyncio.sleep(11)
        assert fourth.error is not None
        partials.close()

    in_virtual_time(work())


def test_the_time_in_which_this_end_does_not_go_on_is_no_fault_of_the_peer() -> None:
    async def work() -> None:
        partials = Partials(10.0)
        paused = Receiver(is_paused=True)
        partials.keep(paused, 1, 100)
        await asyncio.sleep(15)
        paused.is_paused = False
        assert paused.error is None and partials.size_bytes == 100
        await asyncio.sleep(10)
        assert paused.error is not None and partials.size_bytes == 0
        partials.close()

    in_virtual_time(work())


def test_the_oldest_makes_room_for_what_others_begin() -> None:
    async def work() -> None:
        partials = Partials(10.0, limit_bytes=250)
        old, other, new = Receiver(), Receiver(), Receiver()
        for receiver in (old, other):
            partials.keep(receiver, 1, 100)
        partials.keep(old, 2, 100)  # its first is complete
        partials.keep(new, 1, 100)
        assert "too much memory" in str(other.error) and old.error is new.error is None
        assert partials.size_bytes == 200
        partials.keep(new, 1, 300)
        assert old.error is not None and new.error is not None and partials.size_bytes == 0
        partials.close()

    in_virtual_time(work())


@asynccontextmanager
async def ends(partials: Partials, count: int) -> AsyncIterator[list[End]]:
    made = [End(partials=partials) for _ in range(count)]
    for end in made:
        await end.connection.take(end.sock)
    async with asyncio.timeout(60):
        yield made
        for end in made:
            end.connection.abort()
            await end.lost
            end.peer.close()
    partials.close()


async def test_a_peer_that_half_sends_a_frame_is_told_why_and_sent_away() -> None:
    async with ends(Partials(SECONDS), 2) as (half, other):
        await half.say(Ping(1))
        await asyncio.get_running_loop().sock_sendall(half.peer, DATA[:1000])
        (failed,) = await half.hear()
        assert isinstance(failed, Failed) and (failed.number, failed.code) == (0, "protocol")
        await half.lost
        assert half.received == [Ping(1)] and not other.lost.done()


async def test_what_all_peers_half_send_is_bounded() -> None:
    partials = Partials(20.0, limit_bytes=5000)
    async with ends(partials, 8) as made:
        for end in made:
            await asyncio.get_running_loop().sock_sendall(end.peer, DATA[:1000])
        for end in made[:3]:
            (failed,) = await end.hear()
            assert failed.code == "limit"
            await end.lost
        assert partials.size_bytes == 5000
        for end in made[3:]:
            await asyncio.get_running_loop().sock_sendall(end.peer, DATA[1000:])
            await end.took(1)
        assert partials.size_bytes == 0
        await asyncio.get_running_loop().sock_sendall(made[3].peer, DATA[:7])
        while partials.size_bytes != 7:  # noqa: ASYNC110
            await asyncio.sleep(0)
        made[3].peer.close()
        await made[3].lost
        assert partials.size_bytes == 0


def test_what_is_given_up_for_all_together_is_not_that_of_its_tenant_any_more() -> None:
    """A connection that was told to fail may take its time to end."""

    async def work() -> None:
        together = Partials(10.0, limit_bytes=1000)
        red, blue = (Account(name, TenantLimits(), 2**20) for name in ("red", "blue"))
        reds, blues = TenantPartials(together, red), TenantPartials(together, blue)
        for number in range(2):
            reds.keep(Receiver(), number, 400)
        blues.keep(Receiver(), 1, 600)
        assert (red.used["partial_bytes"], blue.used["partial_bytes"], together.size_bytes) == (400, 600, 1000)
        await asyncio.sleep(11.0)
        assert (red.used["partial_bytes"], blue.used["partial_bytes"], together.size_bytes) == (0, 0, 0)
        together.close()

    in_virtual_time(work())


def test_those_of_one_tenant_are_bounded_and_make_room_for_each_other_only() -> None:
    async def work() -> None:
        together = Partials(10.0)
        red, blue = (Account(name, TenantLimits(partial_bytes=1000), 2**20) for name in ("red", "blue"))
        reds, blues = TenantPartials(together, red), TenantPartials(together, blue)
        receivers = [Receiver() for _ in range(4)]
        blues.keep(receivers[3], 1, 900)
        reds.keep(receivers[0], 1, 400)
        reds.keep(receivers[1], 1, 400)
        reds.keep(receivers[0], 2, 100)  # its frame is complete, and the next one is newer than the other's
        reds.keep(receivers[2], 1, 600)
        assert [receiver.error is not None for receiver in receivers] == [False, True, False, False]
        assert str(receivers[1].error).startswith("partial_bytes: ")
        assert (red.used["partial_bytes"], together.size_bytes) == (700, 1600)
        for receiver in receivers:
            reds.drop(receiver)
            reds.drop(receiver)
        assert (red.used["partial_bytes"], together.size_bytes) == (0, 900)
        together.close()

    in_virtual_time(work())
