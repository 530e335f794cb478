"""The two sides of an engine with pages, against a real server."""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from async_cache import BlockingClient, LoadResult, LookupHits, ModelLayout, ObjectGroup, Prompt, connect
from async_cache.advice import Pace
from async_cache.client.prefetches import BlockingPrefetch
from async_cache.integrations.optional import OptionalClient
from async_cache.integrations.paged import (
    AbsentWorker,
    Geometry,
    HostDevice,
    Orders,
    PagedScheduler,
    PagedWorker,
    Pages,
    SaveOrder,
)
from async_cache.integrations.paged import saves as saves_file
from async_cache.integrations.paged.orders import NO_BLOCK, LoadOrder, Tables
from async_cache.integrations.paged.saves import Report, SavesUnderWay
from async_cache.integrations.paged.wishes import wishes_of
from async_cache.l2 import LoadOutcome
from tests.integrations.support import (
    BLOCK,
    CHUNK,
    CheckedDevice,
    Request,
    Served,
    caches,
    geometry,
    pipeline,
    served,
    until,
)

TOKENS = list(range(3 * CHUNK + 2))
BLOCKS = [3, 4, 7, 2, 9, 11, 1]
OTHER_BLOCKS = [12, 2, 5, 6, 1, 8, 3]


class Engine:
    """One scheduler, a worker for each rank, and steps."""

    def __init__(
        self, server: Served, where: Geometry, *stages: Geometry, filled: bool, saves: bool = True, absent: bool = False
    ):
        self.where = where
        of_ranks = [where, *stages] if stages else [where] * where.layout.world_size
        self.client = BlockingClient(server.url)
        self.scheduler = PagedScheduler(OptionalClient(lambda: self.client), where, saves=saves)
        self.caches = [caches(own, filled=filled) for own in of_ranks]
        self.workers: list[Any] = [
            PagedWorker(lambda: connect(server.url), own, CheckedDevice(HostDevice(own, pages)), ranks=[rank])
            if not absent or rank + 1 < len(of_ranks)
            else AbsentWorker([Pages(0, BLOCK, ())])
            for rank, (own, pages) in enumerate(zip(of_ranks, self.caches, strict=True))
        ]
        self.failed: set[int] = set()

    def close(self) -> None:
        self.scheduler.close()
        for worker in self.workers:
            worker.close()

    def step(self, scheduled: dict[str, int], tables: Tables, preempted: tuple[str, ...] = ()) -> Orders:
        orders = self.scheduler.step(scheduled, lambda _: tables, preempted)
        for worker in self.workers:
            worker.preempted(orders.preempted)
            worker.load(orders.loads)
            worker.save(orders.saves)
            worker.finish(orders.finished)
        return orders

    def save(self, request: Request, tables: Tables, identity: dict[str, str] | None = None) -> None:
        """Compute and save all of it, and finish it."""
        self.scheduler.add(request, identity or {}, 0, load=False)
        self.step({request.request_id: request.num_tokens}, tables)
        assert self.scheduler.finish(request.request_id)
        self.step({}, tables)
        for worker in self.workers:
            assert until(worker.sent) == {request.request_id}

    def match(self, request: Request, computed_tokens: int = 0) -> int:
        answer = until(lambda: self.answered(request, computed_tokens))
        assert answer[1] == bool(answer[0])
        tokens: int = answer[0]
        return tokens

    def answered(self, request: Request, computed_tokens: int) -> tuple[int, bool] | None:
        tokens, is_async = self.scheduler.match(request, computed_tokens)
        return None if tokens is None else (tokens, is_async)

    def load(self, request: Request, tables: Tables, tokens: int) -> None:
        self.scheduler.place(request, lambda: tables, tokens)
        self.step({}, tables)
        for worker in self.workers:
            received = until(lambda worker=worker: (r := worker.received()).request_ids and r)
            assert received.request_ids == {request.request_id}
            self.failed |= received.failed_blocks
        self.scheduler.loaded([request.request_id])


@pytest.fixture
def engine(server: Served) -> Iterator[Callable[..., Engine]]:
    with ExitStack() as stack:

        def make(*where: Geometry, filled: bool = False, saves: bool = True, absent: bool = False) -> Engine:
            made = Engine(server, *where, filled=filled, saves=saves, absent=absent)
            stack.callback(made.close)
            return made

        yield make


def holds_nothing(server: Served) -> bool:
    stats = server.stats()
    return not (stats.requests or stats.leases or stats.reserved_bytes)


def test_what_a_request_wishes_to_be_kept_is_kept_when_it_is_saved(
    server: Served, engine: Callable[..., Engine]
) -> None:
    first = engine(geometry(), filled=True)
    wishes = wishes_of({"async_cache": {"retain": [{"tokens": 2 * CHUNK, "ttl": "1h"}, {}], "returns": True}})
    request = Request("a", [*TOKENS, 1, 2, 3])
    first.scheduler.add(request, {}, 0, load=False)
    first.step({"a": request.num_tokens}, (BLOCKS,))
    assert first.scheduler.finish("a", prompt_tokens=len(TOKENS), wishes=wishes)
    assert first.client.retained() == []
    first.step({}, (BLOCKS,))
    assert until(first.workers[0].sent) == {"a"}
    first.scheduler.sent(["a"])
    kept = until(lambda: (kept := first.client.retained()) and len(kept) == 2 and kept)
    assert [(it.chunks, it.clipped, round(it.expires_in_seconds, -2)) for it in kept] == [
        (3, None, 300),
        (2, None, 3600),
    ]
    second = Request("b", TOKENS)
    first.scheduler.add(second, {}, len(TOKENS), load=False)  # the engine holds it all: nothing is to be saved first
    assert not first.scheduler.finish(
        "b", prompt_tokens=len(TOKENS), wishes=wishes_of({"async_cache": {"retain": [{"ttl": 0}]}})
    )
    assert until(lambda: len(first.client.retained()) == 1)


@pytest.mark.parametrize(
    "wish",
    [{"retain": [{"ttl": "2h"}]}, {"retain": [{"tokens": -1}]}, {"retain": [{"ttl": -1}]}, {"retain": [{}] * 5},
     {"returns": "x"}, {"within_seconds": float("nan")}, {"more": 1}, []],
)  # fmt: skip
def test_wishes_that_cannot_be_are_refused(wish: object) -> None:
    assert wishes_of(None) == wishes_of({"other": 1}) == wishes_of({"async_cache": {}})
    with pytest.raises(ValueError, match=r".+"):
        wishes_of({"async_cache": wish})


