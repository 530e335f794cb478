"""A connection: messages in order, back-pressure, and an end that loses nothing that was sent."""

import asyncio
import itertools
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from async_cache import ConnectionLostError, LimitError
from async_cache.protocol.connection import Connection
from async_cache.protocol.frames import FrameReader, frame
from async_cache.protocol.messages import Answer, Decoder, Done, Failed, Ping, ReadData, Request, encode
from async_cache.protocol.partials import Partials

DATA = ReadData(1, 0, memoryview(bytes(2**18)))
STALL_SECONDS = 0.05
_answers = Decoder(Answer)


class End:
    """A connection under test, and the bare socket at its other end."""

    def __init__(
        self,
        stall_seconds: float | None = None,
        fault: Exception | None = None,
        partials: Partials | None = None,
    ):
        self.received: list[Any] = []
        self.fault = fault
        self.pause_behind = 0  # so many messages
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.connection = Connection(
            Decoder(Request), self.take, self.lost.set_result, stall_seconds=stall_seconds, partials=partials
        )
        self.peer, self.sock = socket.socketpair()
        self.peer.setblocking(False)
        self._frames = FrameReader()
        self._took = asyncio.Event()

    def take(self, message: Any) -> None:
        self.received.append(message)
        self._took.set()
        if len(self.received) == self.pause_behind:
            self.connection.pause_reading()
        if self.fault is not None:
            raise self.fault

    async def took(self, count: int) -> None:
        """Return when so many messages were received."""
        while len(self.received) < count:
            self._took.clear()
            await self._took.wait()

    async def say(self, *messages: Any) -> None:
        """Send from the other end."""
        await asyncio.get_running_loop().sock_sendall(self.peer, b"".join(frame(encode(m)) for m in messages))

    async def hear(self, count: int | None = None) -> list[Any]:
        """So many messages at the other end, or all up to the end."""
        loop, heard = asyncio.get_running_loop(), []
        while count is None or len(heard) < count:
            data = await loop.sock_recv(self.peer, 2**20)
            if not data:
                break
            heard += [_answers.decode(bytes(payload)) for payload in self._frames.feed(data)]
        return heard


@asynccontextmanager
async def open_end(**options: Any) -> AsyncIterator[End]:
    end = End(**options)
    loop = asyncio.get_running_loop()
    await loop.connect_accepted_socket(lambda: end.connection, end.sock)
    async with asyncio.timeout(60):
        yield end
        end.connection.abort()
        await end.lost
    end.peer.close()


async def fill(end: End) -> None:
    """Send until the other end's not reading shows."""
    while end.connection._writable is None:
        end.connection.send(DATA)
        end.connection.flush()


async def test_messages_come_in_the_order_in_which_they_were_sent_in_both_directions() -> None:
    async with open_end() as end:
        await end.say(*[Ping(n) for n in range(1, 101)])
        for number in range(1, 101):
            end.connection.send(Done(number))
        assert await end.hear(100) == [Done(number) for number in range(1, 101)]
        await end.say(Ping(101))
        await end.took(101)
        assert end.received == [Ping(n) for n in range(1, 102)] and end.connection.received_frames == 101


async def test_the_messages_of_one_step_go_out_together() -> None:
    async with open_end() as end:
        end.connection.send(Done(1))
        end.connection.send(Done(2))
        with pytest.raises(BlockingIOError):
            end.peer.recv(1)
        assert await end.hear(2) == [Done(1), Done(2)]


async def test_close_sends_what_was_sent_before_it_and_nothing_after() -> None:
    async with open_end(stall_seconds=10.0) as end:
        for _ in range(20):  # more than a socket holds
            end.connection.send(DATA)
        end.connection.send(Done(7))
        end.connection.close()
        end.connection.send(Done(8))
        heard = await end.hear()
        assert [type(message) for message in heard] == [ReadData] * 20 + [Done] and heard[-1] == Done(7)
        assert await end.lost is None


