"""A server gets what no client would send: a typed error or a closed connection each, and nothing else changes."""

import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest
from soak import rounds

from async_cache import BlockingClient, ModelLayout, ObjectGroup
from async_cache.protocol import messages as m
from async_cache.protocol.frames import frame
from async_cache.protocol.messages import ERROR_CODES, encode

from .peer import HELLO, Peer, Served, codes, memory, serving
from .wild import LAYOUTS, SEGMENT_BYTES, Wild

FRAMES = rounds(3_000, 100_000)
BOMBS = rounds(100, 1_000)
PER_CONNECTION = 40
WARM_UP = 500
GROWTH_BYTES = 24 * 2**20  # what an allocator may keep; a leak of one frame in ten would be more by far
SETTLE_SECONDS = 100
REGISTRATIONS = [frame(encode(m.RegisterLayout(n + 1, n, layout))) for n, layout in enumerate(LAYOUTS)]
REGISTRATION, SHORT_REGISTRATION = b"".join(REGISTRATIONS), b"".join(REGISTRATIONS[:-1])
LAYOUT = ModelLayout("healthy", (ObjectGroup((1000,), "uint8"),), chunk_tokens=4)


@pytest.fixture(scope="module")
def segment() -> Iterator[int]:
    descriptor = memory(SEGMENT_BYTES)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def server() -> Iterator[Served]:
    with serving(l2="memory://?capacity=1MiB") as served:
        yield served


class Healthy:
    """A client of the same server, which goes about its business."""

    def __init__(self, served: Served):
        self.cache = BlockingClient(served.url, namespace="healthy").open()
        self._turns = 0

    def works(self) -> None:
        """Its calls are answered, and what it reads is what it wrote, if it is there still: others may clear it."""
        self._turns += 1
        prompt = LAYOUT.prompt([self._turns % 50, 1, 2, 3])
        pattern = bytes([self._turns % 50]) * 1000
        with self.cache.store(prompt) as writer:
            for chunk in writer:
                chunk.views[0][:] = pattern
                chunk.commit()
        prefetch = self.cache.prefetch(prompt)
        assert prefetch.lookup_done.result(SETTLE_SECONDS).chunks <= 1
        with self.cache.read(prefetch.request_id) as lease:
            assert all(bytes(chunk.views[0]) == pattern for chunk in lease)
        assert self.cache.ping() < SETTLE_SECONDS

    def holds_nothing_but_its_own(self) -> None:
        """The server has taken back all that others held."""
        end = time.monotonic() + SETTLE_SECONDS
        while held := self._held():
            assert time.monotonic() < end, held

    def _held(self) -> dict[str, int]:
        stats = self.cache.stats()
        names = ("requests", "leases", "leased_bytes", "reserved_bytes", "quarantined_bytes")
        return {name: held for name in names if (held := getattr(stats, name))}


class Attack:
    """Connections, one after the other, over which bytes go; what came back is checked, and counted."""

    def __init__(self, served: Served, segment: int):
        self.seen: Counter[str] = Counter()
        self._served = served
        self._segment = segment

    def connect(self, *, everything: bool = False) -> Peer:
        """As a client that is welcome, and has registered all layouts, or those that cost little."""
        peer = Peer(self._served.path, HELLO, self._segment)
        peer.send(REGISTRATION if everything else SHORT_REGISTRATION)
        return peer

    def send(self, peer: Peer, parts: list[Any]) -> None:
        """Each part is answered, or ends the connection and says why."""
        check(peer.ask(*parts), parts)
        self.seen.update(type(answer).__name__ for answer in peer.answers)
        self.seen.update(code for _, code in codes(peer.answers))
        peer.answers.clear()

    def end(self, peer: Peer, parts: list[Any]) -> None:
        """The last parts: they may be cut off."""
        peer.send(*parts)
        check(peer.end(), parts)
        self.seen.update(f"closed: {code}" for number, code in codes(peer.answers) if not number)


def check(answers: list[Any], parts: list[Any]) -> None:
    """No answer tells of a defect."""
    for number, code in codes(answers):
        assert code in ERROR_CODES and code != "internal", (number, code, answers[-1], parts)


class Size:
    """The memory and the descriptors of the server, while nothing is asked of it but by one client."""

    def __init__(self, served: Served, cache: BlockingClient):
        self._process, self._cache = psutil.Process(served.process.pid), cache
        self._descriptors = self._process.num_fds()

    def resident_bytes(self) -> int:
        """How much memory it has."""
        return self._process.memory_info().rss

    def has_no_more_descriptors(self) -> None:
        """Not even in the end: what was given up may have a thread read a file for a moment longer."""
        end = time.monotonic() + SETTLE_SECONDS
        while (now := self._process.num_fds()) > self._descriptors:
            assert time.monotonic() < end, f"{now} descriptors, and not {self._descriptors}"
            self._cache.ping()


