"""Bad input of every public call: a clear error, and nothing held."""

import array
import math

import numpy
import pytest
import torch

from async_cache import AsyncCache, CacheConfig, ConfigError, ModelLayout, ObjectGroup
from async_cache.l2.memory import MemoryBackend
from async_cache.prompt.arguments import check_hint, check_traceparent, start_of
from async_cache.prompt.layout import check_ranks

from .support import (
    LAYOUT,
    PAGE,
    SMALL,
    TWO_RANKS,
    Recorder,
    assert_nothing_held,
    attempt,
    fill,
    make_prompt,
    open_cache,
    read_back,
    seed,
)

PROMPT = make_prompt(3)
WIDE = make_prompt(3, layout=TWO_RANKS)

CALLS = {
    "prefetch of tokens": (TypeError, lambda c: c.prefetch([1, 2, 3, 4])),
    "prefetch of None": (TypeError, lambda c: c.prefetch(None)),
    "prefetch with a number as id": (TypeError, lambda c: c.prefetch(PROMPT, request_id=5)),
    "prefetch with bytes as id": (TypeError, lambda c: c.prefetch(PROMPT, request_id=b"a")),
    "prefetch with a negative skip": (ValueError, lambda c: c.prefetch(PROMPT, skip_tokens=-1)),
    "prefetch with a fractional skip": (TypeError, lambda c: c.prefetch(PROMPT, skip_tokens=4.0)),
    "prefetch with no skip": (TypeError, lambda c: c.prefetch(PROMPT, skip_tokens=None)),
    "prefetch of no ranks": (ValueError, lambda c: c.prefetch(WIDE, ranks=())),
    "prefetch of a rank out of range": (ValueError, lambda c: c.prefetch(WIDE, ranks=(0, 2))),
    "prefetch of a negative rank": (ValueError, lambda c: c.prefetch(WIDE, ranks=(-1,))),
    "prefetch of a rank twice": (ValueError, lambda c: c.prefetch(WIDE, ranks=(0, 0))),
    "prefetch of a rank as text": (TypeError, lambda c: c.prefetch(WIDE, ranks=("0",))),
    "prefetch of ranks as number": (TypeError, lambda c: c.prefetch(WIDE, ranks=1)),
    "prefetch with a negative deadline": (ValueError, lambda c: c.prefetch(PROMPT, deadline_seconds=-1)),
    "prefetch with a deadline that is no number": (ValueError, lambda c: c.prefetch(PROMPT, deadline_seconds=math.nan)),
    "prefetch with a deadline as text": (TypeError, lambda c: c.prefetch(PROMPT, deadline_seconds="1")),
    "prefetch with a traceparent that is too short": (ValueError, lambda c: c.prefetch(PROMPT, traceparent="00")),
    "add_backend at a place as text": (TypeError, lambda c: c.add_backend("memory://x", position="0")),
    "lookup of tokens": (TypeError, lambda c: c.lookup([1, 2, 3, 4])),
    "query_lookup_hits of a number": ((TypeError, KeyError), lambda c: c.query_lookup_hits(5)),
    "query_status of None": ((TypeError, KeyError), lambda c: c.query_status(None)),
    "renew of a number": ((TypeError, KeyError), lambda c: c.renew(5)),
    "read of a number": ((TypeError, KeyError), lambda c: c.read(5)),
    "read with a rank as text": (TypeError, lambda c: c.read("known", rank="0")),
    "read with a reader as text": (TypeError, lambda c: c.read("known", reader="0")),
    "read of a rank out of range": (ValueError, lambda c: c.read("known", rank=1)),
    "read of a reader out of range": (ValueError, lambda c: c.read("known", reader=1)),
    "store of tokens": (TypeError, lambda c: c.store([1, 2, 3, 4])),
    "store of a rank out of range": (ValueError, lambda c: c.store(PROMPT, rank=1)),
    "store of a rank as text": (TypeError, lambda c: c.store(PROMPT, rank="0")),
    "store of a negative start": (ValueError, lambda c: c.store(PROMPT, start_chunk=-1)),
    "store of a fractional start": (TypeError, lambda c: c.store(PROMPT, start_chunk=1.0)),
    "flush with a negative deadline": (ValueError, lambda c: c.flush(deadline_seconds=-1)),
    "flush with an endless deadline": (ValueError, lambda c: c.flush(deadline_seconds=math.inf)),
    "flush with a deadline beyond any float": (ValueError, lambda c: c.flush(deadline_seconds=10**400)),
    "flush with a deadline as text": (TypeError, lambda c: c.flush(deadline_seconds="1")),
    "delete of tokens": (TypeError, lambda c: c.delete([1, 2, 3, 4])),
    "clear of an unknown tier": (ValueError, lambda c: c.clear(tier="l3")),
    "clear of no tier": ((TypeError, ValueError), lambda c: c.clear(tier=None)),
}


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_with_bad_input_raises_and_holds_nothing(name):
    error, call = CALLS[name]
    recorder = Recorder(MemoryBackend())
    await seed(recorder, PROMPT)
    async with open_cache(recorder) as cache:
        await cache.prefetch(PROMPT, request_id="known").load_done
        before = await cache.stats()
        with pytest.raises(error) as caught:
            await attempt(lambda: call(cache))
        assert str(caught.value)
        assert await cache.stats() == before
        await cache.end_request("known")
        await assert_nothing_held(cache, recorder)
        assert await read_back(cache, PROMPT) == 3