async def test_nothing_is_received_any_more_once_it_is_closed() -> None:
    async with open_end() as end:
        await end.say(Ping(1))
        end.connection.close()
        await end.lost
        assert end.received == [] and not end.connection.is_open


async def test_a_connection_that_is_closed_twice_or_was_never_made_is_no_error() -> None:
    connection = Connection(Decoder(Request), print, print)
    connection.send(Done(1))
    for end_it in (connection.flush, connection.close, connection.abort):
        end_it()
    async with open_end() as end:
        end.connection.close()
        end.connection.close()
        await end.lost


async def test_drained_waits_until_the_peer_has_read() -> None:
    async with open_end() as end:
        await end.connection.drained()  # nothing was sent
        await fill(end)
        draining = asyncio.create_task(end.connection.drained())
        done, _ = await asyncio.wait((draining,), timeout=0.02)
        assert not done
        reading = asyncio.create_task(end.hear())
        await draining
        reading.cancel()


@pytest.mark.parametrize("how", ["abort", "peer"])
async def test_drained_raises_when_the_connection_is_lost(how: str) -> None:
    async with open_end() as end:
        await fill(end)
        draining = asyncio.create_task(end.connection.drained())
        await asyncio.sleep(0)
        if how == "abort":
            end.connection.abort()
        else:
            end.peer.close()
        with pytest.raises(ConnectionLostError):
            await draining
        with pytest.raises(ConnectionLostError):
            await end.connection.drained()


async def test_a_peer_that_does_not_read_is_not_listened_to_until_it_does() -> None:
    async with open_end(stall_seconds=10.0) as end:
        await fill(end)
        await end.say(Ping(1))
        done, _ = await asyncio.wait((end.lost,), timeout=0.02)
        assert not done and end.received == []
        reading = asyncio.create_task(end.hear())
        await end.took(1)
        assert end.received == [Ping(1)]
        reading.cancel()


async def test_a_peer_that_does_not_read_for_too_long_is_given_up() -> None:
    async with open_end(stall_seconds=STALL_SECONDS) as end:
        began = asyncio.get_running_loop().time()
        await fill(end)
        await end.lost
        assert asyncio.get_running_loop().time() - began >= STALL_SECONDS * 0.9


async def test_a_peer_that_reads_in_time_is_not_given_up() -> None:
    async with open_end(stall_seconds=600) as end:
        for _ in range(3):
            await fill(end)
            assert end.connection._giving_up is not None
            reading = asyncio.create_task(end.hear())
            await end.connection.drained()
            assert end.connection._giving_up is None
            reading.cancel()


async def test_a_peer_that_does_not_take_the_last_messages_is_given_up() -> None:
    async with open_end(stall_seconds=STALL_SECONDS) as end:
        for _ in range(20):
            end.connection.send(DATA)
        end.connection.close()
        await end.lost


async def test_without_a_time_for_it_nobody_is_given_up_and_all_are_listened_to() -> None:
    async with open_end() as end:
        await fill(end)
        await end.say(Ping(1))
        await end.took(1)
        assert not end.lost.done()


async def test_what_is_no_message_is_told_and_ends_the_connection() -> None:
    async with open_end() as end:
        await end.say(Ping(1))
        await asyncio.get_running_loop().sock_sendall(end.peer, frame(b"\xc0") + frame(encode(Ping(2))))
        (failed,) = await end.hear()
        assert isinstance(failed, Failed) and (failed.number, failed.code) == (0, "protocol")
        assert await end.lost is None and end.received == [Ping(1)]


async def test_an_error_of_whoever_receives_is_told_and_ends_the_connection() -> None:
    async with open_end(fault=LimitError("too much")) as end:
        await end.say(Ping(1), Ping(2))
        assert await end.hear() == [Failed(0, "limit", "too much")]
        assert end.received == [Ping(1)]


