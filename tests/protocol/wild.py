"""Frames that no client would send: well-formed messages of wild values, and mutations of their bytes."""

import random
import types
import typing
from collections.abc import Callable
from itertools import count
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from async_cache.protocol import messages as m
from async_cache.protocol.frames import MAX_PAYLOAD_BYTES, frame
from async_cache.protocol.messages import encode

SEGMENT_BYTES = 10 * 2**20
THREADED_BYTES = 9 * 2**20  # what a commit of it copies is copied by a thread
LAYOUTS = [
    m.Layout("plain", [m.Group([64], "uint8")], 4, 1, 1, ""),
    m.Layout("ranks", [m.Group([5000], "uint8"), m.Group([16, 3], "bfloat16", 2, [1])], 4, 2, 2, ""),
    m.Layout("big", [m.Group([THREADED_BYTES], "uint8")], 4, 1, 1, "r"),
    m.Layout("plain", [m.Group([2**20, 2**10], "float64")], 4, 1, 1, ""),  # more than there is memory
    m.Layout("empty rank", [m.Group([8], "int8", ranks=[0])], 4, 2, 1, ""),
    m.Layout("many", [m.Group([1], "uint8", 1 + n % 3) for n in range(1030)], 4, 1, 1, ""),
]
REQUESTS = list(typing.get_args(m.Request))
PROMPTS = list(typing.get_args(m.WirePrompt))
_POOL = [bytes([n]) * 32 for n in range(24)]
_TEXTS = [
    f"00-{'a' * 32}-{'b' * 16}-01",
    "x" * 55,
    "",
    "r",
    "s",
    "t",
    "\0",
    "a\nb",
    "é" * 64,
    "é" * 128,
    "x" * 256,
    "x" * 1024,
    "\U0010ffff",
    "l1",
    "all",
    "bfloat16",
]


