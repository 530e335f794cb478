"""Messages: `docs/protocol.md` and the code say the same, and what is no message is a ProtocolError."""

import enum
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import NODEFAULT, Meta, Struct

from async_cache import ProtocolError, ServiceError, errors, values
from async_cache.errors import AsyncCacheError
from async_cache.protocol import frames, messages
from async_cache.protocol.frames import FrameReader, frame
from async_cache.protocol.messages import ERROR_CODES, VERSION, Decoder, encode, error_of, failed

DOCUMENT = (Path(__file__).parent.parent.parent / "docs" / "protocol.md").read_text()
GREETING = (messages.Hello, messages.Welcome)
PARTS = (messages.Group, messages.Layout, messages.Root, *typing.get_args(messages.WirePrompt))
REQUESTS, ANSWERS = typing.get_args(messages.Request), typing.get_args(messages.Answer)
VALUES = (
    values.LookupHits,
    values.Missed,
    values.Explanation,
    values.Span,
    values.Elsewhere,
    values.ListedChunk,
    values.Stored,
    values.Skipped,
    values.LoadResult,
    values.Deleted,
    values.DeletedModel,
    values.FlushResult,
    values.Retained,
    values.CacheStats,
    values.LimitUse,
    values.Hold,
    values.BackendUsage,
    values.BackendStatus,
    values.Copied,
)
requests, answers = Decoder(messages.Request), Decoder(messages.Answer)


def decode(payload: bytes) -> Any:
    """A message of any kind."""
    for kinds in (messages.Request, messages.Answer, messages.Hello, messages.Welcome):
        try:
            return Decoder(kinds).decode(payload)
        except ProtocolError as error:
            last = error
    raise last


# The document, as the tests read it.


def section(title: str) -> str:
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/protocol.md has no section {title}"
    return found[1]


