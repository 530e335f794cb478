"""What one tenant may have: what is over a limit is told so at once, with the limit's name, and others go on."""

import asyncio
import gc
import itertools
import weakref
from typing import get_args

import pytest
from contract.support import fill, make_layout, make_prompt

from async_cache import AsyncCache, CacheConfig, ConfigError, LimitError, ObjectGroup, ServerConfig, connect
from async_cache.limits import UNLIMITED, TenantLimits
from async_cache.prompt.layout import HASH_AT_ONCE_TOKENS
from async_cache.protocol import messages
from async_cache.protocol.messages import Failed
from async_cache.protocol.prompts import describe, pack
from async_cache.server.accounts import Account
from async_cache.server.held import Table
from async_cache.server.writers import Writers
from async_cache.testing.virtual import run_virtual

from .programs import server
from .support import MIB, Peer, given_back, wait_until

RED, BLUE = (f"token-of-{name:_<16}" for name in ("red", "blue"))
LIMITS = """
connections = 2
requests = 3
record_bytes = "20KiB"
layout_objects = 300
leased_share = 0.25
reserved_share = 0.25
"""
CONFIG = f"""
[server.tenants.red]
tokens = ["{RED}"]
salts = ["red"]

[server.tenants.red.limits]
{LIMITS}
[server.tenants.blue]
tokens = ["{BLUE}"]
salts = ["blue"]
"""
LAYOUT = make_layout(ObjectGroup((65_536,), "uint8"))
PAIRS = make_layout(*[ObjectGroup((64,), "uint8")] * 2)
names = itertools.count()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("limits")
    (directory / "config.toml").write_text(CONFIG)
    with server(directory, l1="4MiB", config=directory / "config.toml", lease_ttl_seconds=0.2) as served:
        yield served


@pytest.fixture(scope="module")
def few_objects(tmp_path_factory):
    directory = tmp_path_factory.mktemp("objects")
    (directory / "config.toml").write_text(CONFIG)
    with server(directory, config=directory / "config.toml", server_max_message_objects=9) as served:
        yield served


def prompt_of(chunks, number=1, salt="red", layout=LAYOUT):
    return make_prompt(chunks, number, layout=layout, salt=salt)


OF_PROMPTS = [kind for kind in get_args(messages.Request) if {"prompt", "prompts"} & set(kind.__struct_fields__)]