async def test_a_bad_prefetch_does_not_take_its_id():
    async with open_cache() as cache:
        with pytest.raises(ValueError, match="skip"):
            cache.prefetch(PROMPT, request_id="a", skip_tokens=-1)
        cache.prefetch(PROMPT, request_id="a")
        await cache.query_status("a")


async def test_a_skip_beyond_the_prompt_leaves_nothing_to_find():
    async with open_cache() as cache:
        await fill(cache, PROMPT)
        try:
            prefetch = cache.prefetch(PROMPT, skip_tokens=1000)
        except ValueError:
            return
        assert (await prefetch.load_done).chunks == 0


TOKENS = {
    "negative": (ValueError, [1, -1, 2, 3]),
    "too large": (ValueError, [1, 2**31, 2, 3]),
    "far too large": (ValueError, [1, 2**70, 2, 3]),
    "floats": (TypeError, [1.0, 2.0, 3.0, 4.0]),
    "a float array": (TypeError, numpy.zeros(4)),
    "a float tensor": (TypeError, torch.zeros(4)),
    "a double buffer": (TypeError, array.array("d", [1, 2, 3, 4])),
    "nested": (TypeError, [[1, 2], [3, 4]]),
    "a matrix": (TypeError, numpy.zeros((2, 2), dtype=numpy.int32)),
    "text": (TypeError, "1234"),
    "bytes": (TypeError, b"1234"),
    "None": (TypeError, None),
    "a number": (TypeError, 5),
    "None inside": (TypeError, [1, None, 2, 3]),
    "negative int64": (ValueError, numpy.array([1, -1, 2, 3])),
    "negative int32": (ValueError, numpy.array([1, -1, 2, 3], dtype=numpy.int32)),
    "large int64": (ValueError, torch.tensor([1, 2**31, 2, 3])),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_that_are_none_raise(name):
    error, tokens = TOKENS[name]
    with pytest.raises(error):
        LAYOUT.prompt(tokens)


@pytest.mark.parametrize(
    "tokens",
    [
        list(range(9)),
        tuple(range(9)),
        range(9),
        array.array("i", range(9)),
        array.array("q", range(9)),
        memoryview(array.array("i", range(9))),
        numpy.arange(9),
        numpy.arange(9, dtype=numpy.int32),
        numpy.arange(9, dtype=numpy.uint16),
        numpy.arange(18)[::2] // 2,
        torch.arange(9),
        torch.arange(9, dtype=torch.int32),
    ],
    ids=lambda tokens: f"{type(tokens).__module__}.{type(tokens).__name__}",
)
def test_every_kind_of_integers_is_the_same_prompt(tokens):
    assert LAYOUT.prompt(tokens).chunk_hashes == LAYOUT.prompt(list(range(9))).chunk_hashes


LABELS = {
    "control characters": (ValueError, "a\nb"),
    "a null": (ValueError, "a\0b"),
    "129 bytes": (ValueError, "x" * 129),
    "65 characters of 2 bytes": (ValueError, "ü" * 65),
    "bytes": (TypeError, b"a"),
    "None": (TypeError, None),
    "half a character": (ValueError, "\ud800"),
}


@pytest.mark.parametrize("where", ["salt", "adapter"])
@pytest.mark.parametrize("name", LABELS)
def test_a_salt_or_adapter_that_is_none_raises(name, where):
    error, value = LABELS[name]
    with pytest.raises(error, match=where):
        LAYOUT.prompt([1, 2, 3, 4], **{where: value})
    with pytest.raises(error, match=where):
        LAYOUT.prompt_from_hashes([b"x" * 32], 4, **{where: value})


MEDIA = {
    "unordered": (ValueError, [(2, b"a"), (1, b"b")]),
    "twice at one place": (ValueError, [(2, b"a"), (2, b"b")]),
    "negative": (ValueError, [(-1, b"a")]),
    "beyond the prompt": (ValueError, [(4, b"a")]),
    "a text digest": (TypeError, [(1, "a")]),
    "an empty digest": (ValueError, [(1, b"")]),
    "a fractional offset": (TypeError, [(1.0, b"a")]),
    "no pair": (TypeError, [1]),
}


@pytest.mark.parametrize("name", MEDIA)
def test_media_that_are_none_raise(name):
    error, media = MEDIA[name]
    with pytest.raises(error):
        LAYOUT.prompt([1, 2, 3, 4], media=media)


@pytest.mark.parametrize(
    ("error", "blocks", "block_tokens"),
    [
        (TypeError, b"x" * 64, 4),
        (TypeError, ["x" * 32], 4),
        (ValueError, [b""], 4),
        (ValueError, [b"x" * 65], 4),
        (ValueError, [b"x" * 32], 3),
        (ValueError, [b"x" * 32], 0),
        (ValueError, [b"x" * 32], 8),
        (TypeError, [b"x" * 32], 4.0),
        (TypeError, None, 4),
    ],
)
def test_block_hashes_that_are_none_raise(error, blocks, block_tokens):
    with pytest.raises(error):
        LAYOUT.prompt_from_hashes(blocks, block_tokens)


@pytest.mark.parametrize(
    ("error", "make"),
    [
        (ValueError, lambda: ObjectGroup((), "uint8")),
        (ValueError, lambda: ObjectGroup((0,), "uint8")),
        (ValueError, lambda: ObjectGroup((-1, 2), "uint8")),
        ((TypeError, ValueError), lambda: ObjectGroup((1.5,), "uint8")),
        (ValueError, lambda: ObjectGroup((4,), "complex64")),
        (ValueError, lambda: ObjectGroup((4,), "uint8", window_chunks=0)),
        (TypeError, lambda: ObjectGroup((4,), "uint8", window_chunks=1.0)),
        (ValueError, lambda: ModelLayout("m", ())),
        ((TypeError, ValueError), lambda: ModelLayout("m", ("uint8",))),
        (ValueError, lambda: ModelLayout("", (SMALL,))),
        (TypeError, lambda: ModelLayout(5, (SMALL,))),
        (ValueError, lambda: ModelLayout("m", (SMALL,), chunk_tokens=0)),
        (TypeError, lambda: ModelLayout("m", (SMALL,), chunk_tokens=256.0)),
        (ValueError, lambda: ModelLayout("m", (SMALL,), world_size=0)),
        (ValueError, lambda: ModelLayout("m", (SMALL,), readers_per_rank=0)),
        (ValueError, lambda: ModelLayout("m", (ObjectGroup((4,), "uint8", ranks=(1,)),))),
        (ValueError, lambda: ModelLayout("m", (ObjectGroup((4,), "uint8", ranks=()),))),
    ],
)
def test_a_layout_that_makes_no_sense_raises(error, make):
    with pytest.raises(error):
        make()


@pytest.mark.parametrize(
    "settings",
    [
        {"l1_bytes": 0},
        {"l1_bytes": -1},
        {"l1_bytes": "1GiB"},
        {"l1_bytes": 1.5},
        {"lookup_timeout_seconds": 0},
        {"lookup_timeout_seconds": -1},
        {"load_timeout_seconds": math.nan},
        {"load_timeout_seconds": "1"},
        {"store_timeout_seconds": -1},
        {"result_ttl_seconds": -1},
        {"lease_ttl_seconds": None},
        {"reservation_ttl_seconds": -5},
        {"prefetch_share": 0},
        {"prefetch_share": 1.5},
        {"writeback_share": -0.5},
        {"writeback_share": 2},
        {"l2": "fs:///tmp"},
        {"l2": [5]},
    ],
    ids=str,
)
def test_a_setting_that_can_not_be_used_stops_the_start(settings):
    with pytest.raises(ConfigError):
        CacheConfig(**settings)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ObjectGroup(16, "uint8"), "shape must be a tuple of integers, not 16"),
        (lambda: ObjectGroup((4,), "uint8", ranks=5), "ranks must be a sequence, not int"),
        (lambda: ModelLayout("m", SMALL), "groups must be a sequence, not ObjectGroup"),
        (lambda: LAYOUT.prompt([1, 2, 3, 4], media=5), "media must be pairs of (token offset, digest), not 5"),
        (lambda: AsyncCache(CacheConfig(quotas="a")), "quotas must be a list of texts as \"salt?l1=2GiB\", not 'a'"),
        (lambda: check_ranks(0, 1), "ranks must be a sequence, not int"),
        (lambda: check_traceparent("00"), "traceparent must have 55 characters, not 2"),
        (lambda: check_hint("5", None, None), "output_tokens must be an int, not str"),
        (lambda: LAYOUT.prompt("hello"), "token ids must be integers, not text: a tokenizer makes them"),
        (lambda: LAYOUT.prompt({"input_ids": [1]}), "token ids must be a flat sequence of integers: a dict is none"),
        (lambda: ObjectGroup((1,), torch.half), "dtype must be a name, such as 'float16', not torch.float16"),
    ],
    ids=range(11),
)
def test_what_is_wrong_is_told_by_its_name(make, told):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert str(caught.value) == told


