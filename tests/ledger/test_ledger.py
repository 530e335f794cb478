"""The ledger: what it says of what left, and whom it tells, each thing once."""

import asyncio

import pytest
import uvloop

from async_cache.ledger.expiries import Expiries
from async_cache.ledger.ledger import REMOVALS, UNKNOWN_OWNER, Ledger, Left
from async_cache.observe import Observer, Observers
from async_cache.values import Removal

CAPACITY, QUOTA, DELETED, EXPIRED, DAMAGED, LOST, _ = Removal
ONE, TWO, THREE = (bytes([n]) * 32 for n in (1, 2, 3))


class Listener(Observer):
    def __init__(self):
        self.told = []

    def left(self, backend, chunk_hash, removal, owner):
        self.told.append((backend, chunk_hash, removal, owner))


def listened(capacity=16, owners=None):
    observers, listener = Observers(), Listener()
    observers.add(listener)
    return Ledger(capacity, observers, (owners or {}).get), listener


def leave_l1(ledger, chunk_hash, removal=CAPACITY, *, owner="", child=None, forked=False):
    ledger.left_l1(chunk_hash, owner, child, forked, removal)


async def test_it_remembers_the_last_place_and_reason_and_how_long_ago():
    ledger, _ = listened()
    assert ledger.find(ONE) is None
    leave_l1(ledger, ONE)
    assert ledger.find(ONE).removal is CAPACITY and ledger.find(ONE).backend is None
    ledger.left("disk", ONE, DAMAGED)
    left = ledger.find(ONE)
    assert (left.removal, left.backend) == (DAMAGED, "disk") and left.seconds_ago >= 0
    assert REMOVALS[ledger.number(ONE)] is DAMAGED
    assert ledger.find_all([TWO, ONE])[0] is None


async def test_a_backend_is_told_of_once_until_the_chunk_is_stored_there_again():
    ledger, listener = listened()
    ledger.left("disk", ONE, DELETED)
    ledger.left("disk", ONE, LOST)
    ledger.left("far", ONE, CAPACITY)
    ledger.stored("disk", ONE)
    ledger.left("disk", ONE, EXPIRED)
    ledger.left("far", ONE, CAPACITY)
    await asyncio.sleep(0)
    assert [(backend, removal) for backend, _, removal, _ in listener.told] == [
        ("disk", DELETED),
        ("far", CAPACITY),
        ("disk", EXPIRED),
    ]


async def test_many_backends_are_told_apart_by_name():
    ledger, _ = listened()
    for number in range(300):
        ledger.left(f"backend-{number}", ONE, LOST)
        ledger.stored(f"backend-{number}", ONE)
        ledger.left(f"backend-{number}", ONE, CAPACITY)
        assert ledger.find(ONE).backend == f"backend-{number}"


async def test_the_owner_is_known_from_l1_or_remembered_and_only_as_a_tag():
    ledger, listener = listened(owners={ONE: "salt"})
    ledger.left("disk", ONE, LOST)
    leave_l1(ledger, TWO, owner="another")
    ledger.left("disk", TWO, LOST)
    ledger.left("disk", THREE, LOST)
    await asyncio.sleep(0)
    owners = [owner for *_, owner in listener.told]
    assert owners == [ledger.tag("salt"), ledger.tag("another"), UNKNOWN_OWNER]
    assert len(set(owners)) == 3 and all(len(owner) == 8 for owner in owners)
    assert b"another" not in bytes(ledger._table.data)
    assert Ledger(16).tag("salt") != ledger.tag("salt")  # nobody else can make it
    for number in range(10_000):
        ledger.tag(str(number))
    assert ledger.tag("salt") == owners[0] and len(ledger._tags) <= 4096