def run(served: Served, attack: Callable[[int], None], total: int) -> None:
    """An attack in rounds of which each has a seed; between them, the other client works."""
    healthy = Healthy(served)
    healthy.works()
    size = Size(served, healthy.cache)

    def attack_with(seeds: range) -> int:
        """The memory that the server has then."""
        for seed in seeds:
            attack(seed)
            healthy.works()
        healthy.holds_nothing_but_its_own()
        healthy.cache.clear("all")
        size.has_no_more_descriptors()
        return size.resident_bytes()

    per_round = PER_CONNECTION
    warm_up = range(max(1, min(WARM_UP, total // 2) // per_round))
    before = attack_with(warm_up)
    after = attack_with(range(len(warm_up), max(len(warm_up) + 1, total // per_round)))
    assert served.process.poll() is None
    assert served.faults() == []
    assert after - before < GROWTH_BYTES
    healthy.cache.close()


@pytest.mark.timeout(3600)
def test_wild_messages_are_answered_with_results_or_typed_errors(server: Served, segment: int) -> None:
    attack = Attack(server, segment)

    def wild_messages(seed: int) -> None:
        wild = Wild(random.Random(seed))
        with attack.connect(everything=True) as peer:
            for _ in range(PER_CONNECTION // 4):
                attack.send(peer, [wild.request() if wild.rng.random() < 0.7 else wild.store()[0] for _ in range(4)])
                if peer.closed:
                    break
            attack.end(peer, [])

    run(server, wild_messages, FRAMES)
    answers = {
        "Done",
        "Hits",
        "LookupDone",
        "LoadDone",
        "RequestOver",
        "Loaded",
        "ReadAcquired",
        "StoreReserved",
        "Removed",
    }
    assert attack.seen.keys() >= answers | {
        "Flushed",
        "Counted",
        "value",
        "unknown_request",
        "writer_closed",
        "cancelled",
    }


@pytest.mark.timeout(3600)
def test_a_mutated_frame_is_answered_with_a_typed_error_or_closes_its_connection(server: Served, segment: int) -> None:
    attack = Attack(server, segment)

    def mutants(seed: int) -> None:
        wild = Wild(random.Random(seed))
        peer = attack.connect()
        for _ in range(PER_CONNECTION):
            if wild.rng.random() < 0.3:
                attack.send(peer, [wild.store()[0], wild.request()])
            data = wild.mutant()
            if len(data) >= 4 and len(data) == 4 + int.from_bytes(data[:4], "little"):
                attack.send(peer, [data])
            else:
                attack.end(peer, [data])
            if peer.closed:
                peer.close()
                peer = attack.connect()
        attack.end(peer, [])
        peer.close()

    run(server, mutants, FRAMES)
    assert attack.seen["closed: protocol"]


@pytest.mark.timeout(3600)
def test_a_size_bomb_is_answered_with_a_typed_error_or_closes_its_connection(server: Served, segment: int) -> None:
    attack = Attack(server, segment)

    def bombs(seed: int) -> None:
        wild = Wild(random.Random(seed))
        for _ in range(PER_CONNECTION):
            with attack.connect() as peer:
                attack.send(peer, [wild.request()])
                attack.end(peer, [wild.bomb()])

    run(server, bombs, BOMBS)
    assert attack.seen["closed: protocol"]


@pytest.mark.timeout(3600)
def test_a_greeting_that_is_none_is_refused(server: Served) -> None:
    """Before it is known, a peer can send a frame of a greeting, and nothing else."""
    wild = Wild(random.Random(0))
    hello = frame(encode(HELLO))

    def greetings() -> None:
        for number in range(BOMBS):
            data = bytearray(hello)
            data[wild.rng.randrange(len(data))] ^= 1 << wild.rng.randrange(8)
            with Peer(server.path) as peer:
                if number % 5 == 0:  # welcome, and gone
                    peer.greet(HELLO)
                else:
                    peer.send(bytes(data) if number % 2 else wild.bomb())
                to_the_end(peer)

    with BlockingClient(server.url) as cache:
        cache.ping()
        size = Size(server, cache)
        greetings()
        before = size.resident_bytes()
        greetings()
        assert cache.ping() < SETTLE_SECONDS
        assert size.resident_bytes() - before < GROWTH_BYTES
        size.has_no_more_descriptors()
    assert server.faults() == []


def to_the_end(peer: Peer) -> None:
    """Send no more, and hear whatever there is to hear."""
    with suppress(OSError):
        peer.sock.shutdown(socket.SHUT_WR)
        while peer.sock.recv(2**16):
            continue