def test_what_one_engine_saved_another_loads_into_other_blocks(server: Served, engine: Callable[..., Engine]) -> None:
    where = geometry(world_size=2)
    first, second = engine(where, filled=True), engine(where)
    first.save(Request("a", TOKENS), (BLOCKS,))
    server.forget()
    request = Request("b", TOKENS)
    second.scheduler.add(request, {}, 0, load=True)
    assert second.match(request) == 3 * CHUNK
    second.load(request, (OTHER_BLOCKS,), 3 * CHUNK)
    assert not second.failed
    for ours, theirs in zip(first.caches, second.caches, strict=True):
        for layer in ours:
            assert torch.equal(ours[layer][BLOCKS[:6]], theirs[layer][OTHER_BLOCKS[:6]])
            assert not theirs[layer][OTHER_BLOCKS[6]].any()
    until(lambda: holds_nothing(server))


def test_one_passage_behind_a_fixed_context_is_a_leading_run_whatever_follows(
    server: Served, engine: Callable[..., Engine]
) -> None:
    first, second = engine(geometry(), filled=True), engine(geometry())
    context, one, other, question = (list(range(1000 * n, 1000 * n + CHUNK)) for n in range(4))
    salted = {"salt": "passages"}
    first.save(Request("a", [*context, *one, *other, *question]), ([*BLOCKS, 8],), salted)
    for name, tokens, identity, found in (
        ("the same passage", [*context, *one, *question], salted, 2),
        ("and another one", [*context, *one, *question, *other], salted, 2),
        ("the passage behind another one", [*context, *other, *one], salted, 1),
        ("without its context", [*one, *question], salted, 0),
        ("under another salt", [*context, *one, *question], {}, 0),
    ):
        request = Request(name, [*tokens, 1])
        second.scheduler.add(request, identity, 0, load=True)
        assert second.match(request) == found * CHUNK
        second.scheduler.finish(name)
        second.step({}, ())
    until(lambda: holds_nothing(server))


def test_chunks_are_copied_while_the_rest_is_still_on_its_way(server: Served, engine: Callable[..., Engine]) -> None:
    where = geometry()
    first, second = engine(where, filled=True), engine(where)
    first.save(Request("a", TOKENS), (BLOCKS,))
    server.forget()
    prompts = [where.layout.prompt(TOKENS[: chunks * CHUNK]) for chunks in (1, 3)]
    with BlockingClient(server.url) as client:
        assert client.warm(prompts[0]).chunks == 1
        server.hold("load")
        client.prefetch(prompts[1], request_id="r")
        worker, ours, theirs = second.workers[0], first.caches[0], second.caches[0]
        worker.load([LoadOrder("b", "r", 0, 3 * CHUNK, (OTHER_BLOCKS,))])
        until(lambda: all(torch.equal(ours[layer][BLOCKS[:2]], theirs[layer][OTHER_BLOCKS[:2]]) for layer in ours))
        assert not worker.received().request_ids
        server.release()
        until(lambda: "b" in worker.received().request_ids)
        for layer in ours:
            assert torch.equal(ours[layer][BLOCKS[:6]], theirs[layer][OTHER_BLOCKS[:6]])
        client.end_request("r")
    until(lambda: holds_nothing(server))


def test_what_the_engine_has_is_not_loaded_again(server: Served, engine: Callable[..., Engine]) -> None:
    where = geometry()
    first, second = engine(where, filled=True), engine(where)
    first.save(Request("a", TOKENS), (BLOCKS,))
    request = Request("b", TOKENS)
    second.scheduler.add(request, {}, CHUNK + 4, load=True)
    assert second.match(request, CHUNK + 4) == 2 * CHUNK - 4
    second.load(request, (OTHER_BLOCKS,), 2 * CHUNK - 4)
    for layer, pages in second.caches[0].items():
        assert torch.equal(first.caches[0][layer][BLOCKS[3:6]], pages[OTHER_BLOCKS[3:6]])
        assert not pages[OTHER_BLOCKS[:3]].any()


def test_what_the_engine_has_lost_since_is_looked_up_again(server: Served, engine: Callable[..., Engine]) -> None:
    where = geometry()
    engine(where, filled=True).save(Request("a", TOKENS), (BLOCKS,))
    second, request = engine(where), Request("b", TOKENS)
    second.scheduler.add(request, {}, 2 * CHUNK, load=True)
    assert second.match(request, 0) == 3 * CHUNK


def test_a_window_is_saved_while_it_is_there_and_loaded_where_it_is_needed(
    server: Served, engine: Callable[..., Engine]
) -> None:
    where = geometry(windows=(None, 1))
    first, second = engine(where, filled=True), engine(where)
    first.save(Request("a", TOKENS), (BLOCKS, BLOCKS))
    first.save(Request("c", [9, *TOKENS]), (BLOCKS, [NO_BLOCK, *BLOCKS[1:]]))
    assert server.stats().l1_chunks == 3 + 2
    request = Request("b", TOKENS)
    second.scheduler.add(request, {}, 0, load=True)
    tables = (OTHER_BLOCKS, [NO_BLOCK] * 4 + OTHER_BLOCKS[4:])
    second.load(request, tables, second.match(request))
    pages = second.caches[0]
    assert torch.equal(pages["0.0"][OTHER_BLOCKS[:6]], first.caches[0]["0.0"][BLOCKS[:6]])
    assert torch.equal(pages["1.0"][OTHER_BLOCKS[4:6]], first.caches[0]["1.0"][BLOCKS[4:6]])
    assert not pages["1.0"][[NO_BLOCK, *OTHER_BLOCKS[:4]]].any()


def test_the_answer_waits_for_nothing(server: Served, engine: Callable[..., Engine]) -> None:
    where = geometry()
    engine(where, filled=True).save(Request("a", TOKENS), (BLOCKS,))
    server.forget()
    server.hold("lookup", "load")
    second, request = engine(where), Request("b", TOKENS)
    second.scheduler.add(request, {}, 0, load=True)
    assert second.scheduler.match(request, 0) == (None, False)
    server.release()
    assert second.match(request) == 3 * CHUNK


def test_a_miss_and_a_prompt_without_a_whole_chunk_hold_nothing(server: Served, engine: Callable[..., Engine]) -> None:
    only = engine(geometry())
    for tokens in (TOKENS, TOKENS[:CHUNK]):
        request = Request(str(len(tokens)), tokens)
        only.scheduler.add(request, {}, 0, load=True)
        assert only.match(request) == 0
    until(lambda: holds_nothing(server))