def rows(title: str) -> list[list[str]]:
    """The cells of the table of a section, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


NAMED = {
    "number": messages.Number,
    "count": messages.Count,
    "index": messages.Index,
    "request id": messages.RequestId,
    "label": messages.Label,
    "name": messages.Name,
    "digest": messages.Digest,
    "seconds": messages.Seconds,
}
PLAIN = {int: "int", str: "text", bytes: "bytes", memoryview: "bytes", float: "float", bool: "bool"}


def written(kind: Any) -> str:
    """A type, as the document writes it."""
    for name, named in NAMED.items():
        if kind == named:
            return name
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        base, meta = arguments
        return f"{written(base)} {bounds(meta)}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("nil" if argument is types.NoneType else written(argument) for argument in arguments)
    if origin is list or arguments[-1:] == (...,):
        return f"[{written(arguments[0])}]"
    if origin is tuple:
        return f"({', '.join(map(written, arguments))})"
    if origin is dict:
        return f"map of {written(arguments[0])} to {written(arguments[1])}"
    if origin is Literal:
        return " or ".join(f'"{argument}"' for argument in arguments)
    if kind in PLAIN:
        return PLAIN[kind]
    return kind.__name__ if issubclass(kind, Struct) else kind.__name__.lower()


def bounds(meta: Meta) -> str:
    if meta.max_length is not None:
        return f"{meta.min_length or 0} to {meta.max_length}"
    low = meta.ge if meta.ge is not None else 0
    if meta.le is None and meta.lt is None:
        return f"{low} or more"
    high = meta.le if meta.le is not None else meta.lt - 1
    power = (high + 1).bit_length() - 1
    return f"{low} to 2^{power} - 1" if power > 16 and high + 1 == 2**power else f"{low} to {high}"


def default(field: Any) -> str:
    if field.default is not NODEFAULT:
        return "nil" if field.default is None else json.dumps(field.default)
    return "" if field.default_factory is NODEFAULT else json.dumps(field.default_factory())


@pytest.mark.parametrize("kind", [*GREETING, *PARTS, *REQUESTS, *ANSWERS, *VALUES], ids=lambda kind: kind.__name__)
def test_the_document_has_every_message_with_its_fields_in_order(kind: type[Struct]) -> None:
    code = [[field.name, written(field.type), default(field)] for field in msgspec.structs.fields(kind)]
    assert [row[:3] for row in rows(kind.__name__)] == code


def test_the_document_has_the_event_that_is_called_as_a_message() -> None:
    code = [[field.name, written(field.type), default(field)] for field in msgspec.structs.fields(values.Removed)]
    assert [row[:3] for row in rows("Removed, the event")] == code


def test_the_document_has_no_message_that_there_is_not() -> None:
    known = {kind.__name__ for kind in (*GREETING, *PARTS, *REQUESTS, *ANSWERS, *VALUES)}
    assert set(re.findall(r"^### (\w+)$", DOCUMENT, re.MULTILINE)) == known


def test_every_message_of_the_module_can_be_sent() -> None:
    made = {m for m in vars(messages).values() if isinstance(m, type) and issubclass(m, messages.Message)}
    assert made - {messages.Message, messages.Extensible} == {*GREETING, *PARTS, *REQUESTS, *ANSWERS}


def test_the_document_has_the_bounds_of_the_named_types() -> None:
    code = {}
    for name, kind in NAMED.items():
        base, meta = typing.get_args(kind)
        code[name] = [PLAIN[base], bounds(meta)]
    assert {row[0]: row[1:] for row in rows("Conventions")} == code


def test_the_document_has_the_limits_and_the_version() -> None:
    limits = section("Frames")
    for size in (frames.MAX_GREETING_BYTES, frames.MAX_PAYLOAD_BYTES, frames.DATA_BYTES):
        assert f"| {size:,} bytes |" in limits
    assert f"This is version {VERSION}." in re.sub(r"\s+", " ", DOCUMENT)


def test_the_document_has_every_shortfall_state_and_removal() -> None:
    told = (*values.Shortfall, *values.ChunkState, *values.Removal, *values.Clipped)
    assert all(f"`{value}`" in section("Values") for value in told)


def test_the_document_has_every_error_with_its_exception() -> None:
    assert {row[0]: row[1] for row in rows("Errors")} == {code: kind.__name__ for code, kind in ERROR_CODES.items()}


# The vectors.


def vectors() -> list[tuple[Any, bytes]]:
    fence = re.search(r"^```text\n(.*?)^```$", section("Test vectors"), re.MULTILINE | re.DOTALL)
    assert fence is not None
    found = []
    for block in fence[1].strip().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        told = [line for line in lines if not line.startswith("    ")]
        found.append(
            (json.loads("\n".join(told)), bytes.fromhex("".join(line.strip() for line in lines if line not in told)))
        )
    return found


def as_told(value: Any) -> Any:
    """A value of MessagePack, as the document writes it."""
    if isinstance(value, bytes):
        return f"0x{value.hex()}"
    if isinstance(value, list):
        return list(map(as_told, value))
    return {name: as_told(v) for name, v in value.items()} if isinstance(value, dict) else value


VECTORS = vectors()
each_vector = pytest.mark.parametrize(
    ("told", "data"), VECTORS, ids=[f"{number}-{told[0]}" for number, (told, _) in enumerate(VECTORS)]
)


def test_there_is_a_vector_of_every_message_and_every_form_of_a_prompt() -> None:
    assert {told[0] for told, _ in VECTORS} == {kind.__name__ for kind in (*GREETING, *REQUESTS, *ANSWERS)}
    text = json.dumps([told for told, _ in VECTORS])
    assert all(f'["{kind.__name__}"' in text for kind in PARTS)


@each_vector
def test_a_vector_is_the_message_that_the_document_says(told: Any, data: bytes) -> None:
    (payload,) = FrameReader().feed(data)
    assert as_told(msgspec.msgpack.decode(payload)) == told


@each_vector
def test_a_vector_is_parsed_and_made_again(told: Any, data: bytes) -> None:
    (payload,) = FrameReader().feed(data)
    message = decode(bytes(payload))
    assert type(message).__name__ == told[0]
    assert frame(encode(message)) == data


# What is no message.

PAYLOADS = [data[frames.HEADER_BYTES :] for _, data in VECTORS]
REQUEST_PAYLOADS = [
    payload for payload in PAYLOADS if msgspec.msgpack.decode(payload)[0] in {kind.__name__ for kind in REQUESTS}
]
each_request = pytest.mark.parametrize(
    "payload", REQUEST_PAYLOADS, ids=lambda payload: msgspec.msgpack.decode(payload)[0]
)


@each_request
def test_more_fields_than_a_message_has_are_refused(payload: bytes) -> None:
    fields = msgspec.msgpack.decode(payload)
    with pytest.raises(ProtocolError, match="not a message"):
        requests.decode(encode([*fields, None]))


@pytest.mark.parametrize("kind", [*GREETING, *ANSWERS], ids=lambda kind: kind.__name__)
def test_a_greeting_or_answer_with_fields_more_is_understood(kind: type[Struct]) -> None:
    """The other end is of a later state, and what it adds may be ignored."""
    payloads = [payload for payload in PAYLOADS if msgspec.msgpack.decode(payload)[0] == kind.__name__]
    decoder = answers if kind in ANSWERS else Decoder(kind)
    for payload in payloads:
        later = encode([*msgspec.msgpack.decode(payload), "a field", {"more": [1]}])
        assert encode(decoder.decode(later)) == payload


def test_a_value_of_an_answer_with_fields_more_is_understood() -> None:
    hits = values.LookupHits(
        request_id="r", start_chunk=0, chunks=1, tokens=4, l1_chunks=1, l2_chunks=0, found_chunks=1
    )
    name, number, fields, _ = msgspec.msgpack.decode(encode(messages.Hits(1, hits)))
    assert answers.decode(encode([name, number, [*fields, 1.5]])) == messages.Hits(1, hits)
    usage = {"objects": 1, "used_bytes": 2, "capacity_bytes": None, "more": 3}
    stats = {field.name: 0 for field in msgspec.structs.fields(values.CacheStats) if field.required}
    counted = answers.decode(encode(["Counted", 1, {**stats, "more": {}, "backends": {"fs": usage}}]))
    assert counted.stats.backends["fs"] == values.BackendUsage(1, 2, None)


@pytest.mark.parametrize("seconds", [math.nan, math.inf])
def test_seconds_that_are_not_finite_are_a_message_and_the_answer_an_error(seconds: float) -> None:
    for message in (messages.Prefetch(1, DIGESTS, "r", 0, None, seconds), messages.Flush(1, seconds)):
        assert type(requests.decode(encode(message))) is type(message)


@each_request
def test_a_field_that_has_a_default_may_be_left_out_and_no_other(payload: bytes) -> None:
    fields = msgspec.msgpack.decode(payload)
    kind = getattr(messages, fields[0])
    needed = 1 + sum(field.required for field in msgspec.structs.fields(kind))
    for length in range(len(fields)):
        if length >= needed:
            assert type(requests.decode(encode(fields[:length]))) is kind
        else:
            with pytest.raises(ProtocolError):
                requests.decode(encode(fields[:length]))


@each_request
def test_a_value_of_another_type_is_refused(payload: bytes) -> None:
    fields = msgspec.msgpack.decode(payload)
    for at in range(len(fields)):
        for odd in ({"a": 1}, True, msgspec.msgpack.Ext(1, b"")):
            if odd is True and isinstance(fields[at], bool):
                continue
            with pytest.raises(ProtocolError):
                requests.decode(encode([*fields[:at], odd, *fields[at + 1 :]]))


@each_request
def test_a_message_that_is_cut_off_or_has_more_behind_it_is_refused(payload: bytes) -> None:
    for end in range(len(payload)):
        with pytest.raises(ProtocolError):
            requests.decode(payload[:end])
    with pytest.raises(ProtocolError):
        requests.decode(payload + b"\0")


def test_an_answer_is_no_request_and_a_request_no_answer() -> None:
    with pytest.raises(ProtocolError):
        requests.decode(encode(messages.Done(1)))
    with pytest.raises(ProtocolError):
        answers.decode(encode(messages.Ping(1)))


DIGESTS = messages.Digests(0, bytes(32), 0, "", b"")
OUT_OF_BOUNDS = [
    messages.Ping(0),
    messages.Ping(-1),
    messages.Ping(2**63),
    messages.Ping(2**64 - 1),
    messages.Renew(1, ""),
    messages.Renew(1, "x" * 257),
    messages.RegisterLayout(1, 2**32, messages.Layout("m", [messages.Group([1], "uint8")], 1, 1, 1, "")),
    *(
        messages.RegisterLayout(1, 0, messages.Layout(*layout))
        for layout in (
            ("x" * 1025, [messages.Group([1], "uint8")], 1, 1, 1, ""),
            ("m", [], 1, 1, 1, ""),
            ("m", [messages.Group([1], "uint8")] * 4097, 1, 1, 1, ""),
            ("m", [messages.Group([], "uint8")], 1, 1, 1, ""),
            ("m", [messages.Group([1] * 33, "uint8")], 1, 1, 1, ""),
            ("m", [messages.Group([0], "uint8")], 1, 1, 1, ""),
            ("m", [messages.Group([2**48], "uint8")], 1, 1, 1, ""),
            ("m", [messages.Group([1], "x" * 33)], 1, 1, 1, ""),
            ("m", [messages.Group([1], "uint8", 0)], 1, 1, 1, ""),
            ("m", [messages.Group([1], "uint8", None, [-1])], 1, 1, 1, ""),
            ("m", [messages.Group([1], "uint8", None, [0] * 4097)], 1, 1, 1, ""),
            ("m", [messages.Group([1], "uint8")], 0, 1, 1, ""),
            ("m", [messages.Group([1], "uint8")], 1, 4097, 1, ""),
            ("m", [messages.Group([1], "uint8")], 1, 1, 2**32, ""),
        )
    ),
    *(
        messages.Lookup(1, messages.Digests(*prompt))
        for prompt in ((0, bytes(31), 0, "", b""), (0, bytes(33), 0, "", b""), (0, bytes(32), -1, "", b""))
    ),
    messages.Lookup(1, messages.Digests(0, bytes(32), 0, "x" * 129, b"")),
    messages.Lookup(1, messages.TokenIds(0, "", "x" * 129, b"")),
    messages.Lookup(1, messages.TokenIds(0, "", "", b"", [(-1, b"")])),
    messages.Lookup(1, messages.Blocks(0, "", "", 0, [])),
    messages.Prefetch(1, DIGESTS, "r", -1),
    messages.Prefetch(1, DIGESTS, "r", 0, []),
    messages.Prefetch(1, DIGESTS, "r", 0, [0] * 4097),
    messages.Prefetch(1, DIGESTS, "r", 0, None, -0.5),
    messages.AcquireRead(1, "r", -1, 0),
    messages.AcquireRead(1, "r", 0, 2**32),
    messages.StoreData(1, 0, -1, memoryview(b"")),
    messages.CommitStore(1, 1, 2**32, 0),
    messages.CommitStore(1, 1, 0, 2**63),
    messages.Clear(1, "l2"),  # type: ignore[arg-type]
    messages.Flush(1, -1.0),
]


@pytest.mark.parametrize("message", OUT_OF_BOUNDS, ids=lambda message: repr(message)[:60])
def test_a_value_out_of_bounds_is_refused(message: Any) -> None:
    with pytest.raises(ProtocolError, match="not a message"):
        requests.decode(encode(message))


@pytest.mark.parametrize("hello", [[-1], [2**16], [1, "x" * 1025], [1, None, "x" * 129], [1, None, ""] + [0], []])
def test_a_greeting_out_of_bounds_is_refused(hello: list[Any]) -> None:
    with pytest.raises(ProtocolError):
        Decoder(messages.Hello).decode(encode(["Hello", *hello]))


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\x81", b"\xdd\0\0\0\1"])
@pytest.mark.parametrize("before", [b"", b"\x92\xa4Ping", b"\x93\xa6Lookup\x01", b"\x92\xa7Nothing"])
def test_nesting_that_is_too_deep_is_refused(opening: bytes, before: bytes) -> None:
    with pytest.raises(ProtocolError):
        requests.decode(before + opening * 1_000_000)


@pytest.mark.parametrize("header", [b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"])
@each_request
def test_what_promises_more_than_it_has_is_refused(payload: bytes, header: bytes) -> None:
    for at in range(len(payload)):
        with pytest.raises(ProtocolError):
            requests.decode(payload[:at] + header + b"\xff\xff\xff\xff" + payload[at:])


@given(st.binary(max_size=200))
def test_bytes_are_a_message_or_a_protocol_error(payload: bytes) -> None:
    for decoder in (requests, answers, Decoder(messages.Hello)):
        try:
            decoder.decode(payload)
        except ProtocolError:
            continue


@given(st.sampled_from(PAYLOADS), st.data())
def test_a_message_of_which_bytes_change_is_a_message_or_a_protocol_error(payload: bytes, data: st.DataObject) -> None:
    changed = bytearray(payload)
    for at in data.draw(st.lists(st.integers(0, len(payload) - 1), max_size=4)):
        changed[at] = data.draw(st.integers(0, 255))
    try:
        message = decode(bytes(changed))
    except ProtocolError:
        return
    assert decode(encode(message)) == message or "nan" in repr(message)


# Errors.


def every_error() -> list[type[AsyncCacheError]]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AsyncCacheError)]
    return [kind for kind in kinds if kind is not AsyncCacheError]


@pytest.mark.parametrize("kind", [*every_error(), ValueError, TypeError], ids=lambda kind: kind.__name__)
def test_every_error_has_a_code_and_comes_back_as_the_same_exception(kind: type[Exception]) -> None:
    assert kind in ERROR_CODES.values()
    answer = answers.decode(encode(failed(7, kind("the reason, é"))))
    error = error_of(answer)
    assert type(error) is kind and str(error) == "the reason, é" and answer.number == 7


@pytest.mark.parametrize("code", ERROR_CODES)
def test_every_code_is_an_exception_that_has_a_code(code: str) -> None:
    error = error_of(messages.Failed(1, code, "the reason"))
    assert type(error) is ERROR_CODES[code] and str(error) == "the reason"
    assert type(error_of(failed(1, error))) is type(error)


@pytest.mark.parametrize("error", [OSError(5, "secret"), KeyError("secret"), RuntimeError("secret"), MemoryError()])
def test_an_error_without_a_code_is_a_fault_of_the_server_and_tells_nothing_more(error: Exception) -> None:
    answer = failed(3, error)
    assert answer.code == "internal" and "secret" not in answer.message
    assert type(error_of(answer)) is ServiceError


def test_a_code_that_is_not_known_is_an_error_of_the_service() -> None:
    assert type(error_of(messages.Failed(1, "of a later version", "the reason"))) is ServiceError


def test_no_two_values_of_an_enumeration_travel_alike() -> None:
    assert issubclass(values.Shortfall, enum.StrEnum)
    assert len({shortfall.value for shortfall in values.Shortfall}) == len(values.Shortfall)
