"""The protocol, and a server that says what it should not: every split of the bytes, and nonsense."""

import asyncio
import random
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from xxhash import xxh3_64_intdigest

from async_cache.errors import BackendError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.record import TRAILER_BYTES, write_trailer
from async_cache.l2.urls.registry import from_url
from async_cache.l2.valkey.items import Item
from async_cache.l2.valkey.names import Names, slot_of
from async_cache.l2.valkey.replies import Lines, Redirect, Tree, command, parse_redirect
from async_cache.l2.valkey.usage import Usage
from async_cache.l2.valkey.values import Values
from async_cache.l2.valkey.wire import Reader, Wire
from async_cache.prompt.keys import ObjectKey
from async_cache.testing.conformance import content, key
from async_cache.values import BackendUsage

LOADED, GONE, CORRUPT, FAILED = LoadOutcome


def feed(reader: Reader, data: bytes, sizes: list[int]) -> None:
    """Hand bytes to a reader in pieces of these sizes, and then the rest, as an event loop would."""
    view = memoryview(data)
    for size in [*sizes, len(data)]:
        piece = view[:size]
        view = view[size:]
        while piece:
            into = reader.buffer()
            count = min(len(into), len(piece))
            into[:count] = piece[:count]
            reader.received(count)
            piece = piece[count:]


def record(n: int, size: int, of: int | None = None) -> bytes:
    """The reply to a GET of object `n`; its trailer may be that of another."""
    body = content(n, size)
    trailer = bytearray(TRAILER_BYTES)
    write_trailer(trailer, key(n if of is None else of), size, xxh3_64_intdigest(body))
    return b"$%d\r\n%b\r\n" % (size + TRAILER_BYTES, body + trailer)


class Silent(Wire):
    """A connection that sends nowhere."""

    def send(self, parts: object) -> None:
        pass


def values(sizes: list[int]) -> tuple[Values, list[Item]]:
    items = [Item(key(n), b"x", memoryview(bytearray(size))) for n, size in enumerate(sizes)]
    reader = Values(Silent("a test"), iter(items), asking=False)
    reader._ask()
    return reader, items


async def test_values_are_read_wherever_their_bytes_are_split() -> None:
    sizes = [1, 100, 0, 5000, 40_000, 20, 7]
    replies = [record(0, 1), b"$-1\r\n", record(2, 0), record(3, 5000), record(4, 40_000), b"-ERR no\r\n", record(6, 8)]
    stream = b"".join(replies)
    expected = [LOADED, GONE, LOADED, LOADED, LOADED, FAILED, CORRUPT]
    splits = [[at] for at in range(700)] + [[1] * 600, [2] * 600, [len(stream) - 1]]
    rng = random.Random(1)
    splits += [[rng.choice((1, 3, 70, 2000, 17_000)) for _ in range(60)] for _ in range(100)]
    for split in splits:
        reader, items = values(sizes)
        feed(reader, stream, split)
        assert reader.done.done(), split[:5]
        assert [item.outcome for item in items] == expected, split[:5]
        for n in (0, 3, 4):
            assert items[n].buffer == content(n, sizes[n])


async def test_an_object_that_answers_for_another_is_corrupt() -> None:
    reader, items = values([500, 500])
    feed(reader, record(0, 500, of=1) + record(1, 500), [])
    assert [item.outcome for item in items] == [CORRUPT, LOADED]


@pytest.mark.parametrize(
    "nonsense",
    [b"+OK\r\n", b":5\r\n", b"$x\r\n", b"*1\r\n", b"\r\n", b"HTTP/1.1 400 Bad Request\r\n", b"x" * 20_000, b"$\r\n"],
)
async def test_nonsense_in_place_of_a_value_ends_the_connection(nonsense: bytes) -> None:
    reader, items = values([500])
    with pytest.raises(BackendError):
        feed(reader, nonsense, [])
    assert items[0].outcome is None


