"""What a peer may send once it is known: each answer is a typed error, and nobody sees what is not theirs."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from async_cache import BlockingClient, ModelLayout, ObjectGroup
from async_cache.protocol import messages as m
from async_cache.protocol.frames import DATA_BYTES
from async_cache.protocol.messages import VERSION

from .peer import HELLO, L1_BYTES, Peer, Served, codes, memory, serving

TOKENS = """
[server.tenants.bound]
tokens = ["a token of bound"]
salts = ["mine"]
[server.tenants.other]
tokens = ["a token of other"]
salts = ["theirs"]
"""
BLOCK_BYTES = 9 * 2**20  # so much is copied by a thread
SEGMENT_BYTES = BLOCK_BYTES + 4096
SMALL = m.Layout("m", [m.Group([64], "uint8")], 4, 1, 1, "")
BIG = m.Layout("big", [m.Group([BLOCK_BYTES], "uint8")], 4, 1, 1, "")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(config=TOKENS) as served:
        yield served
        assert served.faults() == []


@pytest.fixture(scope="module")
def segment() -> Iterator[int]:
    descriptor = memory(SEGMENT_BYTES)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def peer(server: Served, segment: int) -> Iterator[Peer]:
    with Peer(server.path, HELLO, segment) as peer:
        yield peer
        peer.end()


def digests(layout: int, *chunks: int, chunk_tokens: int = 4) -> m.Digests:
    hashes = b"".join(chunk.to_bytes(32, "big") for chunk in chunks)
    return m.Digests(layout, bytes(32), len(chunks) * chunk_tokens, "", hashes)


def fresh() -> m.Digests:
    """A prompt of one small chunk that nobody has stored."""
    return digests(0, int.from_bytes(os.urandom(16), "big"))


def test_bytes_for_a_position_that_a_store_has_not_are_an_error_of_their_sender(peer: Peer) -> None:
    peer.send(m.RegisterLayout(1, 0, SMALL), m.ReserveStore(2, fresh()))
    assert peer.until(2)[-1].chunks == [0]
    answers = peer.ask(m.StoreData(2, 7, 0, memoryview(b"x")))
    assert peer.closed and codes(answers) == [(0, "protocol")]


def test_a_bad_message_behind_a_commit_closes_the_connection(server: Served, peer: Peer) -> None:
    peer.send(m.RegisterLayout(1, 0, BIG), m.ReserveStore(2, fresh()))
    peer.until(2)
    bad = m.StoreData(2, 0, BLOCK_BYTES, memoryview(b"x"))
    peer.send(m.CommitStore(3, 2, 0, 0), bad, m.Stats(4))
    answers = peer.until(4)
    assert peer.closed and codes(answers) == [(0, "protocol")]


@pytest.mark.parametrize("layout", [SMALL, BIG], ids=["small", "big"])
@pytest.mark.parametrize("offset", [SEGMENT_BYTES - 1, SEGMENT_BYTES, 2**40, 2**63 - 4096, 2**63 - 1])
def test_a_commit_beyond_the_segment_is_an_error_of_its_sender(peer: Peer, layout: m.Layout, offset: int) -> None:
    peer.send(m.RegisterLayout(1, 0, layout), m.ReserveStore(2, fresh()))
    peer.until(2)
    peer.send(m.CommitStore(3, 2, 0, offset))
    assert codes(peer.until(3)) == [(3, "value")]


@pytest.mark.parametrize("odd", ["huge pages", "a file", "a directory", "a pipe"])
def test_a_segment_that_is_no_memory_is_refused_with_the_hello(server: Served, odd: str) -> None:
    with ExitStack() as stack, Peer(server.path) as peer:
        segment = odd_segment(odd)
        stack.callback(os.close, segment)
        refused = peer.greet(HELLO, segment)
        assert isinstance(refused, m.Failed) and (refused.number, refused.code) == (0, "protocol")
        assert peer.arena is None


@pytest.mark.parametrize("odd", ["write-only", "not sealed", "empty"])
def test_a_segment_that_is_no_readable_memory_is_an_error_of_its_sender(server: Served, odd: str) -> None:
    with ExitStack() as stack, Peer(server.path) as peer:
        segment = odd_segment(odd)
        stack.callback(os.close, segment)
        peer.greet(HELLO, segment)
        peer.send(m.RegisterLayout(1, 0, SMALL), m.ReserveStore(2, fresh()))
        peer.until(2)
        peer.send(m.CommitStore(3, 2, 0, 0))
        peer.until(3)
        assert [code for _, code in codes(peer.answers)] == ["value"]
        peer.end()


def odd_segment(odd: str) -> int:
    if odd == "write-only":
        made = memory(4096)
        segment = os.open(f"/proc/self/fd/{made}", os.O_WRONLY)
        os.close(made)
        return segment
    if odd == "not sealed":
        segment = os.memfd_create("segment", os.MFD_ALLOW_SEALING)
        os.ftruncate(segment, 4096)
        return segment
    if odd == "empty":
        return memory(0)
    if odd == "huge pages":
        return os.memfd_create("segment", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING)
    if odd == "a file":
        with tempfile.TemporaryFile() as file:
            file.write(bytes(4096))
            return os.dup(file.fileno())
    if odd == "a directory":
        return os.open("/", os.O_RDONLY)
    first, second = os.pipe()
    os.close(second)
    return first


@pytest.mark.parametrize("groups", [1, 1024, 1025, 4096])
def test_a_chunk_of_any_number_of_groups_can_be_stored_from_the_segment(peer: Peer, groups: int) -> None:
    layout = m.Layout("many", [m.Group([8], "uint8")] * groups, 4, 1, 1, "")
    peer.send(m.RegisterLayout(1, 0, layout), m.ReserveStore(2, fresh()))
    peer.until(2)
    peer.send(m.CommitStore(3, 2, 0, 0))
    assert codes(peer.until(3)) == []


def test_a_lookup_of_chunks_that_are_stored_with_a_layout_that_is_absurd_has_a_typed_answer(peer: Peer) -> None:
    prompt = fresh()
    peer.send(m.RegisterLayout(1, 0, SMALL), m.ReserveStore(2, prompt))
    peer.until(2)
    peer.send(m.CommitStore(3, 2, 0, 0), m.CloseStore(4, 2), m.Flush(5))
    assert peer.until(5)[-1].result.written
    peer.send(m.Clear(6, "l1"))
    assert peer.until(6)[-1].deleted.chunks
    absurd = m.Layout("m", [m.Group([2**47] * 32, "uint8")], 4, 1, 1, "")
    known = m.Digests(9, prompt.root, prompt.tokens, "", prompt.chunk_hashes)
    peer.send(m.RegisterLayout(7, 9, absurd), m.Lookup(8, known))
    assert "internal" not in [code for _, code in codes(peer.until(8))]
    # what it reads with its own layout measures the backend's speed, by which what an absurd one takes is reckoned
    peer.send(m.Prefetch(10, prompt, "r"))
    peer.send(m.QueryPrefetchStatus(11, "r"), m.EndRequest(12, "r"))
    peer.until(11)
    peer.send(m.Clear(13, "l1"))
    peer.until(13)
    peer.send(m.Lookup(14, known), m.Prefetch(15, known, "s"), m.QueryPrefetchStatus(16, "s"))
    assert "internal" not in [code for _, code in codes(peer.until(16))]
    peer.send(m.Delete(17, prompt))
    peer.until(17)


def test_a_small_message_that_means_millions_of_objects_holds_up_nobody(server: Served) -> None:
    layout = m.Layout("wide", [m.Group([1], "uint8")] * 4096, 4, 1, 1, "")
    with Peer(server.path, HELLO) as peer, Peer(server.path, HELLO) as other:
        began = server.busy_seconds()
        peer.send(m.RegisterLayout(1, 0, layout), m.Lookup(2, digests(0, *range(1024))), m.Ping(3))
        other.ask()
        peer.until(3)
        assert server.busy_seconds() - began < 2
        peer.end()


SECRET = b"the KV of others"
HALF = DATA_BYTES // 2
WIDE = m.Layout("wide", [m.Group([DATA_BYTES], "uint8")], 1, 1, 1, "")


@pytest.mark.parametrize("sent", [(), (0,), (HALF,), (0, 0)], ids=["nothing", "head", "tail", "head twice"])
def test_a_tenant_never_reads_what_was_in_the_memory_before(server: Served, sent: tuple[int, ...]) -> None:
    with Peer(server.path, m.Hello(VERSION, "a token of other")) as other:
        ids = b"".join(n.to_bytes(4, "little") for n in range(L1_BYTES // DATA_BYTES))
        prompt = m.TokenIds(0, "theirs", "", ids)
        other.send(m.RegisterLayout(1, 0, WIDE), m.ReserveStore(2, prompt))
        for position in range(len(other.until(2)[-1].chunks)):
            data = memoryview(SECRET * (DATA_BYTES // len(SECRET)))
            other.send(m.StoreData(2, position, 0, data), m.CommitStore(10 + position, 2, position))
        other.send(m.CloseStore(3, 2), m.Delete(4, prompt))
        other.until(4)
        other.end()
    with Peer(server.path, m.Hello(VERSION, "a token of bound")) as bound:
        prompt = m.TokenIds(0, "mine", "", bytes(4))
        bound.send(m.RegisterLayout(1, 0, WIDE), m.ReserveStore(2, prompt))
        assert bound.until(2)[-1].chunks == [0]
        bound.send(*[m.StoreData(2, 0, begin, memoryview(bytes(HALF))) for begin in sent])
        bound.send(m.CommitStore(3, 2, 0), m.Prefetch(4, prompt, "r"), m.AcquireRead(5, "r"))
        bound.until(5)
        bound.ask(m.Delete(6, prompt))
        seen = b"".join(bytes(answer.data) for answer in bound.answers if isinstance(answer, m.ReadData))
        bound.end()
    assert SECRET not in seen


def tiny(**changes: Any) -> ModelLayout:
    return ModelLayout("shared", (ObjectGroup((64,), "uint8"),), **{"chunk_tokens": 4, "world_size": 2} | changes)


@pytest.mark.parametrize("change", ["readers", "ranks"])
def test_layouts_that_have_the_same_hashes_have_the_same_chunks(server: Served, change: str) -> None:
    one = tiny(chunk_tokens=8)
    if change == "readers":
        other = tiny(chunk_tokens=8, readers_per_rank=2)
    else:
        other = ModelLayout("shared", (ObjectGroup((64,), "uint8", ranks=(1, 0)),), chunk_tokens=8, world_size=2)
    tokens = list(range(8))
    assert one.prompt(tokens).chunk_hashes == other.prompt(tokens).chunk_hashes
    with BlockingClient(server.url) as cache:
        for rank, layout in enumerate((one, other)):
            with cache.store(layout.prompt(tokens), rank=rank) as writer:
                for chunk in writer:
                    chunk.commit()
        for layout in (one, other):
            assert cache.lookup(layout.prompt(tokens)).chunks == 1
        cache.delete(one.prompt(tokens))