async def test_a_fault_of_whoever_receives_is_logged_and_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        async with open_end(fault=RuntimeError("secret")) as end:
            await end.say(Ping(1))
            (failed,) = await end.hear()
    assert failed.code == "internal" and "secret" not in failed.message
    assert "could not be handled" in caplog.text


@pytest.mark.parametrize("paused", [False, True])
async def test_a_peer_that_is_sending_when_it_is_sent_away_hears_why(paused: bool) -> None:
    async with open_end() as end:
        if paused:
            end.connection.pause_reading()
        end.connection.fail(LimitError("too much"))
        await asyncio.sleep(0)
        for number in range(1, 100):
            await end.say(Ping(number))
            await asyncio.sleep(0)
        assert await end.hear() == [Failed(0, "limit", "too much")]
        assert not end.lost.done() and not end.received
        end.peer.close()
        assert await end.lost is None


async def test_a_peer_that_was_sent_away_and_stays_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_cache.protocol.connection._HEARS_SECONDS", 0.05)
    async with open_end() as end:
        end.connection.fail(LimitError("too much"))
        with pytest.raises(OSError, match=r"roken pipe|reset"):
            await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(end.peer, bytes(2**26)), 60)
        await end.lost


async def test_a_peer_that_goes_is_noticed_once() -> None:
    async with open_end() as end:
        end.peer.close()
        await end.lost
        end.connection.send(Done(1))
        assert not end.connection.is_open


async def test_nothing_is_received_until_the_last_reason_for_a_pause_is_gone() -> None:
    async with open_end(stall_seconds=10.0) as end:
        transport = end.connection._transport
        assert transport is not None and transport.is_reading()
        end.connection.pause_reading()
        await fill(end)
        end.connection.resume_reading()
        assert not transport.is_reading()
        end.connection.pause_reading()
        await end.say(Ping(1))
        reading = asyncio.create_task(end.hear())
        await end.connection.drained()
        done, _ = await asyncio.wait((end.lost,), timeout=0.02)
        assert not done and end.received == [] and "busy" in repr(end.connection)
        end.connection.resume_reading()
        await end.took(1)
        reading.cancel()


async def test_a_pause_begins_behind_the_message_that_asks_for_it_and_ends_with_the_next() -> None:
    async with open_end() as end:
        end.pause_behind = 2
        await end.say(Ping(1), Ping(2), Ping(3))
        await end.took(2)
        await end.say(Ping(4))
        await asyncio.wait((end.lost,), timeout=0.02)
        assert end.received == [Ping(1), Ping(2)]
        end.connection.resume_reading()
        assert end.received == [Ping(1), Ping(2), Ping(3)]
        await end.took(4)


async def test_others_have_their_turn_while_many_messages_are_received() -> None:
    async with open_end() as end:
        end.connection.pause_reading()
        await end.say(*[Ping(n) for n in range(1, 1001)])
        await asyncio.wait((end.lost,), timeout=0.02)
        end.connection.resume_reading()
        counts = [len(end.received)]
        while counts[-1] < 1000:
            await asyncio.sleep(0)
            counts.append(len(end.received))
        assert max(b - a for a, b in itertools.pairwise([0, *counts])) <= 128
        assert end.received == [Ping(n) for n in range(1, 1001)]


@pytest.mark.parametrize("how", ["abort", "lost"])
async def test_one_that_is_given_up_before_it_is_made_ends_and_is_lost_once(how: str) -> None:
    end = End()
    if how == "abort":
        end.connection.abort()
    else:
        end.connection.connection_lost(None)
    await asyncio.get_running_loop().connect_accepted_socket(lambda: end.connection, end.sock)
    async with asyncio.timeout(60):
        assert await asyncio.get_running_loop().sock_recv(end.peer, 1) == b""
        assert await end.lost is None
    assert not end.connection.is_open and "lost" in repr(end.connection)
    end.peer.close()