class Wild:
    """Makes messages by their types, from a seed; what it has made before comes back in what it makes next."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self._numbers = count(1000)
        self.used: list[int] = [1]

    def value(self, kind: Any) -> Any:
        """A value of a type, within its bounds."""
        rng = self.rng
        if kind is m.Number:
            return self.number()
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is Annotated:
            return self.bounded(arguments[0], next(a for a in arguments[1:] if isinstance(a, Meta)))
        if origin is Literal:
            return rng.choice(arguments)
        if origin in (typing.Union, types.UnionType):
            return self.value(rng.choice(arguments))
        if origin is list:
            return [self.value(arguments[0]) for _ in range(rng.choice((0, 1, 2, 5)))]
        if origin is tuple:
            return tuple(map(self.value, arguments))
        if kind in (bytes, memoryview):
            return rng.choice(
                (b"", b"x", rng.randbytes(rng.randrange(100)), bytes(4 * rng.randrange(9)), rng.choice(_POOL))
            )
        if kind is bool:
            return rng.random() < 0.5
        return None if kind is types.NoneType else self.message(kind)

    def bounded(self, base: Any, meta: Meta) -> Any:
        """A value within bounds: mostly small, sometimes at an end, sometimes anywhere."""
        rng = self.rng
        if typing.get_origin(base) is list:
            (kind,) = typing.get_args(base)
            wanted = rng.choice((1, 1, 2, 3, (meta.max_length or 5) if kind == m.Index else 5))
            return [self.value(kind) for _ in range(wanted)] if wanted < 100 else list(range(wanted))
        if base is int:
            low = meta.ge or 0
            high = meta.le if meta.le is not None else meta.lt - 1
            return min(
                high,
                low
                + rng.choice((0, 0, 0, 1, 1, 2, 3, 4, 64, 4095, 4096, rng.getrandbits(32), rng.getrandbits(62), high)),
            )
        if base is float:
            return rng.choice((0.0, 1e-9, 1e-3, 1e9, 1e300, float("inf"), float("nan"), -0.0))
        if base is bytes:
            return rng.choice(_POOL)
        texts = [text for text in _TEXTS if (meta.min_length or 0) <= len(text) <= meta.max_length]
        return rng.choice(texts)

    def number(self) -> int:
        """Of a request: a new one, or one that was there, or any."""
        rng = self.rng
        draw = rng.random()
        if draw < 0.7:
            self.used.append(next(self._numbers))
            return self.used[-1]
        return rng.choice(self.used[-30:]) if draw < 0.95 else rng.choice((1, 2**31, 2**63 - 1))

    def prompt(self) -> Any:
        """Mostly one that can be."""
        rng = self.rng
        if rng.random() < 0.2:
            return self.message(rng.choice(PROMPTS))
        layout = rng.randrange(len(LAYOUTS))
        if rng.random() < 0.6:
            begin = rng.randrange(20)
            chunks = _POOL[begin : begin + rng.randrange(5)]
            return m.Digests(layout, rng.choice(_POOL[:2]), 4 * len(chunks) + rng.randrange(4), "", b"".join(chunks))
        if rng.random() < 0.5:
            ids = b"".join(rng.choice((1, 2, 2**31 - 1)).to_bytes(4, "little") for _ in range(rng.randrange(12)))
            media = [(n, b"image") for n in range(len(ids) // 4) if rng.random() < 0.1]
            return m.TokenIds(layout, rng.choice(("", "salt")), "", ids, media)
        digests = [rng.choice(_POOL) for _ in range(rng.randrange(6))]
        if rng.random() < 0.3:
            return m.EngineDigests(layout, "", "", digests)
        return m.Blocks(layout, "", "", rng.choice((1, 2, 4)), digests)

    def message(self, kind: type[Any]) -> Any:
        """A message whose fields are of the right types."""
        made = kind(*[self.field(kind, field) for field in msgspec.structs.fields(kind)])
        if kind in PROMPTS or kind in (m.Group, m.Layout):
            return made
        return self.plausible(made)

    def field(self, kind: type[Any], field: Any) -> Any:
        """One field: a prompt is one that can be, and a layout is often one of those that are registered."""
        if field.type == m.WirePrompt:
            return self.prompt()
        if kind is m.RegisterLayout and field.name == "description":
            return self.rng.choice(LAYOUTS) if self.rng.random() < 0.5 else self.message(m.Layout)
        return self.value(field.type)

    def plausible(self, made: Any) -> Any:
        """References to what is there, so that what comes behind the checks is reached too."""
        rng = self.rng
        for name in ("store", "read", "call"):
            if hasattr(made, name) and rng.random() < 0.9:
                setattr(made, name, rng.choice(self.used[-12:]))
        if hasattr(made, "request_id") and rng.random() < 0.8:
            made.request_id = rng.choice("rst")
        if isinstance(made, m.ReserveStore) and rng.random() < 0.7:
            made.rank, made.start_chunk = rng.randrange(2), rng.randrange(2)
        if isinstance(made, m.AcquireRead) and rng.random() < 0.7:
            made.rank, made.reader = rng.randrange(2), rng.randrange(2)
        if isinstance(made, m.CommitStore | m.StoreData) and rng.random() < 0.8:
            made.position = rng.randrange(3)
        if isinstance(made, m.CommitStore) and rng.random() < 0.7:
            made.offset = rng.choice((0, 0, 4096, SEGMENT_BYTES - 64, None))
        if isinstance(made, m.StoreData) and rng.random() < 0.7:
            made.offset, made.data = 0, memoryview(bytes(rng.choice((1, 64, 5000))))
        return made

    def request(self) -> Any:
        """Any request; those that go together more often."""
        return self.message(self.rng.choice((*REQUESTS, *(m.Prefetch, m.AcquireRead) * 3)))

    def store(self) -> tuple[Any, ...]:
        """A store that can be: reserved now, and used by what comes later."""
        number = self.number()
        return (m.ReserveStore(number, self.prompt()),)

    def mutant(self) -> bytes:
        """The frame of a request, changed."""
        payload = encode(self.request())
        return self.rng.choice(_MUTATIONS)(self, payload)

    def bomb(self) -> bytes:
        """A frame that promises, or means, far more than it has."""
        return self.rng.choice(_BOMBS)(self)


# Mutations of a payload, or its frame.


def flip_bits(wild: Wild, payload: bytes) -> bytes:
    data = bytearray(payload)
    for _ in range(wild.rng.choice((1, 1, 2, 8))):
        data[wild.rng.randrange(len(data))] ^= 1 << wild.rng.randrange(8)
    return frame(bytes(data))


def flip_bits_of_the_frame(wild: Wild, payload: bytes) -> bytes:
    data = bytearray(frame(payload))
    data[wild.rng.randrange(min(len(data), 8))] ^= 1 << wild.rng.randrange(8)
    return bytes(data)


def cut(wild: Wild, payload: bytes) -> bytes:
    return frame(payload[: wild.rng.randrange(1, len(payload))])


def cut_the_frame(wild: Wild, payload: bytes) -> bytes:
    data = frame(payload)
    return data[: wild.rng.randrange(1, len(data))]


def splice(wild: Wild, payload: bytes) -> bytes:
    other = encode(wild.request())
    return frame(payload[: wild.rng.randrange(1, len(payload))] + other[wild.rng.randrange(len(other)) :] or b"\x90")


def splice_fields(wild: Wild, payload: bytes) -> bytes:
    fields, others = (msgspec.msgpack.decode(data) for data in (payload, encode(wild.request())))
    at = wild.rng.randrange(len(fields))
    fields[at] = wild.rng.choice(others)
    return frame(encode(fields))


def replace_a_value(wild: Wild, payload: bytes) -> bytes:
    fields = msgspec.msgpack.decode(payload)
    within = fields
    while (inner := [value for value in within if isinstance(value, list) and value]) and wild.rng.random() < 0.5:
        within = wild.rng.choice(inner)
    within[wild.rng.randrange(len(within))] = wild.rng.choice(_ODD)
    return frame(encode(fields))


def more_or_fewer_fields(wild: Wild, payload: bytes) -> bytes:
    fields = msgspec.msgpack.decode(payload)
    return frame(encode(fields[:-1] if wild.rng.random() < 0.5 else [*fields, wild.rng.choice(_ODD)]))


def insert_bytes(wild: Wild, payload: bytes) -> bytes:
    at = wild.rng.randrange(len(payload) + 1)
    return frame(payload[:at] + wild.rng.randbytes(wild.rng.randrange(1, 9)) + payload[at:])


def noise(wild: Wild, payload: bytes) -> bytes:
    return frame(wild.rng.randbytes(wild.rng.randrange(1, 200)))


_ODD: list[Any] = [
    None, True, -1, 0, 1, 2**32, 2**63, 2**64 - 1, -(2**63), 1.5, float("nan"), float("inf"), "", "text", "x" * 5000,
    b"", b"x" * 31, bytes(64), [], [[]], [1] * 5000, {}, {"a": 1}, {1: {2: 3}}, ["Ping", 1],
    msgspec.msgpack.Ext(5, b"ext"),
]  # fmt: skip
_MUTATIONS: list[Callable[[Wild, bytes], bytes]] = [
    flip_bits, flip_bits, flip_bits_of_the_frame, cut, cut_the_frame, splice, splice_fields, splice_fields,
    replace_a_value, replace_a_value, more_or_fewer_fields, insert_bytes, noise,
]  # fmt: skip


# Bombs.


def long_frame(wild: Wild) -> bytes:
    size = wild.rng.choice((MAX_PAYLOAD_BYTES + 1, 2**31 - 1, 2**31, 2**32 - 1, MAX_PAYLOAD_BYTES))
    return size.to_bytes(4, "little") + wild.rng.randbytes(wild.rng.randrange(64))


def empty_frame(wild: Wild) -> bytes:
    return bytes(4)


def long_item(wild: Wild) -> bytes:
    """A header of MessagePack that promises many bytes or items, in the place of some field."""
    payload = encode(wild.request())
    header = wild.rng.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"))
    size = wild.rng.choice((2**32 - 1, 2**31, 2**28, 2**24))
    return frame(payload[: wild.rng.randrange(len(payload))] + header + size.to_bytes(4, "big") + b"\x00" * 8)


def deep(wild: Wild) -> bytes:
    depth = wild.rng.choice((100, 10_000, 500_000))
    payload = encode(wild.request())
    return frame(payload[: wild.rng.randrange(len(payload))] + b"\x91" * depth + b"\xc0")


def deep_map(wild: Wild) -> bytes:
    return frame(b"\x81\xa1a" * wild.rng.choice((100, 100_000)) + b"\xc0")


def many_hashes(wild: Wild) -> bytes:
    chunks = wild.rng.choice((4096, 20_000))
    prompt = m.Digests(wild.rng.randrange(6), bytes(32), 4 * chunks, "", wild.rng.randbytes(32) * chunks)
    kind = wild.rng.choice((m.Lookup, m.ReserveStore, m.Delete))
    return frame(encode(kind(wild.number(), prompt)))


def many_items(wild: Wild) -> bytes:
    many = wild.rng.choice((5000, 100_000))
    prompt = wild.rng.choice(
        (
            m.TokenIds(0, "", "", bytes(400_000), [(n, b"x") for n in range(many)]),
            m.Blocks(0, "", "", 1, [bytes(8)] * many),
        )
    )
    return frame(encode(m.Lookup(wild.number(), prompt)))


def huge_layout(wild: Wild) -> bytes:
    rng = wild.rng
    dimensions, ranks, many, world_size = rng.choice(
        ((1, None, 1, 1), (2, None, 1, 4096), (32, None, 4096, 1), (2, [0], 4096, 1), (1, list(range(4096)), 1, 4096))
    )
    groups = [m.Group([2**48 - 1] * dimensions, "float64", None, ranks)] * many
    layout = m.Layout("x" * 1024, groups, rng.choice((1, 2**32 - 1)), world_size, 2**32 - 1, "y" * 1024)
    number = rng.randrange(2**32)
    prompts = [
        m.Digests(number, bytes(32), 2**63 - 1, "", b""),
        m.Digests(number, bytes(32), 4 * layout.chunk_tokens, "", b"".join(_POOL[:4])),
        m.TokenIds(number, "", "", bytes(4 * 8)),
    ]
    prompt = rng.choice(prompts)
    uses = [
        m.Lookup(wild.number(), prompt),
        m.Prefetch(wild.number(), prompt, "huge", 2**63 - 1, None, 1e300),
        m.ReserveStore(wild.number(), prompt, rng.choice((0, 4095))),
    ]
    return frame(encode(m.RegisterLayout(wild.number(), number, layout))) + frame(encode(rng.choice(uses)))


_BOMBS: list[Callable[[Wild], bytes]] = [
    long_frame, empty_frame, long_item, long_item, deep, deep_map, many_hashes, many_items, huge_layout, huge_layout,
]  # fmt: skip
