"""Two tenants against each other over every message: neither learns what the other has, nor changes it.

Not by an answer, an error, an event, a count or a time.
"""

import itertools
import random
import statistics

import pytest
from contract.support import make_layout
from soak import rounds

from async_cache import ObjectGroup
from async_cache.protocol import messages
from async_cache.protocol.frames import frame
from async_cache.protocol.messages import Failed, encode
from async_cache.protocol.prompts import pack

from .programs import server
from .support import Peer

RED, BLUE = (f"token-of-{name:_<16}" for name in ("red", "blue"))
CONFIG = "".join(
    f'[server.tenants.{name}]\ntokens = ["{token}"]\nsalts = ["{name}"]\n'
    for name, token in (("red", RED), ("blue", BLUE))
)
LAYOUT = make_layout(ObjectGroup((64,), "uint8"))
PUSHED = (messages.LookupDone, messages.LoadDone, messages.RequestOver, messages.RequestClaimed, messages.Happened)


@pytest.fixture(scope="module", params=["memory://", "fs"])
def served(tmp_path_factory, request):
    directory = tmp_path_factory.mktemp("pairs")
    (directory / "c.toml").write_text(CONFIG)
    l2 = request.param if request.param != "fs" else f"fs://{directory}/l2"
    with server(
        directory, l2=[l2], config=directory / "c.toml", server_max_requests=100_000, result_ttl_seconds=10_000
    ) as served:
        yield served


class Side:
    """One tenant: what it has stored and asked for, and the next answer that is no push."""

    def __init__(self, url, name, token):
        self.name = name
        self.peer = Peer(url, token=token)
        self.peer.register(LAYOUT)
        self.peer.answers(1)
        self.stored, self.requests, self.events = [], [], []
        self.names = (f"{name}-{n}" for n in itertools.count())
        self.peer.send(messages.Events(self.peer.number(), 1000))

    def ask(self, message):
        """The answer, and what came meanwhile is kept: the loop answers in order, so a ping ends it."""
        ping = messages.Ping(self.peer.number())
        self.peer.send(message)
        answers = []
        while not any(answer.number == message.number and not isinstance(answer, PUSHED) for answer in answers):
            answers += self.peer.answers(1)
        self.peer.send(ping)
        while messages.Done(ping.number) not in answers:
            answers += self.peer.answers(1)
        self.events += [e for answer in answers if isinstance(answer, messages.Happened) for e in answer.events]
        return next(a for a in answers if a.number == message.number and not isinstance(a, PUSHED))

    def wire(self, tokens, salt=None):
        return pack(LAYOUT.prompt(tokens, salt=self.name if salt is None else salt), 0, trusted=False)

    def store(self, tokens):
        number = self.peer.number()
        reserved = self.ask(messages.ReserveStore(number, self.wire(tokens)))
        for position, _ in enumerate(reserved.chunks):
            self.peer.send(messages.StoreData(number, position, 0, memoryview(bytes(64))))
            self.ask(messages.CommitStore(self.peer.number(), number, position))
        self.ask(messages.CloseStore(self.peer.number(), number))
        self.stored.append(tokens)

    def prefetch(self, tokens):
        name = next(self.names)
        number = self.peer.number()
        self.peer.send(messages.Prefetch(number, self.wire(tokens), name))
        answers = []
        while not any(isinstance(answer, messages.LoadDone) for answer in answers):
            answers += self.peer.answers(1)
        self.requests.append((name, number))
        return next(answer.result.chunks for answer in answers if isinstance(answer, messages.LoadDone))

    def stats(self):
        return self.ask(messages.Stats(self.peer.number())).stats


def is_failed(answer, code):
    return isinstance(answer, Failed) and answer.code == code


