"""Engines with recurrent states: a state stands for all that is before it, and is kept at some boundaries only."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from async_cache import BlockingClient, ModelLayout, ObjectGroup, connect
from async_cache.integrations.optional import OptionalClient
from async_cache.integrations.paged import Geometry, HostDevice, LoadOrder, PagedScheduler, PagedWorker, Pages
from async_cache.integrations.paged.orders import NO_BLOCK, Tables
from async_cache.integrations.paged.worker import Received
from tests.integrations.support import BLOCK, CHUNK, LAYERS, NUMBERS, CheckedDevice, Request, Served, caches, until

CHUNKS = 3
TOKENS = list(range(CHUNKS * CHUNK + 2))
BLOCKS, OTHERS = [3, 4, 7, 2, 9, 11, 1], [12, 2, 5, 6, 1, 8, 3]
STATE, OTHER = 13, 14  # blocks of states


def recurrent() -> Geometry:
    """Attention, which rank 0 has, and states, which rank 1 has: both are one worker."""
    groups = (
        ObjectGroup((LAYERS, CHUNK // BLOCK, NUMBERS), "float32", ranks=(0,)),
        ObjectGroup((LAYERS, 1, NUMBERS), "float32", window_chunks=1, ranks=(1,)),
    )
    layers = [tuple(f"{table}.{n}" for n in range(LAYERS)) for table in range(2)]
    pages = Pages(0, BLOCK, layers[0]), Pages(1, CHUNK, layers[1])
    return Geometry(ModelLayout("toy", groups, chunk_tokens=CHUNK, world_size=2), pages)


def states(*chunks: int, block: int = STATE) -> list[int]:
    """The table of an engine that has the state behind each of these chunks."""
    return [block if chunk in chunks else NO_BLOCK for chunk in range(CHUNKS)]


class Engine:
    def __init__(self, server: Served, *, filled: bool):
        self.where = recurrent()
        self.scheduler = PagedScheduler(OptionalClient(lambda: BlockingClient(server.url)), self.where)
        self.pages = caches(self.where, filled=filled)
        device = CheckedDevice(HostDevice(self.where, self.pages))
        self.worker = PagedWorker(lambda: connect(server.url), self.where, device, ranks=(0, 1))

    def close(self) -> None:
        self.scheduler.close()
        self.worker.close()

    def compute(self, request: Request, tokens: int, tables: Tables) -> None:
        """A step that computes so many tokens, and is saved before the next one begins."""
        orders = self.scheduler.step({request.request_id: tokens}, lambda _: tables)
        self.worker.save(orders.saves)
        self.worker.settle()
        request.num_computed_tokens += tokens

    def end(self, request: Request) -> None:
        assert self.scheduler.finish(request.request_id)
        self.worker.finish(self.scheduler.step({}, lambda _: None).finished)
        assert until(self.worker.sent) == {request.request_id}

    def save(self, name: str, tables: Tables) -> None:
        request = Request(name, TOKENS)
        self.scheduler.add(request, {}, 0, load=False)
        self.compute(request, len(TOKENS), tables)
        self.end(request)

    def match(self, request: Request) -> int:
        self.scheduler.add(request, {}, 0, load=True)
        answer: list[int] = []

        def is_answered() -> bool:
            tokens, _ = self.scheduler.match(request, 0)
            answer[:] = [] if tokens is None else [tokens]
            return tokens is not None

        until(is_answered)
        return answer[0]

    def load(self, request: Request, tokens: int) -> Received:
        """Into `OTHERS`, and the block `OTHER` for the state."""
        tables = (OTHERS, states(tokens // CHUNK - 1, block=OTHER))
        self.scheduler.place(request, lambda: tables, tokens)
        self.worker.load(self.scheduler.step({}, lambda _: tables).loads)
        received = until(lambda: (it := self.worker.received()).request_ids and it)
        self.scheduler.loaded(received.request_ids)
        assert isinstance(received, Received)
        return received


@pytest.fixture
def engine(server: Served) -> Iterator[Callable[..., Engine]]:
    with ExitStack() as stack:

        def make(*, filled: bool = False) -> Engine:
            made = Engine(server, filled=filled)
            stack.callback(made.close)
            return made

        yield make


def holds_nothing(server: Served) -> bool:
    stats = server.stats()
    return not (stats.requests or stats.leases or stats.reserved_bytes)


def test_a_chunk_without_a_state_is_stored_and_a_prefix_ends_where_there_is_one(
    server: Served, engine: Callable[..., Engine]
) -> None:
    first, second = engine(filled=True), engine()
    first.save("a", (BLOCKS, states(1)))
    server.forget()
    request = Request("b", TOKENS)
    assert second.match(request) == 2 * CHUNK, "what is behind the last state is not enough to go on from"
    assert not second.load(request, 2 * CHUNK).short
    for layer in range(LAYERS):
        ours, theirs = (each.pages[f"0.{layer}"] for each in (first, second))
        assert torch.equal(ours[BLOCKS[:4]], theirs[OTHERS[:4]])
        assert not theirs[OTHERS[4:]].any()
        ours, theirs = (each.pages[f"1.{layer}"] for each in (first, second))
        assert torch.equal(ours[STATE], theirs[OTHER])
        assert not theirs[[n for n in range(len(theirs)) if n != OTHER]].any()
    until(lambda: holds_nothing(server))


def test_without_any_state_nothing_is_found_and_with_a_later_one_all(
    server: Served, engine: Callable[..., Engine]
) -> None:
    first, second = engine(filled=True), engine()
    first.save("a", (BLOCKS, states()))
    assert second.match(Request("b", TOKENS)) == 0
    again = engine(filled=True)
    again.save("c", (BLOCKS, states(2)))
    request = Request("d", TOKENS)
    assert second.match(request) == 3 * CHUNK
    second.load(request, 3 * CHUNK)
    assert torch.equal(again.pages["1.0"][STATE], second.pages["1.0"][OTHER])
    assert torch.equal(first.pages["0.0"][BLOCKS[:6]], second.pages["0.0"][OTHERS[:6]]), "stored already"
    until(lambda: holds_nothing(server))


def test_a_state_is_stored_as_it_was_when_its_step_had_ended(server: Served, engine: Callable[..., Engine]) -> None:
    first, second = engine(filled=True), engine()
    request = Request("a", TOKENS)
    first.scheduler.add(request, {}, 0, load=False)
    was = []
    for chunk in range(CHUNKS):  # one and the same block, of which the next step makes another state
        first.compute(request, CHUNK, (BLOCKS, states(chunk)))
        was.append(first.pages["1.0"][STATE].clone())
        first.pages["1.0"][STATE] += 1.0
    first.end(request)
    server.forget()
    for chunks in (1, 2, 3):
        request = Request(str(chunks), TOKENS[: chunks * CHUNK + 1])
        assert second.match(request) == chunks * CHUNK
        assert not second.load(request, chunks * CHUNK).short
        assert torch.equal(second.pages["1.0"][OTHER], was[chunks - 1])
    until(lambda: holds_nothing(server))


def test_what_is_loaded_without_its_state_has_fallen_short(
    server: Served, engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("async_cache.integrations.paged.copies._LOAD_SECONDS", 0.05)
    first, second = engine(filled=True), engine()
    first.save("a", (BLOCKS, states(2)))
    server.forget()
    with BlockingClient(server.url) as client:
        prompt = first.where.layout.prompt(TOKENS)
        with client.store(prompt, rank=0) as writer:  # the attention is in memory again
            for chunk in writer:
                chunk.commit()
        server.hold("load")
        hits = client.prefetch(prompt, request_id="r").lookup_done.result(10)
        assert hits.chunks == 3
        second.worker.load([LoadOrder("b", "r", 0, 3 * CHUNK, (OTHERS, states(2, block=OTHER)))])
        received = until(lambda: (it := second.worker.received()).request_ids and it)
        assert received.short == {"b"}
        server.release()
        client.end_request("r")
    until(lambda: holds_nothing(server))
