"""One tenant asks for as much as a few valid kilobytes can ask for: another's messages do not wait for it.

What is counted is how much of the one's was answered before the other's were: on a busy machine time says nothing.
"""

import pytest
from contract.support import make_layout

from async_cache import ObjectGroup
from async_cache.prompt.layout import ModelLayout
from async_cache.protocol import messages
from async_cache.protocol.frames import FrameReader, frame
from async_cache.protocol.messages import Decoder, encode
from async_cache.protocol.prompts import pack

from .programs import server
from .support import Peer

RED, BLUE = (f"token-of-{name:_<16}" for name in ("red", "blue"))
CONFIG = f"""
[server.tenants.red]
tokens = ["{RED}"]
salts = ["red"]

[server.tenants.blue]
tokens = ["{BLUE}"]
salts = ["blue"]
"""
MESSAGES, PINGS = 64, 20
OBJECTS = 2**18
BIG = ModelLayout("big", tuple(ObjectGroup((1,), "uint8") for _ in range(4096)), chunk_tokens=1)
WINDOWS = ModelLayout(
    "windows", tuple(ObjectGroup((1,), "uint8", window_chunks=n + 1) for n in range(4096)), chunk_tokens=1
)
SMALL = make_layout(ObjectGroup((64,), "uint8"))


@pytest.fixture(scope="module", params=["memory://", "fs"])
def served(tmp_path_factory, request):
    directory = tmp_path_factory.mktemp("freezing")
    (directory / "c.toml").write_text(CONFIG)
    l2 = request.param if request.param != "fs" else f"fs://{directory}/l2"
    with server(directory, l2=[l2], config=directory / "c.toml", server_max_message_objects=OBJECTS) as served:
        yield served


def prompt(layout, number):
    chunks = OBJECTS // len(layout.groups)
    return pack(layout.prompt(range(number * chunks, (number + 1) * chunks), salt="red"), 0, trusted=False)


ATTACKS = {
    "lookups": lambda n, wire: messages.Lookup(n, wire),
    "prefetches": lambda n, wire: messages.Prefetch(n, wire, f"r{n}"),
    "deletions": lambda n, wire: messages.Delete(n, wire),
}


@pytest.mark.parametrize("layout", [BIG, WINDOWS], ids=lambda layout: layout.model)
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_one_tenant_asks_in_one_piece_does_not_hold_up_another(served, attack, layout):
    with Peer(served.url, token=RED) as red, Peer(served.url, token=BLUE) as blue:
        red.register(layout)
        red.answers(1)
        blue.register(SMALL)
        blue.answers(1)
        asked = [ATTACKS[attack](n + 10, prompt(layout, n)) for n in range(MESSAGES)]
        red.socket.sendall(b"".join(frame(encode(message)) for message in asked))
        for n in range(PINGS):
            wire = pack(SMALL.prompt(range(16 * SMALL.chunk_tokens), salt="blue"), 0, trusted=False)
            blue.send(messages.Ping(blue.number()))
            assert type(blue.answers(1)[0]) is messages.Done
            blue.send(messages.Prefetch(blue.number(), wire, f"b{n}"))
            assert [type(answer) for answer in blue.answers(2)] == [messages.LookupDone, messages.LoadDone]
            blue.send(messages.EndRequest(blue.number(), f"b{n}"))
            blue.answers(2)
        answered = {answer.number for answer in received(red.socket)}
        assert len(answered) < MESSAGES // 2, "the other waited for most of it"


def received(sock):
    """All that has come until now."""
    sock.setblocking(False)
    frames, decoder = FrameReader(), Decoder(messages.Answer)
    try:
        while data := sock.recv(2**20):
            yield from [decoder.decode(bytes(payload)) for payload in frames.feed(data)]
    except BlockingIOError:
        return


def test_a_layout_that_takes_long_to_read_is_refused_before_it_is_read(served):
    group = ["Group", [1], "uint8", None, [0] * 4096]
    payload = messages.encode(["RegisterLayout", 1, 0, ["Layout", "x", [group] * 4000, 1, 1, 1, ""]])
    with Peer(served.url, token=RED) as red:
        red.socket.sendall(frame(payload))
        (refused,) = red.answers(1)
        assert refused.code == "protocol" and "262144 bytes" in refused.message


def test_more_objects_than_a_message_may_have_are_refused_before_anything_is_made_of_them(served):
    with Peer(served.url, token=RED) as red:
        red.register(BIG)
        red.answers(1)
        wire = messages.EngineDigests(0, "red", "", [b"12345678"] * 65)
        red.send(messages.Lookup(5, wire))
        (refused,) = red.answers(1)
        assert refused.code == "limit", "they are there twice, too, which only shows when they are looked at"