def tries(one, other):
    """What one may ask about what the other has, and whether the answer is as if that were not there."""
    tokens = other.stored[-1]
    name, held = other.requests[-1]
    theirs = LAYOUT.prompt(tokens, salt=other.name)
    own, foreign = one.wire(tokens), one.wire(tokens, other.name)
    digests = messages.Digests(0, theirs.root, theirs.tokens, other.name, b"".join(theirs.chunk_hashes))

    def unknown(answer):
        return answer.message == f"there is no request {name!r}" and answer.code == "unknown_request"

    def denied(answer):
        return is_failed(answer, "access_denied")

    def done(answer):
        return type(answer) is messages.Done

    n = one.peer.number
    return [
        (messages.Lookup(n(), own), lambda a: (a.hits.chunks, a.hits.found_chunks) == (0, 0)),
        (messages.Lookup(n(), foreign), denied),
        (messages.Lookup(n(), digests), denied),
        (
            messages.Explain(n(), own),
            lambda a: {s.state.value for s in a.explanation.spans} == {"unknown"} and not a.explanation.elsewhere,
        ),
        (messages.Explain(n(), foreign), denied),
        (messages.Prefetch(n(), foreign, "x"), denied),
        (messages.Delete(n(), own), lambda a: a.deleted.chunks == 0),
        (messages.Delete(n(), foreign), denied),
        (messages.ReserveStore(n(), foreign), denied),
        (messages.QueryPrefetchLookupHits(n(), name), unknown),
        (messages.QueryPrefetchStatus(n(), name), unknown),
        (messages.AcquireRead(n(), name), unknown),
        (messages.Renew(n(), name), unknown),
        (messages.Unclaim(n(), name), done),
        (messages.EndRequest(n(), name), done),
        (messages.Cancel(n(), held), done),
        (messages.ReleaseRead(n(), held), done),
        (messages.CloseStore(n(), held), done),
        (messages.CommitStore(n(), held, 0), lambda a: is_failed(a, "writer_closed")),
        (messages.Retain(n(), foreign), denied),
        (messages.Warm(n(), foreign), denied),
        (messages.Hint(n(), foreign), denied),
        (messages.ListRetained(n()), lambda a: not a.retained),
        (messages.Clear(n(), "all"), denied),
        (messages.Clear(n(), "l1"), denied),
        (messages.Flush(n(), 0.0), lambda a: a.result.written == a.result.dropped == 0),
        (messages.ListRoots(n()), lambda a: {root.salt for root in a.roots} <= {one.name}),
        (messages.ListChunks(n()), lambda a: {chunk.salt for chunk in a.chunks} <= {one.name}),
        (messages.ListChunks(n(), None, other.name), lambda a: not getattr(a, "chunks", [])),
        (messages.ListBackends(n()), denied),
        (messages.AddBackend(n(), "memory://"), denied),
        (messages.DrainBackend(n(), "memory"), denied),
        (messages.RemoveBackend(n(), "memory"), denied),
        (messages.Reload(n()), denied),
    ]


async def test_neither_learns_of_the_other_nor_changes_what_it_has(served):
    chance = random.Random(16)
    sides = [Side(served.url, name, token) for name, token in (("red", RED), ("blue", BLUE))]
    fresh = itertools.count(1)
    for side in sides:
        side.store(range(side.name == "red", 9))
        assert side.prefetch(side.stored[-1]) == len(LAYOUT.prompt(side.stored[-1]))
        side.ask(messages.Flush(side.peer.number(), 10.0))
    for count in range(rounds(300, 10_000)):
        one, other = chance.sample(sides, 2)
        if count % 20 == 0:
            begin = next(fresh) * 1000
            other.store(range(begin, begin + 8))
            result = one.ask(messages.Flush(one.peer.number(), 10.0)).result
            assert (result.written, result.pending, result.dropped) == (0, 0, 0), "what the other has just stored"
            other.prefetch(other.stored[-1])
            other.ask(messages.Flush(other.peer.number(), 10.0))
        before, seen = other.stats(), one.stats()
        message, is_right = chance.choice(tries(one, other))
        answer = one.ask(message)
        assert is_right(answer), (count, type(message).__name__, answer)
        assert other.stats() == before, (count, type(message).__name__)
        other.prefetch(other.stored[-1])
        other.ask(messages.EndRequest(other.peer.number(), other.requests.pop()[0]))
        now = one.stats()
        assert now.l1_chunks == sum(len(LAYOUT.prompt(tokens)) for tokens in one.stored) and not now.backends
        assert now.requests == len(one.requests)
        assert (now.l1_chunks, now.leases, now.l1_used_bytes) == (seen.l1_chunks, seen.leases, seen.l1_used_bytes)
    for one, other in (sides, sides[::-1]):
        theirs = {h for tokens in other.stored for h in LAYOUT.prompt(tokens, salt=other.name).chunk_hashes}
        mine = {h for tokens in one.stored for h in LAYOUT.prompt(tokens, salt=one.name).chunk_hashes}
        heard = {event.chunk_hash for event in one.events if hasattr(event, "chunk_hash")}
        assert heard and heard <= mine and not heard & theirs
    for side in sides:
        side.peer.close()


def test_to_ask_for_what_the_other_has_is_as_much_work_as_for_what_nobody_has(served):
    red, blue = (Side(served.url, name, token) for name, token in (("red", RED), ("blue", BLUE)))
    there, nowhere = range(5_000_000, 5_000_256), range(7_000_000, 7_000_256)
    blue.store(there)
    times = {there: [], nowhere: []}
    for count in range(rounds(60, 2_000)):
        for tokens in (there, nowhere) if count % 2 else (nowhere, there):
            message = messages.Lookup(red.peer.number(), red.wire(tokens))
            data = frame(encode(message))
            began = served.busy_seconds()
            red.peer.socket.sendall(data)
            while not (hits := [answer for answer in red.peer.answers(1) if isinstance(answer, messages.Hits)]):
                pass
            times[tokens].append(served.busy_seconds() - began)
            assert hits[0].hits.found_chunks == 0
    fast, slow = sorted(statistics.median(taken) for taken in times.values())
    assert slow < 1.5 * fast
    red.peer.close()
    blue.peer.close()