async def test_children_are_known_when_their_parent_has_left():
    ledger, _ = listened()
    leave_l1(ledger, ONE, child=TWO)
    assert not ledger.has_other_child(ONE, TWO) and ledger.has_other_child(ONE, THREE)
    leave_l1(ledger, ONE, child=TWO)
    assert not ledger.has_other_child(ONE, TWO)
    leave_l1(ledger, ONE)  # without one, this time
    assert ledger.has_other_child(ONE, THREE)
    ledger.left("disk", ONE, LOST)
    assert ledger.has_other_child(ONE, THREE)
    leave_l1(ledger, ONE, child=THREE)
    assert ledger.has_other_child(ONE, TWO) and ledger.has_other_child(ONE, THREE)


async def test_what_is_built_on_something_that_left_is_known():
    ledger, _ = listened()
    ledger.built_on(ONE, TWO)  # of which nothing is known
    assert not ledger.has_other_child(ONE, THREE)
    leave_l1(ledger, ONE)
    ledger.built_on(ONE, TWO)
    assert ledger.has_other_child(ONE, THREE) and not ledger.has_other_child(ONE, TWO)
    ledger.built_on(ONE, THREE)
    assert ledger.has_other_child(ONE, TWO)


async def test_a_chunk_that_forked_in_l1_has_another_child_whichever_is_asked_for():
    ledger, _ = listened()
    leave_l1(ledger, ONE, child=TWO, forked=True)
    assert ledger.has_other_child(ONE, TWO)


async def test_what_is_to_expire_is_lost_before_and_expired_after():
    ledger, listener = listened()
    ledger.stored("valkey", ONE, 60.0)
    leave_l1(ledger, ONE)
    assert ledger.find(ONE) == Left(LOST, "valkey", 0.0)
    assert REMOVALS[ledger.number(ONE)] is LOST
    ledger._began -= 61
    assert REMOVALS[ledger.number(ONE)] is EXPIRED
    assert ledger.find(ONE).seconds_ago == pytest.approx(1, abs=0.2)
    ledger.left("valkey", ONE, LOST)  # a load has shown it
    await asyncio.sleep(0)
    assert [removal for _, _, removal, _ in listener.told] == [EXPIRED]


@pytest.mark.parametrize("order", [("near", "far"), ("far", "near")])
async def test_what_expires_in_two_places_is_gone_with_the_last_of_them(order):
    ledger, listener = listened()
    for backend in order:
        ledger.stored(backend, ONE, {"near": 20.0, "far": 60.0}[backend])
    ledger._began -= 21
    ledger.left("near", ONE, LOST)  # found out there
    assert ledger.find(ONE).backend == "far", "which is to have it"
    ledger._began -= 40
    left = ledger.find(ONE)
    assert (left.removal, left.backend) == (EXPIRED, "far") and left.seconds_ago == pytest.approx(1, abs=0.2)
    ledger.left("far", ONE, LOST)
    await asyncio.sleep(0)
    assert [(backend, removal) for backend, _, removal, _ in listener.told] == [("near", LOST), ("far", EXPIRED)]


def test_more_that_expires_at_once_than_is_told_at_once_is_told_by_any_loop():
    async def main():
        told = []
        expiries = Expiries(1000, lambda backend, chunk_hash: told.append(chunk_hash))
        now = asyncio.get_running_loop().time()
        for n in range(600):
            expiries.add(now, "valkey", n.to_bytes(32, "big"))
        while len(told) < 700:
            expiries.add(now, "valkey", len(told).to_bytes(32, "little"))
            await asyncio.sleep(0)
        expiries.close()

    uvloop.run(asyncio.wait_for(main(), 100))


async def test_closed_it_remembers_nothing():
    ledger, _ = listened()
    leave_l1(ledger, ONE)
    ledger.close()
    leave_l1(ledger, TWO)
    assert ledger.find_all([ONE, TWO]) == [None, None]


async def test_with_no_room_it_tells_all_the_same():
    ledger, listener = listened(capacity=0)
    ledger.left("disk", ONE, LOST)
    ledger.stored("disk", ONE)
    leave_l1(ledger, ONE)
    await asyncio.sleep(0)
    assert [backend for backend, *_ in listener.told] == ["disk"]
    assert ledger.find(ONE) is None and ledger.number(ONE) == -1 and not ledger.has_other_child(ONE, TWO)
