"""The table: what it finds is what was put there, until it is overwritten, and it takes 40 bytes a record."""

import os
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_cache.ledger.table import RECORD_BYTES, VALUE_BYTES, WAYS, Table


def digest(number: int) -> bytes:
    return number.to_bytes(2, "big") * 16


def value_of(table: Table, key: bytes) -> bytes | None:
    at = table.find(key)
    value = bytes(table.data[at : at + VALUE_BYTES]) if at >= 0 else None
    assert table.find_tails([key, key], 8) == [value and value[-8:]] * 2
    return value


@given(
    st.integers(1, WAYS),
    st.lists(st.tuples(st.integers(1, 20), st.binary(min_size=VALUE_BYTES, max_size=VALUE_BYTES)), max_size=60),
)
def test_a_small_table_is_a_ring_that_forgets_the_oldest(capacity: int, puts: list[tuple[int, bytes]]) -> None:
    table, ring = Table(capacity), [(0, b"")] * capacity
    for turn, (number, value) in enumerate(puts):
        ring = [(0, b"") if known == number else (known, old) for known, old in ring]
        ring[turn % capacity] = (number, value)
        table.put(digest(number), value, table.find(digest(number)))
        for known in range(1, 21):
            assert value_of(table, digest(known)) == next((v for n, v in ring if n == known), None)


@settings(max_examples=20)
@given(st.integers(WAYS + 1, 500), st.integers(0, 2**32))
def test_a_large_table_has_the_last_value_or_none_and_most_of_what_came_last(capacity: int, seed: int) -> None:
    table = Table(capacity)
    put: OrderedDict[bytes, bytes] = OrderedDict()
    for number in range(3 * capacity):
        key, value = os.urandom(32) if number % 3 else digest(seed % 1000 + 1), os.urandom(VALUE_BYTES)
        table.put(key, value, table.find(key))
        put[key] = value
        put.move_to_end(key)
    assert all(value_of(table, key) in (None, value) for key, value in put.items())
    recent = list(put)[-capacity // 4 :]
    assert sum(value_of(table, key) is not None for key in recent) > len(recent) * 0.8


def test_what_looks_like_a_digest_within_a_record_is_none() -> None:
    table = Table(4)
    key = bytes(range(32))
    table.put(digest(1), key[:16] + bytes(8), table.find(digest(1)))  # the value begins like the digest
    assert value_of(table, key) is None
    table.put(key, b"x" * VALUE_BYTES, table.find(key))
    assert value_of(table, key) == b"x" * VALUE_BYTES
    table.put(digest(2), bytes(8) + key[:16], table.find(digest(2)))
    assert value_of(table, key) == b"x" * VALUE_BYTES


@pytest.mark.parametrize("capacity", [1, 16, 17, 1000, 65_536])
def test_a_record_takes_40_bytes(capacity: int) -> None:
    assert RECORD_BYTES == 40
    assert Table(capacity).size_bytes <= 40.1 * (capacity + WAYS)


def test_a_table_of_nothing_has_nothing() -> None:
    table = Table(0)
    table.put(digest(1), bytes(VALUE_BYTES), table.find(digest(1)))
    assert not table and table.find(digest(1)) == -1 and table.find_tails([digest(1)], 8) == [None]