def test_each_chunk_is_saved_once_also_of_what_is_generated(server: Served, engine: Callable[..., Engine]) -> None:
    only, request = engine(geometry(), filled=True), Request("a", TOKENS[:10])
    only.scheduler.add(request, {}, 0, load=False)
    saved = []
    for step in (6, 4, *[1] * 14):
        orders = only.step({"a": step}, (BLOCKS,))
        saved += [(order.start_chunk, len(order.prompt)) for order in orders.saves]
        request.num_computed_tokens += step
        if request.num_computed_tokens == request.num_tokens:
            request.all_token_ids.append(TOKENS[request.num_tokens])
    assert saved == [(0, 1), (1, 2), (2, 3)]


def test_a_preempted_request_is_looked_up_with_what_it_generated(server: Served, engine: Callable[..., Engine]) -> None:
    only, request = engine(geometry(), filled=True), Request("a", TOKENS[:-CHUNK])
    only.scheduler.add(request, {}, 0, load=True)
    assert only.match(request) == 0
    only.scheduler.place(request, lambda: (BLOCKS,), 0)
    request.all_token_ids = TOKENS
    only.step({"a": len(TOKENS)}, (BLOCKS,))
    only.step({}, (BLOCKS,), preempted=("a",))
    assert not only.workers[0].sent()
    request.num_preemptions, request.num_computed_tokens = 1, 0
    assert only.match(request) == 3 * CHUNK
    only.load(request, (OTHER_BLOCKS,), 3 * CHUNK)
    assert torch.equal(only.caches[0]["0.0"][BLOCKS[5]], only.caches[0]["0.0"][OTHER_BLOCKS[5]])
    assert not only.scheduler.finish("a")  # its saves ended with the preemption
    until(lambda: holds_nothing(server))


@pytest.mark.parametrize("stage", ["lookup", "load", "loaded", "placed"])
def test_an_abort_gives_back_everything_in_every_stage(
    server: Served, engine: Callable[..., Engine], stage: str
) -> None:
    where = geometry()
    engine(where, filled=True).save(Request("a", TOKENS), (BLOCKS,))
    server.forget()
    if stage in ("lookup", "load"):
        server.hold(stage)
    second, request = engine(where, saves=False), Request("b", TOKENS)
    second.scheduler.add(request, {}, 0, load=True)
    if stage in ("loaded", "placed"):
        assert second.match(request) == 3 * CHUNK
    if stage == "placed":
        second.scheduler.place(request, lambda: (OTHER_BLOCKS,), 3 * CHUNK)
        second.scheduler.finish("b")
        second.step({}, (OTHER_BLOCKS,))
        assert until(lambda: second.workers[0].received().request_ids) == {"b"}  # for the engine waits for it
    else:
        assert not second.scheduler.finish("b")
    server.release()
    until(lambda: holds_nothing(server))


def test_blocks_that_a_load_does_not_fill_are_told(server: Served, engine: Callable[..., Engine]) -> None:
    where = geometry()
    engine(where, filled=True).save(Request("a", TOKENS), (BLOCKS,))
    second, request = engine(where), Request("b", TOKENS)
    second.scheduler.add(request, {}, 0, load=True)
    tokens = second.match(request)
    assert second.scheduler._records["b"].prefetch is not None
    second.client.end_request(second.scheduler._records["b"].prefetch.request_id)
    second.load(request, (OTHER_BLOCKS,), tokens)
    assert second.failed == set(OTHER_BLOCKS[:6])
    assert second.scheduler.match(request, 0) == (0, False), "what failed is computed"