@pytest.mark.parametrize("kind", OF_PROMPTS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("token", [RED, None], ids=["bound", "trusted"])
def test_a_message_of_too_many_objects_is_refused_before_anything_is_done(few_objects, kind, token):
    prompts = [prompt_of(3, number, layout=PAIRS, salt="red") for number in (1, 2)]
    values = {"prompt": prompt_of(5, layout=PAIRS, salt="red"), "prompts": prompts, "request_id": "r"}

    def message(number):
        packed = {name: pack_all(values[name]) for name in kind.__struct_fields__ if name in values}
        return kind(number=number, **packed)

    with Peer(few_objects.url, token=token) as peer:
        peer.register(PAIRS)
        peer.answers(1)
        peer.send(message(peer.number()), messages.Stats(peer.number()))
        refused, stats = peer.answers(2)
        objects = 12 if "prompts" in kind.__struct_fields__ else 10
        assert refused.code == "limit"
        assert refused.message == f"max_message_objects: a message has up to 9 objects, not {objects}"
        assert stats.stats.requests == 0
        values |= {"prompt": prompt_of(4, layout=PAIRS, salt="red"), "prompts": prompts[:1]}
        peer.send(message(peer.number()))
        assert getattr(peer.answers(1)[0], "code", "") != "limit"


def pack_all(value):
    if isinstance(value, list):
        return list(map(pack_all, value))
    return value if isinstance(value, str) else pack(value, 0, trusted=False)


def prefetch(peer, prompt, name=None):
    wire = pack(prompt, 0, trusted=False)
    return messages.Prefetch(peer.number(), wire, name if name is not None else f"r{next(names)}")


def is_over(answer, limit):
    return isinstance(answer, Failed) and answer.code == "limit" and answer.message.startswith(f"{limit}: ")


async def test_a_request_too_many_is_refused_until_one_is_over(served):
    with Peer(served.url, token=RED) as peer:
        peer.register(LAYOUT)
        peer.answers(1)
        for n in range(3):
            peer.send(prefetch(peer, prompt_of(1, 50), f"one of {n}"))
            assert len(peer.answers(2)) == 2
        peer.send(prefetch(peer, prompt_of(1, 50)))
        assert is_over(peer.answers(1)[0], "requests")
        peer.send(messages.EndRequest(peer.number(), "one of 0"))
        peer.answers(2)
        peer.send(prefetch(peer, prompt_of(1, 50)))
        assert type(peer.answers(1)[0]) is messages.LookupDone
    async with connect(served.url) as watcher:
        await given_back(watcher)


async def test_what_is_known_of_requests_is_bounded_in_bytes(served):
    with Peer(served.url, token=RED) as peer:
        peer.register(LAYOUT)
        peer.answers(1)
        peer.send(prefetch(peer, prompt_of(200, 51)))
        assert is_over(peer.answers(1)[0], "record_bytes")
        peer.send(prefetch(peer, prompt_of(2, 51)))
        assert type(peer.answers(1)[0]) is messages.LookupDone


async def test_a_connection_too_many_of_one_tenant_is_refused_and_those_of_others_are_not(served):
    with Peer(served.url, token=RED), Peer(served.url, token=RED):
        with Peer(served.url, token=RED) as third:
            assert is_over(third.welcome, "connections")
        async with connect(served.url, token=BLUE) as blue:
            await blue.ping()

    async def has_room():
        with Peer(served.url, token=RED) as peer:
            return isinstance(peer.welcome, messages.Welcome)

    await wait_until(has_room)


async def test_layouts_are_bounded_by_their_objects_and_equal_ones_count_once(served):
    large = make_layout(*(ObjectGroup((1,), "uint8") for _ in range(200)))
    other = make_layout(*(ObjectGroup((2,), "uint8") for _ in range(200)))
    with Peer(served.url, token=RED) as peer:
        for number, layout in enumerate((large, large, other)):
            peer.send(messages.RegisterLayout(peer.number(), number, describe(layout)))
        first, second, third = peer.answers(3)
        assert type(first) is type(second) is messages.LayoutRegistered
        assert is_over(third, "layout_objects")


async def test_one_tenant_cannot_hold_all_of_l1_by_prefetches(served):
    async with connect(served.url, token=RED) as red, connect(served.url, token=BLUE) as blue:
        prompt = prompt_of(32, 52)
        for begin in range(0, 32, 8):
            async with red.store(prompt, start_chunk=begin) as writer:
                for chunk in writer:
                    chunk.commit()
        await red.flush()
        with pytest.raises(LimitError, match=r"^leased_share: "):
            await red.prefetch(prompt, request_id="hog").lookup_done
        result = await red.prefetch(prompt_of(12, 52), request_id="all right").load_done
        assert result.chunks == 12
        again = await red.prefetch(prompt_of(12, 52), request_id="the same chunks").load_done
        assert again.chunks == 12, "chunks that are held twice are counted once"
        await fill(blue, prompt_of(32, 53, "blue"))
        assert (await blue.prefetch(prompt_of(32, 53, "blue")).load_done).chunks == 32
        await blue.flush()
    async with connect(served.url) as watcher:
        await given_back(watcher)


async def test_one_tenant_cannot_reserve_all_of_l1(served):
    async with connect(served.url, token=RED) as red, connect(served.url, token=BLUE) as blue:
        async with red.store(prompt_of(64, 54)) as writer:
            assert len(writer) == 16
            assert writer.shortfall is not None
            with pytest.raises(LimitError, match=r"^reserved_share: "):
                await red.store(prompt_of(64, 55))
            async with blue.store(prompt_of(32, 56, "blue")) as other:
                assert len(other) == 32
            next(iter(writer)).commit()
            await red.ping()
            async with red.store(prompt_of(64, 57)) as more:
                assert len(more) == 1
        async with red.store(prompt_of(64, 58)) as writer:
            assert len(writer) == 16


async def test_a_read_that_is_never_left_ends_with_its_lease_and_its_frames_stop(served):
    prompt = prompt_of(8, 59)
    async with connect(served.url, token=RED) as red:
        await fill(red, prompt)
        await red.flush()
    with Peer(served.url, token=RED) as peer:
        peer.register(LAYOUT)
        peer.answers(1)
        peer.send(prefetch(peer, prompt, "never left"))
        peer.answers(2)
        read = messages.AcquireRead(peer.number(), "never left")
        peer.send(read)
        kinds = []
        while "Failed" not in kinds:
            answer = await asyncio.to_thread(peer.answers, 1)
            kinds += [type(one).__name__ for one in answer]
        assert kinds.count("RequestOver") == 1
        assert answer[-1].number == read.number and is_over(answer[-1], "lease_ttl_seconds")
        async with connect(served.url) as watcher:
            await given_back(watcher)


# The account itself.


def account_of(**limits):
    return Account("red", TenantLimits(**limits), MIB)


def test_what_is_stored_in_a_second_is_bounded():
    async def store():
        account = account_of(stored_bytes_per_second=1000)
        account.store(4000)
        account.store(500)
        with pytest.raises(LimitError, match=r"^stored_bytes_per_second: "):
            account.store(1)
        await asyncio.sleep(0.6)
        account.store(1)

    run_virtual(store())


async def test_a_store_that_is_refused_once_it_has_its_room_gives_it_back():
    """Of several that are begun at once, each was within the rate when it began."""
    account, held = account_of(stored_bytes_per_second=1000, reserved_share=0.9), Table()
    layout = make_layout(ObjectGroup((65_536,), "uint8"), chunk_tokens=HASH_AT_ONCE_TOKENS)
    async with AsyncCache(CacheConfig(l1_bytes=MIB, l2=[])) as cache:
        writers = Writers(held, None, None, None, None, account)

        def open_writer(number):
            prompt = layout.prompt(range(number, number + 4 * HASH_AT_ONCE_TOKENS), salt="red")
            assert not prompt.hashed, "a thread does that, while others begin"
            message = messages.ReserveStore(number, None, 0, 0)
            return writers.open(message, prompt, lambda most: cache.core.writing.writer(prompt, 0, 0, most=most))

        opened = await asyncio.gather(*map(open_writer, range(3)), return_exceptions=True)
        assert [type(one) for one in opened] == [messages.StoreReserved, LimitError, LimitError]
        assert account.used["reserved_share"] == (await cache.stats()).reserved_bytes == 4 * 65_536
        for writer in list(held.values()):
            writer.undo()
        assert account.used["reserved_share"] == (await cache.stats()).reserved_bytes == 0


async def test_what_is_not_read_waits_for_room_and_who_gives_up_passes_it_on():
    account = account_of(unread_bytes=100)
    await account.take_unread(60)
    waiting = [asyncio.create_task(account.take_unread(60)) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    waiting[0].cancel()
    account.give_unread(60)
    await asyncio.wait(waiting[:2], timeout=60)
    assert waiting[1].done() and not waiting[2].done()
    account.give_unread(60)
    await waiting[2]
    account.give_unread(60)
    assert not account.used["unread_bytes"]


async def test_more_than_all_may_be_sent_where_nothing_else_is():
    account = account_of(unread_bytes=100)
    await account.take_unread(1000)


async def test_who_needs_no_token_has_no_limits():
    account = Account("", UNLIMITED, MIB)
    account.take("requests", 10**9)
    account.lease(MIB)


# The settings.


def settings(text, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(text)
    return ServerConfig.load(path, {})


TENANT = f'[server.tenants.red]\ntokens = ["{RED}"]\n'


def test_the_limits_of_a_tenant_are_those_of_all_but_for_its_own(tmp_path):
    text = f'[server.limits]\nrequests = 7\nunread_bytes = "1MiB"\n{TENANT}[server.tenants.red.limits]\nrequests = 9\n'
    limits = settings(text, tmp_path).tenant_limits()["red"]
    assert (limits.requests, limits.unread_bytes, limits.waiting) == (9, MIB, TenantLimits().waiting)


@pytest.mark.parametrize(
    "line",
    [
        "requests = 0", "requests = -1", "requests = nan", "requests = 1.5", 'requests = "many"', "requests = true",
        "leased_share = nan", "leased_share = inf", "leased_share = 1.5", "leased_share = 0", "leased_share = -0.5",
        "record_bytes = 9223372036854775808", 'record_bytes = "1 XiB"', "no_such_limit = 1",
        "stored_bytes_per_second = 0",
    ],
)  # fmt: skip
@pytest.mark.parametrize("table", ["limits", "tenants.red.limits"])
def test_absurd_limits_are_refused_and_named(tmp_path, table, line):
    with pytest.raises(ConfigError, match=line.split()[0]):
        settings(f"{TENANT}[server.{table}]\n{line}\n", tmp_path)


async def test_a_layout_that_outlives_a_server_does_not_keep_what_counted_it():
    account, layout = Account("", UNLIMITED, MIB), make_layout()
    account.know_layout(layout, 1)
    gone = weakref.ref(account)
    del account
    gc.collect()
    assert gone() is None
    del layout  # and that is told to nobody
