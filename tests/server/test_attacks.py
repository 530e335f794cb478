"""One tenant takes what it can: of L1, of the server's memory, of the doors, and of others' time."""

import asyncio
import random
import signal
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import ClassVar, get_args

import pytest
from contract.support import fill, make_layout
from soak import SOAK_SECONDS, rounds

from async_cache import AccessDeniedError, BlockingClient, LimitError, ObjectGroup, connect
from async_cache.prompt.layout import ModelLayout
from async_cache.protocol import messages
from async_cache.protocol.frames import FrameReader, frame
from async_cache.protocol.messages import Decoder, encode
from async_cache.protocol.prompts import describe, pack

from .programs import server
from .support import MIB, Peer, given_back, wait_until

RED, BLUE = (f"token-of-{name:_<16}" for name in ("red", "blue"))
CONFIG = "".join(
    f'[server.tenants.{name}]\ntokens = ["{token}"]\nsalts = ["{name}"]\n'
    for name, token in (("red", RED), ("blue", BLUE))
)
KV = make_layout(ObjectGroup((65_536,), "uint8"), model="kv")
ONE = ModelLayout("one", (ObjectGroup((1,), "uint8"),), chunk_tokens=1)
TINY = ModelLayout("tiny", tuple(ObjectGroup((1,), "uint8") for _ in range(4096)), chunk_tokens=1)
WINDOWS = ModelLayout(
    "windows", tuple(ObjectGroup((1,), "uint8", window_chunks=n + 1) for n in range(4096)), chunk_tokens=1
)
_answers = Decoder(messages.Answer)


@contextmanager
def serve(directory, *, l1="16MiB", l2="memory://", **settings):
    (directory / "c.toml").write_text(CONFIG)
    urls = f"unix://{directory}/s", "tcp://127.0.0.1:0"
    with server(directory, *urls, l1=l1, l2=[l2], config=directory / "c.toml", **settings) as served:
        yield served