def test_a_load_that_does_not_end_is_given_up_and_computed(
    server: Served, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("async_cache.integrations.paged.copies._LOAD_SECONDS", 0.05)
    where = geometry()
    engine(where, filled=True).save(Request("a", TOKENS), (BLOCKS,))
    server.forget()
    server.hold("load")
    second, request = engine(where, saves=False), Request("b", TOKENS)
    second.scheduler.add(request, {}, 0, load=True)
    prefetch = second.scheduler._records["b"].prefetch
    assert prefetch is not None and prefetch.lookup_done.result(60).chunks == 3
    second.load(request, (OTHER_BLOCKS,), 3 * CHUNK)
    assert second.failed == set(OTHER_BLOCKS[:6])
    server.release()
    until(lambda: holds_nothing(server))


def test_a_server_that_goes_away_is_one_line_and_a_miss(
    server: Served, engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    only = engine(geometry())
    server.stop()
    until(lambda: only.client._thread.client._links.current is None)  # type: ignore[union-attr]
    with caplog.at_level(logging.WARNING):
        for n in range(3):
            request = Request(str(n), TOKENS)
            only.scheduler.add(request, {}, 0, load=True)
            assert only.match(request) == 0
    assert [record.message for record in caplog.records if "without the cache" in record.message][1:] == []


def test_a_server_that_comes_later_is_used_from_then_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url, where = f"unix://{tmp_path}/s", geometry()
    scheduler = PagedScheduler(OptionalClient(lambda: BlockingClient(url), retry_seconds=0.01), where)
    request, early = Request("a", TOKENS), Request("early", TOKENS)
    try:
        scheduler.add(early, {}, 0, load=True)
        assert scheduler.match(early, 0) == (0, False)
        assert not scheduler.step({"early": len(TOKENS)}, lambda _: (BLOCKS,)).saves
        assert not scheduler.finish("early"), "no worker has to save anything"
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        with served(tmp_path):

            def is_asked() -> bool:
                scheduler.add(request, {}, 0, load=True)
                return scheduler.match(request, 0) == (None, False)

            until(is_asked)
            until(lambda: scheduler.match(request, 0) == (0, False))
            assert [order.start_chunk for order in scheduler.step({"a": len(TOKENS)}, lambda _: (BLOCKS,)).saves] == [0]
            scheduler.close()
    finally:
        scheduler.close()


class Scripted:
    """A client whose futures are resolved by the test."""

    def __init__(self) -> None:
        self.prefetches: list[BlockingPrefetch] = []
        self.prompts: list[Prompt] = []
        self.ended: list[str] = []
        self.failures: list[Exception] = []
        self.result_ttl_seconds = 60.0
        self.messages = 7
        self.error: Exception | None = None
        self.cleared: list[str] = []

    def heard(self) -> int:
        return self.messages

    def failed(self, error: Exception) -> None:
        self.failures.append(error)

    def get(self) -> "Scripted":
        if self.error is not None:
            raise self.error
        return self

    def clear(self, tier: str, *, timeout_seconds: float) -> None:
        self.cleared.append(tier)

    def prefetch(self, prompt: Prompt, *, skip_tokens: int) -> BlockingPrefetch:
        self.prompts.append(prompt)
        self.prefetches.append(BlockingPrefetch(f"read-{len(self.prefetches)}", lambda _: None))
        return self.prefetches[-1]

    def end_request_nowait(self, request_id: str) -> None:
        self.ended.append(request_id)

    def close(self) -> None:
        pass


def hits(expected: float | None, recompute_from: int | None = None) -> LookupHits:
    return LookupHits(
        request_id="", start_chunk=0, chunks=3, tokens=24, l1_chunks=0, l2_chunks=3, found_chunks=3,
        expected_load_seconds=expected, recompute_from=recompute_from,
    )  # fmt: skip


def result(chunks: int, seconds: float) -> LoadResult:
    return LoadResult(request_id="", start_chunk=0, chunks=chunks, tokens=0, l1_chunks=0, l2_chunks=0, seconds=seconds)


def load(prefetch: BlockingPrefetch, seconds: float) -> None:
    """All of it is found, and loaded in that time."""
    prefetch.lookup_done.set_result(hits(expected=0.0))
    prefetch.load_done.set_result(result(3, seconds))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[PagedScheduler, Scripted, list[float]]]:
    monkeypatch.setattr("async_cache.integrations.paged.scheduler._LOOKUP_SECONDS", 2.0)  # of its own clock
    client, now = Scripted(), [100.0]
    scheduler = PagedScheduler(client, geometry(), threshold_seconds=0.1, clock=lambda: now[0])  # type: ignore[arg-type]
    yield scheduler, client, now
    scheduler.close()


def test_a_load_gets_blocks_when_it_is_expected_to_end_within_the_threshold(
    scripted: tuple[PagedScheduler, Scripted, list[float]],
) -> None:
    scheduler, client, now = scripted
    request = Request("a", TOKENS)
    scheduler.add(request, {}, 0, load=True)
    client.prefetches[0].lookup_done.set_result(hits(expected=0.5))
    answers = []
    for _ in range(8):
        answers.append(scheduler.match(request, 0)[0])
        now[0] += 0.1
    assert answers[:4] == [None] * 4 and answers[5] == 24
    assert answers[7] is None, "the expectation has failed: the load may take any time"
    client.prefetches[0].load_done.set_result(result(2, 0.8))
    assert scheduler.match(request, 0) == (16, True)


def test_what_is_faster_to_compute_is_not_loaded(scripted: tuple[PagedScheduler, Scripted, list[float]]) -> None:
    scheduler, client, _ = scripted
    request = Request("a", TOKENS)
    scheduler.add(request, {}, 0, load=True)
    client.prefetches[0].lookup_done.set_result(hits(expected=9.0, recompute_from=2))
    assert scheduler.match(request, 0) == (None, False), "it asks for what is in memory"
    assert client.ended == [client.prefetches[0].request_id]
    assert [len(prompt) for prompt in client.prompts] == [len(TOKENS) // CHUNK, 2]
    client.prefetches[1].lookup_done.set_result(hits(expected=0.0))
    client.prefetches[1].load_done.set_result(result(2, 0.0))
    assert scheduler.match(request, 0)[0] == 2 * CHUNK

    whole = Request("b", TOKENS)
    scheduler.add(whole, {}, 0, load=True)
    client.prefetches[2].lookup_done.set_result(hits(expected=9.0, recompute_from=0))
    assert scheduler.match(whole, 0) == (0, False), "all of it is computed, at once"
    assert client.prefetches[2].request_id in client.ended and len(client.prefetches) == 3


def test_what_this_engine_computes_faster_by_its_measured_pace_is_not_loaded() -> None:
    client, now = Scripted(), [100.0]
    scheduler = PagedScheduler(client, geometry(), advises=True, clock=lambda: now[0])  # type: ignore[arg-type]

    def answer(name: str, expected_load_seconds: float) -> Any:
        request = Request(name, TOKENS)
        scheduler.add(request, {}, 0, load=True)
        client.prefetches[-1].lookup_done.set_result(hits(expected_load_seconds))
        return scheduler.match(request, 0)

    def step(tokens: int, seconds: float) -> None:
        scheduler.step({"other": tokens}, lambda _: None)
        now[0] += seconds

    assert answer("unknown", 9.0) == (None, False), "it waits for the load: no pace is known"
    step(4096, 4.0)
    step(1, 0.5)  # only decoding: it says nothing
    assert scheduler._pace is not None and scheduler._pace.tokens_per_second == 1024
    now[0] += 60.0
    assert answer("slow to load", 1.0) == (0, False), "24 tokens are computed in a fortieth of a second"
    now[0] += 60.0
    assert answer("fast to load", 0.01)[0] == 24
    scheduler.close()


def test_the_pace_of_an_engine_is_that_of_its_steps_and_hardly_that_of_its_pauses() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    for _ in range(40):
        pace.step(2048)
        now[0] += 0.5
    assert pace.tokens_per_second == 4096
    now[0] += 60.0  # nothing to do
    pace.step(2048)
    assert 0.96 * 4096 < pace.tokens_per_second < 4096
    for _ in range(20):
        now[0] += 0.25
        pace.step(2048)
    assert 0.99 * 8192 < pace.tokens_per_second <= 8192


def test_a_load_of_which_nothing_is_known_gets_blocks_when_it_has_ended(
    scripted: tuple[PagedScheduler, Scripted, list[float]],
) -> None:
    scheduler, client, _ = scripted
    request = Request("a", TOKENS)
    scheduler.add(request, {}, 0, load=True)
    client.prefetches[0].lookup_done.set_result(hits(expected=None))
    assert scheduler.match(request, 0) == (None, False)
    client.prefetches[0].load_done.set_result(result(3, 1.0))
    assert scheduler.match(request, 0) == scheduler.match(request, 0) == (24, True)


def test_who_finds_too_few_blocks_lets_others_go_first_while_they_are_on_their_way_to_others() -> None:
    client, now, free = Scripted(), [100.0], [0]
    where = Geometry(
        geometry(windows=(None, None, None)).layout,
        (Pages(0, BLOCK, ("0",)), Pages(0, BLOCK, ("1",)), Pages(1, BLOCK, ("2",))),
    )
    scheduler = PagedScheduler(client, where, free_blocks=lambda: free[0], clock=lambda: now[0])  # type: ignore[arg-type]
    requests = [Request(name, TOKENS) for name in "abc"]  # of 26 tokens, that is 7 blocks in each of two tables
    for request in requests:
        scheduler.add(request, {}, 0, load=True)
        load(client.prefetches[-1], 0.0)
    first, second, third = requests
    assert scheduler.match(first, 0) == (24, True), "nothing arrives: the engine has its own order"
    scheduler.place(first, lambda: (BLOCKS, BLOCKS), 24)
    free[0] = 13
    assert scheduler.match(second, 0) == (None, False), "it would be loaded, and then wait for its last blocks"
    free[0] = 14
    assert scheduler.match(second, 0) == (24, True)
    scheduler.place(second, lambda: (BLOCKS, BLOCKS), 24)
    free[0] = 15
    assert scheduler.match(third, 0) == (None, False), "the two that load need two blocks each for what they compute"
    assert scheduler.match(third, BLOCK) == (20, True), "the engine has a block of each table already"
    scheduler.finish("a")
    assert scheduler.match(third, 0) == (24, True)
    free[0] = 0
    for seconds, answer in ((0.0, (None, False)), (1.9, (None, False)), (0.2, (24, True)), (0.0, (24, True))):
        now[0] += seconds
        assert scheduler.match(third, 0) == answer, "not for ever"
    free[0] = 14
    assert scheduler.match(third, 0) == (24, True)
    free[0] = 0
    scheduler.loaded(["b"])
    scheduler.place(second, lambda: (BLOCKS, BLOCKS), 0)
    assert scheduler.match(third, 0) == (None, False), "what has loaded is not computed yet"
    second.num_computed_tokens = 24
    scheduler.step({"b": 2}, lambda _: (BLOCKS, BLOCKS))
    assert scheduler.match(third, 0) == (24, True)
    scheduler.close()


def test_blocks_that_a_window_has_passed_are_not_needed() -> None:
    where = geometry(windows=(None, 1))  # two blocks a chunk; a window of one chunk has two chunks of blocks at most
    assert [where.blocks(tokens) for tokens in (0, 4, 5, 16, 80)] == [0, 2, 4, 8, 24]


@pytest.mark.parametrize("answers_others", [False, True])
def test_a_server_that_does_not_answer_is_given_up(
    scripted: tuple[PagedScheduler, Scripted, list[float]], answers_others: bool
) -> None:
    scheduler, client, now = scripted
    request = Request("a", TOKENS)
    scheduler.add(request, {}, 0, load=True)
    client.messages += answers_others
    for seconds, answer in ((1.9, (None, False)), (0.5, (None, False)), (0.2, (0, False)), (0.0, (0, False))):
        now[0] += seconds
        assert scheduler.match(request, 0) == answer
    assert client.ended == ["read-0"]
    assert [type(error) for error in client.failures] == [TimeoutError] * (not answers_others)


def test_an_answer_that_came_while_the_process_was_held_counts(
    scripted: tuple[PagedScheduler, Scripted, list[float]],
) -> None:
    scheduler, client, now = scripted
    request = Request("a", TOKENS)
    scheduler.add(request, {}, 0, load=True)
    now[0] += 60
    assert scheduler.match(request, 0) == (None, False)
    client.prefetches[0].lookup_done.set_result(hits(expected=0.0))
    client.prefetches[0].load_done.set_result(result(3, 59.0))
    assert scheduler.match(request, 0) == (24, True)


def test_what_the_server_keeps_for_a_short_time_is_asked_for_anew_in_time(
    scripted: tuple[PagedScheduler, Scripted, list[float]],
) -> None:
    scheduler, client, now = scripted
    client.result_ttl_seconds = 2.0
    request = Request("a", TOKENS)
    scheduler.add(request, {}, 0, load=True)
    load(client.prefetches[0], 1.0)
    now[0] += 1.9
    assert scheduler.match(request, 0) == (24, True)
    now[0] += 0.2
    assert scheduler.match(request, 0) == (None, False)
    assert len(client.prefetches) == 2


def test_who_is_not_to_be_loaded_is_not_loaded_after_a_preemption(
    scripted: tuple[PagedScheduler, Scripted, list[float]],
) -> None:
    scheduler, client, _ = scripted
    request = Request("a", TOKENS)
    scheduler.add(request, {}, 0, load=False)
    request.num_preemptions = 1
    assert scheduler.match(request, 0) == (0, False)
    assert not client.prefetches


def test_what_the_engine_held_is_saved_too_for_the_server_may_lack_it(
    scripted: tuple[PagedScheduler, Scripted, list[float]],
) -> None:
    scheduler, _, now = scripted
    request = Request("a", TOKENS, num_computed_tokens=2 * CHUNK)
    scheduler.add(request, {}, 2 * CHUNK, load=True)
    (order,) = scheduler.step({"a": CHUNK + 2}, lambda _: (BLOCKS,)).saves
    assert (order.start_chunk, len(order.prompt)) == (0, 3)
    for seconds, start_chunk in ((1.0, 2), (30.0, 0)):
        now[0] += seconds
        scheduler.add(request, {}, 2 * CHUNK, load=True)
        (order,) = scheduler.step({"a": CHUNK + 2}, lambda _: (BLOCKS,)).saves
        assert (order.start_chunk, len(order.prompt)) == (start_chunk, 3), "not for each request"


def test_chunks_before_an_image_are_saved(scripted: tuple[PagedScheduler, Scripted, list[float]]) -> None:
    scheduler, _, _ = scripted
    media = [(CHUNK + 1, b"first"), (3 * CHUNK + 1, b"in the tail")]
    request = Request("a", TOKENS)
    scheduler.add(request, {"media": media}, 0, load=True)
    saves = []
    for _ in range(3):
        saves += scheduler.step({"a": CHUNK}, lambda _: (BLOCKS,)).saves
        request.num_computed_tokens += CHUNK
    assert [(order.start_chunk, len(order.prompt)) for order in saves] == [(0, 1), (1, 2), (2, 3)]
    whole = geometry().layout.prompt(TOKENS, media=media)
    assert [order.prompt.chunk_hashes[-1] for order in saves] == whole.chunk_hashes


def test_a_reset_empties_the_server_and_forgets_what_it_has_said(server: Served, engine: Callable[..., Engine]) -> None:
    only, request = engine(geometry(), filled=True), Request("b", TOKENS)
    only.save(Request("a", TOKENS), (BLOCKS,))
    only.scheduler.add(request, {}, 0, load=True)
    assert only.match(request) == 3 * CHUNK
    assert only.scheduler.reset()
    assert only.match(request) == 0
    assert server.stats().l1_chunks == 0


class HeldCopies:
    """The copies of a worker's device, which wait until they are let go."""

    def __init__(self, worker: PagedWorker):
        self.may_go = threading.Event()
        assert isinstance(worker._device.inner, HostDevice)
        worker._device.inner._copier.submit(self.may_go.wait, 10)


def preempt(request: Request) -> None:
    """As vLLM's `reset_prefix_cache` does: no step follows."""
    request.num_preemptions += 1
    request.num_computed_tokens = 0


def test_a_reset_succeeds_when_the_saves_of_preempted_requests_have_ended(
    server: Served, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    only, request = engine(geometry(world_size=2), filled=True), Request("a", TOKENS)
    held = [HeldCopies(worker) for worker in only.workers]
    only.scheduler.add(request, {}, 0, load=False)
    only.step({"a": len(TOKENS)}, (BLOCKS,))
    preempt(request)
    with monkeypatch.context() as patch:
        patch.setattr("async_cache.integrations.paged.resets._RESET_SECONDS", 0.01)
        assert not only.scheduler.reset(), "what is being saved would come after it"
        held[0].may_go.set()
        assert not only.scheduler.reset(), "the other rank saves still"
    wait_for = SavesUnderWay.wait

    def wait(saves: SavesUnderWay, timeout_seconds: float) -> bool:
        held[1].may_go.set()
        return wait_for(saves, timeout_seconds)

    monkeypatch.setattr(SavesUnderWay, "wait", wait)
    assert only.scheduler.reset(), "it waits for them"
    for worker in only.workers:
        worker.settle()
    assert server.stats().l1_chunks == 0
    assert not only.scheduler.finish("a"), "nothing of it is being saved"
    only.save(Request("b", TOKENS), (BLOCKS,))
    assert server.stats().l1_chunks == 3, "the cache is used again"


def test_a_reset_that_fails_is_made_up_for_before_the_cache_is_used(
    server: Served, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    only, request = engine(geometry(), filled=True), Request("a", TOKENS)
    only.save(Request("before", [9, *TOKENS]), (BLOCKS,))
    held = HeldCopies(only.workers[0])
    only.scheduler.add(request, {}, 0, load=False)
    only.step({"a": len(TOKENS)}, (BLOCKS,))
    preempt(request)
    monkeypatch.setattr("async_cache.integrations.paged.resets._RESET_SECONDS", 0.01)
    assert not only.scheduler.reset()
    monkeypatch.undo()
    later = Request("later", [9, *TOKENS])
    only.scheduler.add(later, {}, 0, load=True)
    assert only.scheduler.match(later, 0) == (0, False)
    assert not only.step({"later": len(TOKENS)}, (OTHER_BLOCKS,)).saves
    held.may_go.set()

    def is_used() -> bool:
        again = Request("again", [9, *TOKENS])
        only.scheduler.add(again, {}, 0, load=True)
        return only.scheduler.match(again, 0) == (None, False)

    until(is_used)
    assert server.stats().l1_chunks == 0


def test_without_a_server_there_is_nothing_to_reset_and_one_that_comes_is_emptied_first(
    server: Served, engine: Callable[..., Engine]
) -> None:
    where = geometry()
    engine(where, filled=True).save(Request("before", TOKENS), (BLOCKS,))
    urls = ["unix:///nowhere/s"]
    client = OptionalClient(lambda: BlockingClient(urls[0]), retry_seconds=0.01)
    scheduler = PagedScheduler(client, where)
    try:
        assert scheduler.reset()
        urls[0] = server.url

        def is_used() -> bool:
            request = Request("a", TOKENS)
            scheduler.add(request, {}, 0, load=True)
            return scheduler.match(request, 0) == (None, False)

        until(is_used)
        assert server.stats().l1_chunks == 0
    finally:
        scheduler.close()
    assert scheduler.reset(), "nor after the end"


def test_what_was_computed_before_a_reset_is_not_saved_after_it(server: Served, engine: Callable[..., Engine]) -> None:
    only, running = engine(geometry(), filled=True), Request("a", TOKENS)
    only.scheduler.add(running, {}, 0, load=False)
    only.step({"a": CHUNK}, (BLOCKS,))
    running.num_computed_tokens = CHUNK
    assert only.scheduler.reset()
    assert not only.step({"a": CHUNK}, (BLOCKS,)).saves, "it goes on with what it had"
    preempt(running)
    only.step({}, (BLOCKS,), preempted=("a",))
    assert [order.start_chunk for order in only.step({"a": CHUNK}, (BLOCKS,)).saves] == [0]
    only.workers[0].settle()
    assert only.scheduler.finish("a")


def test_a_server_that_is_silent_is_not_emptied(scripted: tuple[PagedScheduler, Scripted, list[float]]) -> None:
    scheduler, client, _ = scripted
    request = Request("a", TOKENS)
    client.error = TimeoutError("silent")
    assert not scheduler.reset()
    client.error = None
    scheduler.add(request, {}, 0, load=True)
    until(lambda: client.cleared)
    until(lambda: scheduler.add(request, {}, 0, load=True) or client.prefetches)


def test_a_reset_that_cannot_be_made_up_for_yet_raises_nothing(
    scripted: tuple[PagedScheduler, Scripted, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, client, _ = scripted
    client.error = TimeoutError("silent")
    assert not scheduler.reset()
    client.error = None

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        request = Request("a", TOKENS)
        scheduler.add(request, {}, 0, load=True)
        assert scheduler.match(request, 0) == (0, False)
        assert not scheduler.step({"a": len(TOKENS)}, lambda _: (BLOCKS,)).saves


def test_the_end_of_a_save_is_heard_of_from_another_process() -> None:
    saves = SavesUnderWay(2)
    reports = [saves.begin(), saves.begin()]
    code = (  # that file alone: to import the package brings torch, four times
        "import runpy, sys; Report = runpy.run_path(sys.argv[1])['Report']; "
        "Report(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])).send()"
    )
    try:
        for report, left in zip([reports[1], reports[0], reports[0], reports[1]], [2, 2, 1, 0], strict=True):
            given = [report.path, str(report.inode), str(report.number)]
            subprocess.run([sys.executable, "-c", code, saves_file.__file__, *given], check=True, timeout=150)
            assert len(saves) == left
        assert saves.wait(0)
    finally:
        saves.close()
    with pytest.raises(FileNotFoundError):
        reports[0].send()


def test_a_pipe_that_has_become_another_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileNotFoundError):
        Report(str(tmp_path / "file"), (tmp_path / "file").stat().st_ino, 1).send()
    assert (tmp_path / "file").read_bytes() == b""


def test_a_report_that_is_lost_holds_up_no_reset_for_ever() -> None:
    now = [0.0]
    saves = SavesUnderWay(1, lambda: now[0])
    try:
        saves.begin()
        now[0] = 299.0
        assert len(saves) == 1 and not saves.wait(0)
        now[0] = 301.0
        assert saves.wait(0)
    finally:
        saves.close()


@pytest.mark.parametrize("ahead", range(14))
@pytest.mark.parametrize("tokens", [8, 14, 15, 16, 23])
def test_counts_that_run_ahead_of_the_tokens_save_what_there_is(
    scripted: tuple[PagedScheduler, Scripted, list[float]], tokens: int, ahead: int
) -> None:
    scheduler, _, _ = scripted
    request = Request("a", TOKENS[:tokens], num_computed_tokens=tokens + ahead)
    scheduler.add(request, {}, 0, load=False)
    (order,) = scheduler.step({"a": 1}, lambda _: (BLOCKS,)).saves
    assert (order.start_chunk, len(order.prompt)) == (0, tokens // CHUNK)


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")  # as in an engine
@pytest.mark.parametrize("blocks", range(7))
def test_a_chunk_for_which_a_block_table_is_too_short_is_not_saved(
    server: Served, engine: Callable[..., Engine], blocks: int
) -> None:
    for windows in ((None,), (None, 1)):
        tables = tuple(BLOCKS[:blocks] if table == len(windows) - 1 else BLOCKS for table in range(len(windows)))
        only = engine(geometry(windows=windows), filled=True)
        only.save(Request("a", TOKENS), tables)
        assert server.stats().l1_chunks == blocks * BLOCK // CHUNK
        server.run(lambda cache: cache.clear("all"))


@pytest.mark.parametrize(("blocks", "told"), [(6, set()), (5, {12, 2, 5, 6, 1}), (1, {12}), (0, set())])
def test_a_load_for_which_a_block_table_is_too_short_is_refused_and_told(
    server: Served, engine: Callable[..., Engine], blocks: int, told: set[int]
) -> None:
    where = geometry()
    engine(where, filled=True).save(Request("a", TOKENS), (BLOCKS,))
    second, request = engine(where), Request("b", TOKENS)
    second.scheduler.add(request, {}, 0, load=True)
    second.load(request, (OTHER_BLOCKS[:blocks],), second.match(request))
    assert second.failed == told
    assert second.caches[0]["0.0"].any() == (blocks == 6)


def test_tokens_without_a_block_are_told_by_the_last_block_that_there_is(
    server: Served, engine: Callable[..., Engine]
) -> None:
    where = geometry()
    engine(where, filled=True).save(Request("a", TOKENS), (BLOCKS,))
    second, request = engine(where), Request("b", TOKENS)
    second.scheduler.add(request, {}, 2 * CHUNK, load=True)
    second.load(request, (OTHER_BLOCKS[:4],), second.match(request, 2 * CHUNK))
    assert second.failed == {OTHER_BLOCKS[3]}


@pytest.mark.parametrize("taken", range(1, 3 * CHUNK + 1))
def test_of_a_load_that_ends_inside_a_block_the_whole_block_is_filled(
    server: Served, engine: Callable[..., Engine], taken: int
) -> None:
    where = geometry()
    first, second = engine(where, filled=True), engine(where)
    first.save(Request("a", TOKENS), (BLOCKS,))
    request = Request("b", TOKENS)
    second.scheduler.add(request, {}, 0, load=True)
    assert second.match(request) == 3 * CHUNK
    second.load(request, (OTHER_BLOCKS,), taken)
    filled = -(-taken // BLOCK)
    assert not second.failed
    for layer, pages in second.caches[0].items():
        assert torch.equal(first.caches[0][layer][BLOCKS[:filled]], pages[OTHER_BLOCKS[:filled]])
        assert not pages[OTHER_BLOCKS[filled:]].any()


def test_the_block_in_which_a_load_ends_is_told_where_it_is_not_filled(
    server: Served, engine: Callable[..., Engine]
) -> None:
    where = geometry()
    engine(where, filled=True).save(Request("a", TOKENS), (BLOCKS,))
    second, request = engine(where), Request("b", TOKENS)
    second.scheduler.add(request, {}, 0, load=True)
    tokens = second.match(request)
    prefetch = second.scheduler._records["b"].prefetch
    assert prefetch is not None
    second.client.end_request(prefetch.request_id)
    second.load(request, (OTHER_BLOCKS,), tokens - 1)
    assert second.failed == set(OTHER_BLOCKS[:6])


def test_an_id_that_comes_again_before_its_end_is_ended_first(
    scripted: tuple[PagedScheduler, Scripted, list[float]],
) -> None:
    scheduler, client, _ = scripted
    first, second = Request("a", TOKENS), Request("a", [9, *TOKENS])
    scheduler.add(first, {}, 0, load=True)
    load(client.prefetches[0], 0.0)
    assert scheduler.match(first, 0) == (24, True)
    scheduler.place(first, lambda: (BLOCKS,), 24)
    scheduler.add(second, {}, 0, load=True)
    assert client.ended == ["read-0"]
    assert not scheduler._arriving
    scheduler.loaded(["a"])
    load(client.prefetches[1], 0.0)
    assert scheduler.match(second, 0) == (24, True)


def test_a_request_that_is_finished_twice_waits_for_its_saves_both_times(
    scripted: tuple[PagedScheduler, Scripted, list[float]],
) -> None:
    scheduler, _, _ = scripted
    scheduler.add(Request("a", TOKENS), {}, 0, load=False)
    scheduler.step({"a": len(TOKENS)}, lambda _: (BLOCKS,))
    assert scheduler.finish("a") and scheduler.finish("a")
    assert scheduler.step({}, lambda _: None).finished == ["a"]
    scheduler.sent(["a"])
    assert not scheduler.finish("a")


def test_saves_do_not_wait_for_a_server_that_is_gone(
    server: Served, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("async_cache.integrations.paged.copies._RESERVE_SECONDS", 3600)  # who waits does so for ever
    monkeypatch.setattr("async_cache.integrations.paged.copies._PAUSE_SECONDS", 0)  # each of them asks
    only = engine(geometry(), filled=True)
    only.save(Request("a", TOKENS), (BLOCKS,))
    prompt = geometry().layout.prompt([9, *TOKENS])
    server.stop()
    until(lambda: only.client._thread.client._links.current is None)  # type: ignore[union-attr]
    worker = only.workers[0]
    for n in range(20):
        worker.save([SaveOrder(f"late-{n}", prompt, 0, (BLOCKS,))])
        worker.settle()


def test_an_engine_whose_two_sides_differ_saves_nothing_and_says_why(
    server: Served, engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    worker = engine(geometry()).workers[0]
    prompt = geometry(windows=(None, None)).layout.prompt(TOKENS)
    worker.save([SaveOrder("a", prompt, 0, (BLOCKS, BLOCKS))])
    worker.settle()
    assert "different shapes" in caplog.text
    assert server.stats().l1_chunks == 0


def test_what_was_loaded_long_ago_is_asked_for_anew(scripted: tuple[PagedScheduler, Scripted, list[float]]) -> None:
    scheduler, client, now = scripted
    request = Request("a", TOKENS)
    scheduler.add(request, {}, 0, load=True)
    load(client.prefetches[0], 1.0)
    now[0] += 40
    assert scheduler.match(request, 0) == (None, False)
    until(lambda: client.ended == ["read-0"])
    load(client.prefetches[1], 0.0)
    assert scheduler.match(request, 0) == (24, True)


def test_a_load_that_falls_short_is_told_and_not_tried_again(
    server: Served, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage promises what it has lost: one load for each request, of which the engine is told, and it is computed."""
    where = geometry()
    saving, loading = engine(where, filled=True), engine(where)
    saving.save(Request("a", TOKENS), (BLOCKS,))
    server.forget()

    async def gone(keys: Any, buffers: Any, loaded: Any) -> list[LoadOutcome]:
        return [LoadOutcome.GONE] * len(keys)

    def asked(name: str) -> int:
        request = Request(name, TOKENS)
        loading.scheduler.add(request, {}, 0, load=True)
        loading.failed.clear()
        if tokens := loading.match(request):  # the promise, where the load is expected to end soon
            loading.load(request, (OTHER_BLOCKS,), tokens)
        assert all(loading.scheduler.match(request, tokens) == (0, False) for _ in range(20))
        loading.scheduler.finish(name)
        return tokens

    with monkeypatch.context() as patched:
        patched.setattr(server.storage.inner, "load_each", gone)
        for name in "bcde":
            before = server.storage.calls["load"]
            tokens = asked(name)
            assert server.storage.calls["load"] == before + 1
            assert loading.failed == set(OTHER_BLOCKS[: tokens // BLOCK])
    saving.save(Request("f", TOKENS), (BLOCKS,))
    assert asked("g") == 3 * CHUNK and not loading.failed
    until(lambda: holds_nothing(server))


# Stages of a pipeline, several answers to one prompt, and workers that cannot.


def test_each_stage_of_a_pipeline_saves_and_loads_its_own_layers(server: Served, engine: Callable[..., Engine]) -> None:
    stages = pipeline(3, 1, 2)
    first, second = engine(*stages, filled=True), engine(*stages)
    first.save(Request("a", TOKENS), (BLOCKS,))
    again = Request("b", TOKENS)
    second.scheduler.add(again, {}, 0, load=True)
    tokens = second.match(again)
    assert tokens == 3 * CHUNK
    second.load(again, (OTHER_BLOCKS,), tokens)
    assert not second.failed
    for ours, theirs, layers in zip(first.caches, second.caches, (3, 1, 2), strict=True):
        assert len(ours) == layers
        for layer, pages in ours.items():
            assert torch.equal(pages[BLOCKS[:6]], theirs[layer][OTHER_BLOCKS[:6]])
    second.scheduler.finish("b")
    assert until(lambda: holds_nothing(server))


def test_a_chunk_that_one_stage_has_not_saved_is_no_hit(server: Served, engine: Callable[..., Engine]) -> None:
    stages = pipeline(3, 1, 2)
    first, second = engine(*stages, filled=True, absent=True), engine(*stages)
    first.save(Request("a", TOKENS), (BLOCKS,))
    again = Request("b", TOKENS)
    second.scheduler.add(again, {}, 0, load=True)
    assert second.match(again) == 0
    second.scheduler.finish("b")
    assert until(lambda: holds_nothing(server))


def test_what_is_ordered_of_a_worker_that_cannot_has_an_end(server: Served, engine: Callable[..., Engine]) -> None:
    where = geometry()
    engine(where, filled=True).save(Request("a", TOKENS), (BLOCKS,))
    broken = engine(where, absent=True)
    request = Request("b", TOKENS)
    broken.scheduler.add(request, {}, 0, load=True)
    broken.load(request, (OTHER_BLOCKS,), broken.match(request))
    assert broken.failed == set(OTHER_BLOCKS[:6]), "all that it was to fill is computed"
    broken.save(Request("c", [7, *TOKENS]), (BLOCKS,))
    assert broken.scheduler.reset(), "its save has ended, and was reported"
    broken.scheduler.finish("b")
    assert until(lambda: holds_nothing(server))


def test_several_answers_to_one_prompt_load_it_into_blocks_of_their_own(
    server: Served, engine: Callable[..., Engine]
) -> None:
    where = geometry()
    first, second = engine(where, filled=True), engine(where)
    first.save(Request("a", TOKENS), (BLOCKS,))
    tables = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]
    answers = [Request(f"{n}_b", TOKENS) for n in range(2)]  # as vLLM asks for `n=2`
    for request in answers:
        second.scheduler.add(request, {}, 0, load=True)
    for request, table in zip(answers, tables, strict=True):
        second.load(request, (table,), second.match(request))
        for layer, pages in first.caches[0].items():
            assert torch.equal(pages[BLOCKS[:6]], second.caches[0][layer][table[:6]])
        second.scheduler.finish(request.request_id)
    assert until(lambda: holds_nothing(server))


def test_layers_of_several_dtypes_are_copied_as_bytes(server: Served, engine: Callable[..., Engine]) -> None:
    sizes = {"wide": 40, "narrow": 8}
    groups = tuple(ObjectGroup((1, CHUNK // BLOCK, size), "uint8") for size in sizes.values())
    pages = tuple(Pages(0, BLOCK, (layer,)) for layer in sizes)
    where = Geometry(ModelLayout("toy", groups, chunk_tokens=CHUNK), pages)
    forms = {"wide": ((2, 5), torch.float32), "narrow": ((2, 2), torch.bfloat16)}
    memories = [{layer: torch.rand(16, *shape).to(dtype) for layer, (shape, dtype) in forms.items()} for _ in range(2)]
    before = {layer: cache.clone() for layer, cache in memories[0].items()}
    workers = [PagedWorker(lambda: connect(server.url), where, HostDevice(where, memory)) for memory in memories]
    try:
        workers[0].save([SaveOrder("a", where.layout.prompt(TOKENS), 0, (BLOCKS,))])
        workers[0].finish(["a"])
        assert until(workers[0].sent) == {"a"}
        with BlockingClient(server.url) as client:
            until(lambda: client.lookup(where.layout.prompt(TOKENS)).chunks == 3)
            read = client.prefetch(where.layout.prompt(TOKENS)).request_id
            workers[1].load([LoadOrder("b", read, 0, 3 * CHUNK, (OTHER_BLOCKS,))])
            received = until(lambda: (r := workers[1].received()).request_ids and r)
            assert not received.short
            for layer, cache in before.items():
                assert torch.equal(cache[BLOCKS[:6]], memories[1][layer][OTHER_BLOCKS[:6]])
            client.end_request(read)
    finally:
        for worker in workers:
            worker.close()