def test_the_integers_of_a_layout_may_be_those_of_numpy():
    def prompt_of(two):
        group = ObjectGroup((two, 3), "uint8", window_chunks=two)
        layout = ModelLayout("toy", (group,), chunk_tokens=two, world_size=two, readers_per_rank=two)
        return layout.prompt_from_hashes([bytes(32)] * 2, two)

    theirs, ours = prompt_of(numpy.int64(2)), prompt_of(2)
    assert theirs.chunk_hashes == ours.chunk_hashes and theirs.layout == ours.layout
    assert repr(theirs.layout) == repr(ours.layout)
    assert start_of(ours, numpy.int64(3)) == start_of(ours, 3) == 1
    with pytest.raises(ValueError, match="positive integers"):
        ObjectGroup((True,), "uint8")
    with pytest.raises(TypeError, match="chunk_tokens must be an int, not bool"):
        ModelLayout("toy", (ObjectGroup((1,), "uint8"),), chunk_tokens=True)


async def test_a_slice_of_a_lease_or_writer_is_a_tuple_of_its_chunks():
    async with open_cache() as cache:
        async with cache.store(PROMPT) as writer:
            assert writer[1:] == (writer[1], writer[2])
            for chunk in writer:
                chunk.commit()
        await cache.prefetch(PROMPT, request_id="a").load_done
        async with cache.read("a") as lease:
            assert lease[:2] == (lease[0], lease[1])
            assert lease[::-2] == (lease[2], lease[0])