async def test_a_value_without_its_end_or_after_the_last_one_ends_the_connection() -> None:
    reader, _ = values([500])
    with pytest.raises(BackendError, match="no end"):
        feed(reader, record(0, 500)[:-2] + b"xx", [])
    reader, _ = values([500])
    with pytest.raises(BackendError, match="more than it was asked"):
        feed(reader, record(0, 500) * 2, [])


async def test_lines_and_trees_wherever_they_are_split() -> None:
    lines = b":1\r\n+OK\r\n-ERR x\r\n$-1\r\n"
    tree = b"*4\r\n$3\r\na\r\n\r\n:12\r\n*2\r\n$-1\r\n+x\r\n*0\r\n"
    for at in range(len(lines)):
        of_lines = Lines(4)
        feed(of_lines, lines, [at])
        assert of_lines.lines == [b":1", b"+OK", b"-ERR x", b"$-1"]
    for at in range(len(tree)):
        of_tree = Tree()
        feed(of_tree, tree, [at])
        assert of_tree.reply == [b"a\r\n", 12, [None, b"x"], []]
    for bad in (b"!1\r\n", b"*x\r\n", b"+1\r\n+2\r\n", b"-ERR no\r\n"):
        with pytest.raises(BackendError):
            feed(Tree(), bad, [])
    with pytest.raises(BackendError):
        feed(Lines(1), b":1\r\n:2\r\n", [])


@pytest.mark.parametrize(
    "nonsense", [b"*1\r\n" * 5000, b"*9\r\n" * 20, b"+" + b"x" * 70_000, b":" + b"9" * 5000 + b"\r\n"]
)
async def test_a_tree_without_an_end_is_refused(nonsense: bytes) -> None:
    with pytest.raises(BackendError):
        feed(Tree(), nonsense, [])


async def test_what_is_parsed_of_a_tree_is_not_parsed_again_with_each_piece() -> None:
    tree, begin = Tree(), time.thread_time()
    feed(tree, b"*400000\r\n" + b"$1\r\nx\r\n" * 400_000, [])
    assert tree.reply == [b"x"] * 400_000
    assert time.thread_time() - begin < 10  # again with each piece, it was a minute


async def test_a_line_without_an_end_is_refused_before_it_is_long() -> None:
    lines = Lines(1)
    with pytest.raises(BackendError, match="more than it was asked"):
        feed(lines, b"+" + b"x" * 100_000, [])


@pytest.mark.parametrize(
    "entry", [b"*0\r\n", b"*2\r\n:0\r\n:5\r\n"] + [
        b"*3\r\n:%d\r\n:%d\r\n*2\r\n$1\r\nh\r\n:%d\r\n" % numbers
        for numbers in [(0, 10**8, 6379), (-1, 5, 6379), (0, 5, 0), (0, 5, 70_000), (7, 6, 6379)]
    ],
)  # fmt: skip
async def test_a_map_that_is_none_is_a_fault_and_costs_nothing(liar: "Liar", entry: bytes) -> None:
    liar.answer = b"*1\r\n" + entry
    backend = from_url(f"valkey+cluster://127.0.0.1:{liar.port}")
    await backend.open()
    with pytest.raises(BackendError, match=r"map of the cluster|expected"):
        await backend.lookup([key(1)])
    await backend.close()


@pytest.mark.parametrize("host", ["two..dots", "x" * 70])
async def test_a_name_that_is_none_of_a_host_is_a_server_that_is_not_there(host: str) -> None:
    backend = from_url(f"valkey://{host}")
    await backend.open()
    with pytest.raises(BackendError, match=host):
        await backend.lookup([key(1)])
    await backend.close()