def own_bytes(served):
    """The server's memory beside the arena."""
    with open(f"/proc/{served.pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def descriptors_beside_l2(served):
    return sum("/kv/" not in path for path in served.open_files())


def kv(chunks, salt, first=0):
    tokens = KV.chunk_tokens
    return KV.prompt(range(first * tokens, (first + chunks) * tokens), salt=salt)


def wire(layout, number, chunks, salt="red"):
    return pack(layout.prompt(range(number * chunks, (number + 1) * chunks), salt=salt), 0, trusted=False)


async def is_served(blue, first):
    """Another tenant stores, finds and reads its own."""
    prompt = kv(16, "blue", first)
    async with blue.store(prompt) as writer:
        assert len(writer) == 16
        for chunk in writer:
            chunk.commit()
    request = blue.prefetch(prompt)
    assert (await request.load_done).chunks == 16
    await blue.end_request(request.request_id)


# L1: cases/server/c_hog.


async def test_one_cannot_reserve_what_others_need(tmp_path):
    with serve(tmp_path, reservation_ttl_seconds=1000) as served:
        async with connect(served.url, token=RED) as red, connect(served.url, token=BLUE) as blue:
            await fill(blue, kv(64, "blue"))
            async with red.store(kv(256, "red")) as writer:
                assert len(writer) == 128
                with pytest.raises(LimitError, match=r"^reserved_share: "):
                    await red.store(kv(256, "red", 1000))
                assert (await blue.lookup(kv(64, "blue"))).l1_chunks == 64
                await is_served(blue, 500)


async def test_one_cannot_read_what_others_need_beyond_its_time(tmp_path):
    with serve(tmp_path, l2=f"fs://{tmp_path}/kv", lease_ttl_seconds=0.5, result_ttl_seconds=0.5) as served:
        async with connect(served.url, token=RED) as red, connect(served.url, token=BLUE) as blue:
            await fill(blue, kv(64, "blue"))
            for first in (0, 64):
                await fill(red, kv(128, "red", 0)) if not first else None
            await red.flush()
            request = red.prefetch(kv(256, "red"))
            assert (await request.load_done).chunks <= 128
            async with red.read(request.request_id):
                for number in range(3):
                    await is_served(blue, 500 + 100 * number)
            async with connect(served.url) as watcher:
                await given_back(watcher)


# The server's memory: cases/server/d_memory.


def records(stack, served):
    """Prefetches of very many absent chunks, that nobody claims."""
    peer = stack.enter_context(Peer(served.urls[1], token=RED))
    peer.send(messages.RegisterLayout(peer.number(), 0, describe(ONE)))
    peer.answers(1)
    for number in range(6):
        peer.send(messages.Prefetch(peer.number(), wire(ONE, number, 131_072), f"r{number}"))
        answers = []
        while not any(isinstance(answer, messages.LoadDone | messages.Failed) for answer in answers):
            answers += peer.answers(1)
    assert isinstance(answers[-1], messages.Failed) and answers[-1].message.startswith("record_bytes: ")


def frames(stack, served):
    """All but the last byte of the largest frame, on many connections."""
    blob = (16 * MIB).to_bytes(4, "little") + bytes(16 * MIB - 1)
    for _ in range(20):
        peer = stack.enter_context(Peer(served.urls[1], token=RED))
        with suppress(OSError):
            peer.socket.sendall(blob)


def layouts(stack, served):
    """As many layouts of as many objects as there may be, on several connections."""
    for connection in range(2):
        peer = stack.enter_context(Peer(served.urls[1], token=RED))
        refused = 0
        for number in range(24):
            layout = ModelLayout(f"{connection}.{number}", TINY.groups, chunk_tokens=1)
            peer.send(messages.RegisterLayout(peer.number(), number, describe(layout)))
            refused += isinstance(peer.answers(1)[0], messages.Failed)
        assert refused


def answers(stack, served):
    """Questions with large answers, that it does not read."""
    for _ in range(20):
        peer = stack.enter_context(Peer(served.urls[1], token=RED))
        peer.send(messages.RegisterLayout(peer.number(), 0, describe(ONE)))
        peer.socket.setblocking(False)
        with suppress(OSError):
            for number in range(64):
                peer.send(messages.Explain(peer.number(), wire(ONE, number, 2000)))


def listings(stack, served):
    """Lists of all that it has, each of which is a thousand times as large as the question, that it does not read."""
    with BlockingClient(served.urls[1], token=RED) as red, red.store(ONE.prompt(range(4000), salt="red")) as writer:
        for chunk in writer:
            chunk.commit()
    peers = [stack.enter_context(Peer(served.urls[1], token=RED)) for _ in range(100)]
    for peer in peers:
        peer.send(*(messages.ListChunks(peer.number()) for _ in range(50)))
    with BlockingClient(served.urls[1], token=RED) as red:
        for _ in range(100):
            red.stats()


def kept_layouts(stack, served):
    """Layouts of very many objects, of each of which a chunk stays when the connection that knew it has gone."""
    refused, described = 0, describe(TINY)
    for connection in range(5):
        with Peer(served.urls[1], token=RED) as peer:
            for number in range(4):
                described.model = f"kept {connection}.{number}"
                peer.send(messages.RegisterLayout(peer.number(), number, described))
                if isinstance(peer.answers(1)[0], messages.Failed):
                    refused += 1
                    continue
                prompt = messages.TokenIds(number, "red", "", bytes(4))
                peer.send(messages.ReserveStore(store := peer.number(), prompt))
                (reserved,) = peer.answers(1)
                if not reserved.chunks:  # it is there still
                    continue
                peer.send(messages.StoreData(store, 0, 0, bytes(4096)), messages.CommitStore(peer.number(), store, 0))
                assert isinstance(peer.answers(1)[0], messages.Done)
    assert refused >= 20 - 16


@pytest.mark.parametrize(
    "attack", [records, frames, layouts, answers, listings, kept_layouts], ids=lambda attack: attack.__name__
)
async def test_what_one_makes_the_server_keep_is_bounded_and_used_anew(tmp_path, attack):
    with serve(tmp_path, l1="64MiB", l2=f"fs://{tmp_path}/kv", result_ttl_seconds=1000) as served:
        async with connect(served.url, token=BLUE) as blue, connect(served.url) as operator:
            await fill(blue, kv(16, "blue"))
            await operator.flush()
            before, descriptors = own_bytes(served), descriptors_beside_l2(served)
            peaks = []
            for number in range(3):
                with ExitStack() as stack:
                    await asyncio.to_thread(attack, stack, served)
                    await operator.flush()  # else what is on its way to the disk differs from one time to another
                    peaks.append(own_bytes(served))
                    await is_served(blue, 100 * (number + 1))

                async def are_given_back():
                    await blue.ping()
                    return descriptors_beside_l2(served) <= descriptors

                await wait_until(are_given_back)
            assert peaks[0] - before < 64 * MIB
            one_more = 16 * MIB if attack is frames else 0  # as many as are there just then
            assert peaks[-1] < peaks[0] + 8 * MIB + one_more, "what is left of one is used anew"


# Tiny objects: cases/server/n_tiny.


async def test_tiny_objects_of_one_do_not_hold_up_what_another_writes_and_loads(tmp_path):
    with serve(tmp_path, l1="64MiB", server_max_message_objects=2**18) as served:
        async with connect(served.url, token=RED) as red, connect(served.url, token=BLUE) as blue:
            async with red.store(TINY.prompt(range(64), salt="red")) as writer:
                for chunk in writer:
                    chunk.commit()
                    await asyncio.sleep(0)
            assert (await red.stats()).l1_used_bytes == 64 * 4096, "a page for each chunk, however little is in it"
            await fill(blue, kv(8, "blue"))
            assert await blue.flush() == (type(await blue.flush()))(8, 0, 0)
            async with connect(served.url) as operator:
                await operator.clear("l1")
            request, hog = blue.prefetch(kv(8, "blue")), red.prefetch(TINY.prompt(range(64), salt="red"))
            assert (await request.load_done).chunks == 8
            await hog.lookup_done


# The doors.


async def test_a_thousand_wrong_tokens_learn_nothing_and_hold_up_nobody(tmp_path):
    with serve(tmp_path, server_max_connections=256) as served:
        guesses = [f"{BLUE[:-1]}{n}" if n % 2 else f"guess-{n:_<20}" for n in range(1000)]
        async with connect(served.urls[1], token=BLUE) as blue, connect(served.url) as operator:
            await operator.ping()
            before = served.descriptors()
            outcomes = []
            for begin in range(0, 1000, 100):
                some = [
                    connect(served.urls[1], token=g, connect_timeout_seconds=0.01) for g in guesses[begin : begin + 100]
                ]
                outcomes += await asyncio.gather(*(one.open() for one in some), return_exceptions=True)
                await blue.ping()
            assert all(isinstance(outcome, Exception) for outcome in outcomes)
            assert {str(outcome) for outcome in outcomes if isinstance(outcome, AccessDeniedError)} <= {
                "the server does not know this token"
            }

            async def are_closed():
                await operator.ping()
                return served.descriptors() <= before

            await wait_until(are_closed, 30)
        assert served.says("is refused")
        lines = [line for line in served.log.splitlines() if "is refused" in line]
        assert 0 < len(lines) <= 100 and not any(guess in served.log for guess in guesses)


# The end.


def pipeline(kind):
    def send(stack, served):
        peer = stack.enter_context(Peer(served.urls[1], token=RED))
        peer.send(messages.RegisterLayout(peer.number(), 0, describe(TINY)))
        peer.answers(1)
        made = [kind(peer.number(), wire(TINY, number, 64)) for number in range(128)]
        peer.socket.sendall(b"".join(frame(encode(message)) for message in made))

    return send


ENDS = {
    "lookups": pipeline(messages.Lookup),
    "prefetches": pipeline(lambda number, prompt: messages.Prefetch(number, prompt, f"r{number}")),
    "deletions": pipeline(messages.Delete),
    "stores": pipeline(messages.ReserveStore),
    "frames": frames,
    "answers": answers,
}


@pytest.mark.parametrize("attack", ENDS)
def test_a_server_ends_in_five_seconds_under_any_of_it(tmp_path, attack):
    with serve(tmp_path, l2=f"fs://{tmp_path}/kv") as served, ExitStack() as stack:
        ENDS[attack](stack, served)
        began = time.monotonic()
        assert served.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < 5


# Valid messages of extreme sizes and orders.


class Wild:
    """A tenant that sends valid messages of any kind and size in any order, many at a time, and seldom reads."""

    LAYOUTS = (ONE, TINY, WINDOWS, KV)
    SECONDS = (None, 0.0, 1e-9, 0.1, 1e6)
    VALUES: ClassVar = {
        "skip_tokens": (0, 0, 2**32),
        "ranks": (None, None, [0], [2**31]),
        "deadline_seconds": SECONDS,
        "within_seconds": SECONDS,
        "wait_for_writers_seconds": SECONDS[1:],
        "ttl_seconds": SECONDS[1:],
        "traceparent": (None, f"00-{'a' * 32}-{'b' * 16}-01"),
        "tokens": (None, 0, 1, 2**32),
        "output_tokens": (None, 0, 2**32),
        "returns": (None, True, False),
        "model": ("one", "kv", "none"),
        "revision": (None, ""),
        "adapter": (None, ""),
        "salt": (None, "red"),
        "rank": (0, 0, 1, 2**31),
        "reader": (0, 0, 1, 2**31),
        "start_chunk": (0, 0, 1, 2**31),
        "position": (0, 1, 2**31),
        "offset": (0, 0, 2**31),
        "layout": (0, 1, 4, 5, 2**31),
        "tier": ("l1", "all"),
        "capacity": (1, 65_536),
        "url": ("memory://", "fs:///none"),
        "name": ("memory", ""),
        "backend": (None, "memory"),
        "after": (None, bytes(32)),
        "limit": (1, 1000),
    }

    def __init__(self, url, seed):
        self.url, self.chance = url, random.Random(seed)
        self.sent = 0

    def run(self, until):
        while time.monotonic() < until:
            with suppress(OSError), Peer(self.url, token=RED) as peer:
                self._connection(peer, until)

    def _connection(self, peer, until):
        peer.socket.settimeout(0.5)
        for number, layout in enumerate(self.LAYOUTS):
            peer.send(messages.RegisterLayout(peer.number(), number, describe(layout)))
        frames, numbers = FrameReader(), [1]
        for _ in range(self.chance.randrange(1, 40)):
            if time.monotonic() > until:
                return
            data = b"".join(
                frame(encode(self._message(peer, numbers))) for _ in range(self.chance.choice((1, 1, 4, 32)))
            )
            cut = self.chance.randrange(len(data)) if self.chance.random() < 0.02 else len(data)
            peer.socket.sendall(data[:cut])
            if cut < len(data):
                return
            if self.chance.random() < 0.7:
                with suppress(TimeoutError):
                    for payload in frames.feed(peer.socket.recv(2**18)):
                        _answers.decode(bytes(payload))

    def _message(self, peer, numbers):
        """Any request of the protocol, with what each of its fields may be: one that nobody thought of is an error."""
        self.sent += 1
        kind, n = self.chance.choice(get_args(messages.Request)), peer.number()
        numbers.append(n)
        message = kind(**{name: self._value(name, n, numbers) for name in kind.__struct_fields__})
        if kind is messages.CommitStore and self.chance.random() < 0.8:
            message.offset = None
        return message

    def _value(self, name, n, numbers):
        chance = self.chance
        match name:
            case "number":
                return n
            case "call" | "read" | "store":
                return chance.choice(numbers[-50:])
            case "request_id":
                return f"r{chance.randrange(50)}"
            case "prompt":
                return self._prompt(chance.choice(("few", "most")))
            case "prompts":
                alike = [self._prompt("few"), self._prompt("few")]
                return chance.choice((alike, alike[:1] * chance.choice((1, 2, 256)), [self._prompt("most")]))
            case "description":
                return describe(chance.choice(self.LAYOUTS))
            case "data":
                return bytes(chance.choice((1, 64, 4096)))
            case _:
                return chance.choice(self.VALUES[name])

    def _prompt(self, size):
        chance = self.chance
        layout = chance.randrange(len(self.LAYOUTS))
        objects, chunk_tokens = len(self.LAYOUTS[layout].groups), self.LAYOUTS[layout].chunk_tokens
        most = min(131_072, 2**18 // objects)
        large = (most // 64, most - 1, most, most + 1 if chance.random() < 0.2 else 1)
        chunks = chance.choice((0, 1, 2) if size == "few" else large)
        first = chance.choice((0, 0, 1, chance.randrange(2**20)))
        ids = (
            b"".join((first + n).to_bytes(4, "little") for n in range(chunks * chunk_tokens))
            if chunks < 4096 or chance.random() < 0.1
            else bytes(4 * chunks)
        )
        adapter = chance.choice(("", "", "a" * 128))
        if chance.random() < 0.2:
            return messages.SegmentIds(layout, "red", adapter, ids, chance.choice((b"", bytes(4), bytes(4 * 4096))))
        return messages.TokenIds(layout, "red", adapter, ids)


@pytest.mark.parametrize("l2", ["memory://?capacity=16MiB", "fs"])
async def test_a_healthy_client_sees_no_error_beside_valid_messages_of_any_size_and_order(tmp_path, l2):
    seconds = max(4.0, SOAK_SECONDS)
    l2 = l2 if l2 != "fs" else f"fs://{tmp_path}/kv?capacity=1GiB"
    with serve(tmp_path, l1="64MiB", l2=l2, server_max_message_objects=2**18) as served:
        before = own_bytes(served)
        until = time.monotonic() + seconds
        wild = [Wild(served.urls[1], seed) for seed in range(rounds(2, 4))]
        running = [asyncio.create_task(asyncio.to_thread(one.run, until)) for one in wild]
        served_times = 0
        async with connect(served.url, token=BLUE) as blue:
            while time.monotonic() < until:
                await is_served(blue, 1000 * served_times)
                served_times += 1
            await asyncio.gather(*running)
            assert served_times > 3 and all(one.sent > 20 for one in wild)
            assert own_bytes(served) - before < 64 * MIB * 2

            async def is_over():
                await blue.ping()
                return (await blue.stats()).requests == 0

            await wait_until(is_over)
        async with connect(served.url) as operator:
            await given_back(operator, seconds=30)
            assert (await operator.stats()).hold is not None
        assert served.stop() == 0