def test_an_unknown_setting_stops_the_start():
    with pytest.raises(TypeError):
        CacheConfig(l1_byte=2**20)
    with pytest.raises(ConfigError):
        CacheConfig.load(environ={"ASYNC_CACHE_L1_BYTE": "1"})


@pytest.mark.parametrize(
    "url", ["nothing://x", "no url at all", "fs://", "memory://?capacity=much", "memory://?what=1"]
)
async def test_a_backend_url_that_can_not_be_used_stops_the_start(url):
    with pytest.raises(ConfigError):
        async with AsyncCache(CacheConfig(l1_bytes=16 * PAGE, l2=[url])):
            pass


async def test_an_l1_smaller_than_a_page_stops_the_start():
    with pytest.raises(ConfigError):
        async with AsyncCache(CacheConfig(l1_bytes=100, l2=[]), backends=[]):
            pass


async def test_what_is_no_backend_or_config_is_refused():
    config = CacheConfig(l1_bytes=16 * PAGE, l2=[])
    for make in (
        lambda: AsyncCache(config, backends=["memory://"]),
        lambda: AsyncCache(config, backends=MemoryBackend()),
        lambda: AsyncCache({"l1_bytes": 16 * PAGE}),
    ):
        with pytest.raises(TypeError):
            async with make():
                pass


async def test_what_a_writer_falls_short_of_is_known_when_it_was_entered():
    async with open_cache() as cache:
        writer = cache.store(PROMPT)
        with pytest.raises(RuntimeError, match="`async with` or `await` it first"):
            _ = writer.shortfall
        async with writer:
            assert writer.shortfall is None