def test_commands_and_redirections() -> None:
    assert command("SET", b"\x00\r\n", 12) == b"*3\r\n$3\r\nSET\r\n$3\r\n\x00\r\n\r\n$2\r\n12\r\n"
    assert parse_redirect(b"-MOVED 3999 127.0.0.1:6381") == Redirect(3999, "127.0.0.1", 6381, True)
    assert parse_redirect(b"-ASK 1 [::1]:7") == Redirect(1, "::1", 7, False)
    assert parse_redirect(b"-MOVED 5 :7") == Redirect(5, "", 7, True)
    for other in (
        b"-ERR MOVED",
        b"-MOVED",
        b"-MOVED x y:z",
        b"-MOVED 1 host",
        b"+OK",
        b"-MOVED 1 /tmp/s:0",
        b"-ASK 1 h:70000",
    ):
        assert parse_redirect(other) is None


def test_names_and_slots() -> None:
    one = ObjectKey(bytes(range(32)), 7, 12)
    names = Names("a.b:c")
    assert names.of(one) == b"a.b:c:{%b}.7.12" % bytes(range(32)).hex().encode()
    assert names.parse(names.of(one)) == one
    assert Names("akv").parse(names.of(one)) is None
    assert names.parse(names.of(one._replace(rank=2**32 - 1, group=2**32 - 1))) is not None
    assert names.parse(names.of(one._replace(rank=2**32))) is None, "no record can have it"
    foo = ObjectKey(b"", 0, 0)
    assert slot_of(foo) == 0
    assert slot_of(one) == slot_of(one._replace(rank=1, group=9))


def test_usage_during_a_count() -> None:
    usage, (a, b, c, d) = Usage(), (key(n) for n in range(4))
    usage.stored(a, 10)
    usage.stored(b, 10)
    usage.begin_count()
    usage.see(a, 10)
    usage.stored(c, 5)
    usage.see(c, 5)  # it may be seen, or not
    usage.removed(b, 10)
    usage.see(b, 10)  # as it was
    usage.see(d, 100)  # of another host
    assert usage.now() == BackendUsage(2, 15)
    usage.end_count(complete=True)
    assert usage.now() == BackendUsage(3, 115)
    usage.begin_count()
    usage.end_count(complete=False)
    assert usage.now() == BackendUsage(3, 115)


@pytest_asyncio.fixture
async def liar() -> AsyncIterator["Liar"]:
    liar = Liar()
    await liar.open()
    yield liar
    liar.close()


class Liar:
    """A server that answers a greeting, and anything else with `answer`."""

    answer = b""

    async def open(self) -> None:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1")
        self.port = self.server.sockets[0].getsockname()[1]

    def close(self) -> None:
        self.server.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(100_000):
                writer.write(b"+PONG\r\n" if data.endswith(b"PING\r\n") else self.answer)
        except OSError:
            pass
        finally:
            writer.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"+OK\r\n",
        b"*0\r\n",
        b"\x00" * 5000,
        b":1\r\n" * 50,
        b"$5\r\nhello\r\n",
        b"-\r\n",
        b"$99999999999\r\n",
        b":x\r\n:1\r\n",
    ],
)
async def test_a_server_of_another_kind_is_a_fault_and_no_hit(liar: Liar, answer: bytes) -> None:
    liar.answer = answer
    backend = from_url(f"valkey://127.0.0.1:{liar.port}")
    await backend.open()
    for call in (lambda: backend.load([key(1)], [memoryview(bytearray(5000))]), lambda: backend.lookup([key(1)] * 2)):
        try:
            told = await asyncio.wait_for(call(), 0.5)
        except (BackendError, TimeoutError):
            continue
        assert told in ([CORRUPT], [False, False])
    await backend.close()


class Gone(asyncio.Transport):
    """What was a socket."""

    def abort(self) -> None:
        pass


async def test_a_reply_in_the_turn_in_which_its_caller_is_cancelled_is_nobodys() -> None:
    wire = Silent("a test")
    wire._transport = Gone()
    asking = asyncio.create_task(wire.ask(b"", 1))
    await asyncio.sleep(0)
    wire.get_buffer(5)[:5] = b"+OK\r\n"
    asking.cancel()
    wire.buffer_updated(5)
    await asyncio.wait([asking])
    assert asking.cancelled() and not wire.is_open
