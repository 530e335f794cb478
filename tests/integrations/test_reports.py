"""What an engine with pages hears of its lookups, and of its blocks in the server's tiers."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from async_cache import BlockingClient, ConnectionLostError, ModelLayout, ObjectGroup, Removal, Removed, Stored
from async_cache.client.prefetches import BlockingPrefetch
from async_cache.integrations.paged.reports import BlockEvents, Counts, Tally
from async_cache.prompt.layout import Prompt
from tests.integrations.support import Served, served, until

CHUNK, BLOCK = 8, 4
LAYOUT = ModelLayout("toy", (ObjectGroup((4,), "float32"),), chunk_tokens=CHUNK)


@pytest.fixture
def client(server: Served) -> Iterator[BlockingClient]:
    with BlockingClient(server.url) as client:
        yield client


def request(tokens: list[int], blocks: int | None = None) -> Any:
    count = len(tokens) // BLOCK if blocks is None else blocks
    return SimpleNamespace(all_token_ids=tokens, block_hashes=[f"block {tokens[n * BLOCK]}" for n in range(count)])


def store(client: BlockingClient, prompt: Prompt) -> None:
    with client.store(prompt) as writer:
        for chunk in writer:
            chunk.commit()


def told(events: BlockEvents, count: int) -> list[Any]:
    """The next so many events: the kind, the tier, and the blocks."""
    seen: list[Any] = []

    def more() -> bool:
        seen.extend((type(event), event.tier, blocks) for event, blocks in events.take())
        return len(seen) >= count

    until(more)
    return seen


def test_what_is_stored_and_removed_is_told_of_the_blocks(client: BlockingClient) -> None:
    events = BlockEvents(BLOCK, CHUNK, lambda request: "about")
    tokens = list(range(17))
    asked = request(tokens)
    prompt = LAYOUT.prompt(tokens)
    events.listen(client)
    events.know(asked, prompt)
    store(client, prompt)
    client.flush()
    seen = told(events, 4)
    assert [(kind, tier) for kind, tier, _ in seen] == [(Stored, "l1")] * 2 + [(Stored, "l2")] * 2
    first, second = seen[0][2], seen[1][2]
    assert (first.hashes, first.parent, list(first.tokens)) == (asked.block_hashes[:2], None, tokens[:8])
    assert (second.hashes, second.parent, list(second.tokens)) == (asked.block_hashes[2:4], "block 4", tokens[8:16])
    assert first.about == "about"
    client.delete(prompt)
    assert sorted(tier for kind, tier, _ in told(events, 4) if kind is Removed) == ["l1", "l1", "l2", "l2"]


def test_chunks_of_which_no_request_was_here_are_not_told(client: BlockingClient) -> None:
    events = BlockEvents(BLOCK, CHUNK, lambda request: None)
    ours, others = (list(range(begin, begin + 9)) for begin in (0, 100))
    events.listen(client)
    events.know(request(ours), LAYOUT.prompt(ours))
    store(client, LAYOUT.prompt(others))
    store(client, LAYOUT.prompt(ours))
    (event,) = told(events, 1)
    assert event[2].hashes == ["block 0", "block 4"]


def test_only_what_has_hashes_is_known_and_the_oldest_is_forgotten() -> None:
    events = BlockEvents(BLOCK, CHUNK, lambda request: None, most=2)
    tokens = list(range(33))
    events.know(request(tokens, blocks=5), LAYOUT.prompt(tokens))
    assert len(events._known) == 2  # the third has only one of its blocks
    events.know(request(tokens), LAYOUT.prompt(tokens))
    assert list(events._known) == LAYOUT.prompt(tokens).chunk_hashes[2:]


def test_a_chunk_in_two_backends_is_stored_and_removed_once() -> None:
    events = BlockEvents(BLOCK, CHUNK, lambda request: None)
    tokens = list(range(8))
    prompt = LAYOUT.prompt(tokens)
    events.know(request(tokens), prompt)
    (chunk_hash,) = prompt.chunk_hashes
    stored = [Stored(chunk_hash, None, CHUNK, "l2", name) for name in ("near", "far")]
    removed = [Removed(chunk_hash, "l2", name, Removal.CAPACITY) for name in ("near", "far")]
    events._stream = SimpleNamespace(take=lambda most: [*stored, *removed])  # type: ignore[assignment]
    assert [event for event, _ in events.take()] == [stored[0], removed[1]]


def test_when_the_server_is_gone_what_it_had_is_removed(tmp_path_factory: pytest.TempPathFactory) -> None:
    events = BlockEvents(BLOCK, CHUNK, lambda request: None)
    tokens = list(range(8))
    prompt = LAYOUT.prompt(tokens)
    events.know(request(tokens), prompt)
    with served(tmp_path_factory.mktemp("s")) as server, BlockingClient(server.url, heartbeat_seconds=None) as client:
        events.listen(client)
        store(client, prompt)
        told(events, 1)
        server.stop()
        ((kind, tier, blocks),) = told(events, 1)
        assert (kind, tier, blocks.hashes) == (Removed, "l1", ["block 0", "block 4"])
        assert list(events.take()) == []


def test_lookups_and_loads_are_counted_until_they_are_asked_for(client: BlockingClient) -> None:
    tally = Tally()
    assert tally.take() is None
    tokens = list(range(16))
    store(client, LAYOUT.prompt(tokens))
    for asked in (tokens, tokens[:8] + [99] * 9, [77] * 8):
        prefetch = client.prefetch(LAYOUT.prompt(asked))
        tally.follow(prefetch, len(asked))
        prefetch.load_done.result(60)
    counts = tally.take()
    assert counts is not None and len(counts.load_seconds) == 3
    counts.load_seconds.clear()
    assert counts == Counts(
        lookups=3, asked_tokens=41, l1_tokens=24, l2_tokens=0, missed={"unknown": 2, "diverges": 1}, shortfalls={}
    )
    assert tally.take() is None


def test_a_prefetch_that_is_lost_counts_nothing() -> None:
    tally = Tally()
    broken = BlockingPrefetch("r", lambda _: None)
    tally.follow(broken, 8)
    broken.break_with(ConnectionLostError("it is gone"))
    assert tally.take() is None
