"""All of a CUDA device but CUDA: pages as rows, parts and slots, fences, what is pinned. `tests/gpu` has the rest."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from async_cache import BlockingClient, ConfigError, ModelLayout, connect
from async_cache.integrations.paged import Geometry, HostDevice, PagedWorker, Pages, SaveOrder
from async_cache.integrations.paged.cuda import CudaDevice
from async_cache.integrations.paged.device import DeviceError
from async_cache.integrations.paged.lanes import Bounce
from async_cache.integrations.paged.orders import NO_BLOCK, LoadOrder
from async_cache.integrations.paged.pins import Pins
from async_cache.integrations.paged.rows import rows_of
from tests.integrations.fake_cuda import FakeRuntime
from tests.integrations.layouts import ARRANGEMENTS, LAYERS, REFUSED, Arrangement, bytes_of, object_of, raw
from tests.integrations.support import BLOCK, CHUNK, Served, caches, geometry, until

BLOCKS, OTHERS = [3, 8, 1, 6], [7, 2, 4, 5]
SECONDS = 60.0
CPU = torch.device("cpu")


def geometry_of(arrangement: Arrangement) -> Geometry:
    layout = ModelLayout("toy", (arrangement.group(),), chunk_tokens=4 * arrangement.tokens)
    return Geometry(layout, (Pages(0, arrangement.tokens, tuple(map(str, range(LAYERS)))),))


@pytest.fixture
def device() -> Iterator[Callable[..., CudaDevice]]:
    """Makes devices, with slots for so many bytes."""
    with ExitStack() as stack:

        def make(arrangement: Arrangement, pages: list[torch.Tensor], runtime: FakeRuntime, **more: Any) -> CudaDevice:
            by_layer = {str(layer): cache for layer, cache in enumerate(pages)}
            made = CudaDevice(geometry_of(arrangement), by_layer, runtime=runtime, pinned=False, **more)
            stack.callback(made.close)
            stack.callback(runtime.gate.set)
            return made

        yield make


def host_of(arrangement: Arrangement) -> torch.Tensor:
    group = arrangement.group()
    return torch.zeros(group.shape, dtype=torch.uint8)


@pytest.mark.parametrize("slot_bytes", [1, 32 << 20], ids=["a layer a slot", "all in one"])
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_blocks_go_out_and_into_other_blocks_bit_by_bit(
    device: Callable[..., CudaDevice], name: str, slot_bytes: int
) -> None:
    arrangement = ARRANGEMENTS[name]
    ours, theirs = arrangement.caches(), arrangement.caches(filled=False)
    host = host_of(arrangement)
    first = device(arrangement, ours, FakeRuntime(), slot_bytes=slot_bytes)
    copy = first.save(0, BLOCKS, host, first.mark())
    copy.done.result(SECONDS)
    assert copy.read.done()
    assert bytes_of(host) == object_of(ours, BLOCKS)
    second = device(arrangement, theirs, FakeRuntime(), slot_bytes=slot_bytes)
    blocks = [NO_BLOCK, *OTHERS[1:3], NO_BLOCK]
    second.load(0, blocks, host, second.mark()).done.result(SECONDS)
    for one, other in zip(ours, theirs, strict=True):
        assert [raw(one, block) for block in BLOCKS[1:3]] == [raw(other, block) for block in OTHERS[1:3]]
        assert not any(any(raw(other, block)) for block in (NO_BLOCK, OTHERS[0], OTHERS[3]))


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_layers_that_lie_evenly_are_one_view_of_the_widest_words(name: str) -> None:
    arrangement = ARRANGEMENTS[name]
    rows = rows_of(arrangement.caches(), arrangement.group())
    assert len(rows) == (1 if arrangement.order else LAYERS)
    assert rows[0].dtype == (torch.uint8 if "odd" in name else torch.int64)


@pytest.mark.parametrize("name", REFUSED)
def test_pages_that_are_no_run_of_bytes_are_refused(name: str) -> None:
    arrangement = REFUSED[name]
    with pytest.raises(ConfigError, match="is no run of bytes"):
        rows_of(arrangement.caches(), arrangement.group())


def test_pages_that_are_not_those_of_the_group_are_refused() -> None:
    arrangement = ARRANGEMENTS["LBHNC"]
    keys_and_values = [torch.zeros(2, 9, 16, 2, 24) for _ in range(LAYERS)]  # blocks are not first
    for pages in (keys_and_values, arrangement.caches()[:2], ARRANGEMENTS["fp8"].caches()):
        with pytest.raises(ConfigError, match="are not those of objects of"):
            rows_of(pages, arrangement.group())
    fewer = [*arrangement.caches()[:2], arrangement.caches(blocks=5)[0]]
    with pytest.raises(ConfigError, match="different numbers of blocks"):
        rows_of(fewer, arrangement.group())
    with pytest.raises(ConfigError, match="overlap"):
        rows_of(
            [torch.zeros(999).as_strided((9, 32), (16, 1)) for _ in range(LAYERS)],
            Arrangement(dtype=torch.float32, heads=1, tokens=1, contents=32).group(),
        )
    with pytest.raises(ConfigError, match="has no pages"):
        rows_of([torch.zeros(9)] * LAYERS, arrangement.group())


def test_nothing_is_called_before_the_first_copy_and_little_in_the_engines_thread(
    device: Callable[..., CudaDevice],
) -> None:
    arrangement, runtime = ARRANGEMENTS["LBHNC"], FakeRuntime()
    made = device(arrangement, arrangement.caches(), runtime)
    assert runtime.calls == 0
    assert runtime.engine.waits == 1, "what the engine's stream still uses of what it gave back is nobody's staging"
    copy = made.save(0, BLOCKS, host_of(arrangement), made.mark())
    copy.done.result(SECONDS)
    made.hold([copy])
    assert threading.get_ident() not in runtime.threads and runtime.engine.waits == 1
    assert not runtime.engine.waited_for, "what was read is not waited for"


def test_the_engine_waits_for_what_is_gathered_and_what_is_not_is_given_up(device: Callable[..., CudaDevice]) -> None:
    arrangement, runtime = ARRANGEMENTS["LBHNC"], FakeRuntime()
    made = device(arrangement, ours := arrangement.caches(), runtime, slot_bytes=1, slots=LAYERS + 1)
    runtime.gate.clear()
    hosts = [host_of(arrangement) for _ in range(3)]
    copies: list[Any] = [made.save(0, BLOCKS, host, made.mark()) for host in hosts]
    until(lambda: (copies[0].launched, copies[1].launched) == (LAYERS, 1))
    made.hold(copies)
    assert runtime.engine.waited_for == [copies[0].reading, copies[1].reading], "the third one reads nothing"
    assert not any(copy.read.done() for copy in copies[:2])
    runtime.gate.set()
    copies[0].done.result(SECONDS)
    assert bytes_of(hosts[0]) == object_of(ours, BLOCKS)
    for copy in copies[1:]:
        with pytest.raises(DeviceError, match="given up"):
            copy.done.result(SECONDS)
    made.save(0, BLOCKS, hosts[2], made.mark()).done.result(SECONDS)
    assert bytes_of(hosts[2]) == object_of(ours, BLOCKS)


def test_what_is_about_to_be_launched_is_not_given_up(device: Callable[..., CudaDevice]) -> None:
    arrangement, runtime = ARRANGEMENTS["LBHNC"], FakeRuntime()
    made = device(arrangement, ours := arrangement.caches(), runtime, slot_bytes=1, slots=1, hold_seconds=60.0)
    runtime.gate.clear()  # all parts but the first wait for the only slot
    host = host_of(arrangement)
    copy: Any = made.save(0, BLOCKS, host, made.mark())
    holding = threading.Thread(target=made.hold, args=([copy],))
    holding.start()
    until(lambda: copy.launched)
    assert holding.is_alive()
    runtime.gate.set()
    holding.join(SECONDS)
    assert not copy.given_up and copy.launched == LAYERS
    copy.done.result(SECONDS)
    assert bytes_of(host) == object_of(ours, BLOCKS)
    broken = device(arrangement, ours, FakeRuntime(fails=0), hold_seconds=60.0)
    failed: Any = broken.save(0, BLOCKS, host, broken.mark())
    broken.hold([failed])  # it is over at once: nothing more of it is launched
    with pytest.raises(DeviceError, match="call 0"):
        failed.done.result(SECONDS)


@pytest.mark.parametrize("pinned", [True, False])
def test_the_memory_of_a_copy_that_has_ended_is_kept_by_nobody(
    device: Callable[..., CudaDevice], pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrangement, runtime = ARRANGEMENTS["LBHNC"], FakeRuntime()
    made = device(arrangement, arrangement.caches(), runtime)
    monkeypatch.setattr(made._pins, "whole", lambda address, size: pinned)
    copies = []
    for begin in (made.save, made.load):
        host = host_of(arrangement)
        copies.append(begin(0, BLOCKS, host, made.mark()))
        copies[-1].done.result(SECONDS)
        memory = weakref.ref(host.untyped_storage())
        kept = weakref.ref(host)
        del host
        until(lambda kept=kept, memory=memory: kept() is None and memory() is None)


@pytest.mark.parametrize("what", ["launch", "land"])
def test_without_its_threads_a_device_fails_what_it_is_told(
    device: Callable[..., CudaDevice], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == f"async_cache out {what}":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    arrangement, runtime = ARRANGEMENTS["LBHNC"], FakeRuntime()
    made = device(arrangement, arrangement.caches(), runtime)
    for says in ("can't start new thread", "closed"):
        with pytest.raises(DeviceError, match=says):
            made.save(0, BLOCKS, host_of(arrangement), made.mark())
    made.load(0, BLOCKS, host_of(arrangement), made.mark()).done.result(SECONDS)
    made.close()
    assert not any(thread.is_alive() for thread in made._out._threads)


@pytest.mark.parametrize("direction", ["save", "load"])
@pytest.mark.parametrize("call", range(4 * LAYERS))
def test_whichever_call_fails_its_copy_fails_and_the_next_one_does_not(
    device: Callable[..., CudaDevice], call: int, direction: str
) -> None:
    arrangement, runtime = ARRANGEMENTS["LBHNC"], FakeRuntime(fails=call)
    ours = arrangement.caches()
    made = device(arrangement, ours, runtime, slot_bytes=1, slots=2)
    host = host_of(arrangement)
    copy = getattr(made, direction)(0, BLOCKS, host, made.mark())
    with pytest.raises(DeviceError, match=f"call {call}"):
        copy.done.result(SECONDS)
    assert copy.read.done()
    for _ in range(3):
        made.save(0, BLOCKS, host, made.mark()).done.result(SECONDS)
    assert bytes_of(host) == object_of(ours, BLOCKS)


def test_a_device_that_is_closed_fails_what_it_has_not_launched(device: Callable[..., CudaDevice]) -> None:
    arrangement, runtime = ARRANGEMENTS["LBHNC"], FakeRuntime()
    made = device(arrangement, arrangement.caches(), runtime, slots=1)
    runtime.gate.clear()
    copies: list[Any] = [made.load(0, BLOCKS, host_of(arrangement), made.mark()) for _ in range(3)]
    until(lambda: copies[0].launched)
    closing = threading.Thread(target=made.close)
    closing.start()
    until(lambda: made._in._closed)
    with pytest.raises(DeviceError, match="closed"):
        made.load(0, BLOCKS, host_of(arrangement), made.mark())
    runtime.gate.set()
    closing.join(SECONDS)
    copies[0].done.result(0)
    for copy in copies[1:]:
        with pytest.raises(DeviceError, match="closed"):
            copy.done.result(0)


def test_what_never_ends_does_not_hold_up_the_end(
    device: Callable[..., CudaDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("async_cache.integrations.paged.lanes._CLOSE_SECONDS", 0.01)
    arrangement, runtime = ARRANGEMENTS["LBHNC"], FakeRuntime()
    made = device(arrangement, arrangement.caches(), runtime)
    memory = memoryview(bytearray(4096))
    made.pin(memory, writable=True)
    until(lambda: runtime.registered)
    runtime.gate.clear()
    copy: Any = made.save(0, BLOCKS, host_of(arrangement), made.mark())
    until(lambda: copy.launched)
    made.close()
    with pytest.raises(DeviceError, match="closed"):
        copy.done.result(0)
    assert runtime.registered, "it may still be written to"


@pytest.mark.parametrize("kind", ["cuda", "host"])
def test_pages_of_an_engine_in_inference_mode_are_written_to_from_other_threads(
    device: Callable[..., CudaDevice], kind: str
) -> None:
    arrangement = Arrangement("", dtype=torch.uint8)
    with torch.inference_mode():
        pages = arrangement.caches()
        if kind == "cuda":
            made: Any = device(arrangement, pages, FakeRuntime())
        else:
            made = HostDevice(geometry_of(arrangement), {str(layer): cache for layer, cache in enumerate(pages)})
    assert pages[0].is_inference()
    host = host_of(arrangement)
    made.save(0, BLOCKS, host, made.mark()).done.result(SECONDS)
    made.load(0, OTHERS, host, made.mark()).done.result(SECONDS)
    assert object_of(pages, OTHERS) == object_of(pages, BLOCKS)
    if kind == "host":
        made.close()


# What is pinned.


def test_memory_is_pinned_in_pieces_and_no_copy_crosses_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_cache.integrations.paged.pins._PAUSE_SECONDS", 0)
    flags: list[int] = []
    runtime = FakeRuntime(register=lambda address, size, flag: flags.append(flag) or 0)
    pins, view = Pins(runtime, CPU, 4096), memoryview(bytearray(10_000))
    begin = torch.frombuffer(view, dtype=torch.uint8).data_ptr()
    pins.add(view, writable=True).join(SECONDS)
    assert [size for _, size in sorted(runtime.registered.items())] == [4096, 4096, 10_000 - 8192]
    assert flags == [0] * 3
    assert pins.whole(begin, 4096) and pins.whole(begin + 4096, 4096) and pins.whole(begin + 9000, 1000)
    assert not pins.whole(begin + 4095, 2) and not pins.whole(begin + 9000, 1001) and not pins.whole(begin - 1, 1)
    pins.close()
    assert not runtime.registered and not pins.whole(begin, 1)


@pytest.mark.parametrize("piece", range(3))
def test_what_can_not_be_pinned_from_some_piece_on_goes_through_memory_that_is(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("async_cache.integrations.paged.pins._PAUSE_SECONDS", 0)
    calls: list[tuple[int, int]] = []

    def register(address: int, size: int, flags: int) -> int:
        calls.append((address, flags))
        return 801 if len({at for at, _ in calls}) == piece + 1 else 0

    pins, view = Pins(FakeRuntime(register=register), CPU, 4096), memoryview(bytearray(3 * 4096))
    begin = torch.frombuffer(view, dtype=torch.uint8).data_ptr()
    pins.add(view, writable=False).join(SECONDS)
    assert [flags for _, flags in calls] == [8] * piece + [8, 0], "read-only, and where that is not known, as it is"
    assert [pins.whole(begin + n * 4096, 4096) for n in range(3)] == [n < piece for n in range(3)]
    pins.close()


@pytest.mark.parametrize("pinned", [True, False])
def test_pinned_memory_is_copied_to_straight_and_other_memory_by_way_of_a_slot(
    device: Callable[..., CudaDevice], pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrangement, runtime = ARRANGEMENTS["LBHNC"], FakeRuntime()
    ours = arrangement.caches()
    made = device(arrangement, ours, runtime)
    bounced: list[int] = []
    copy_through = made._bounce.copy
    monkeypatch.setattr(made._bounce, "copy", lambda to, source: bounced.append(to.numel()) or copy_through(to, source))
    memory = memoryview(bytearray(arrangement.group().size_bytes))
    host = torch.frombuffer(memory, dtype=torch.uint8).view(arrangement.group().shape)
    if pinned:
        made.pin(memory, writable=True)
        until(lambda: made._pins.whole(host.data_ptr(), len(memory)))
    made.save(0, BLOCKS, host, made.mark()).done.result(SECONDS)
    made.load(0, OTHERS, host, made.mark()).done.result(SECONDS)
    assert bounced == ([] if pinned else [len(memory)] * 2)
    assert bytes(memory) == object_of(ours, BLOCKS) == object_of(ours, OTHERS)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2**20, 3 * 2**20 + 5])
def test_bytes_are_bounced_by_several_threads(threads: int, size: int) -> None:
    bounce = Bounce(threads)
    source, to = torch.randint(0, 255, (size,), dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    bounce.copy(to, source)
    bounce.close()
    assert torch.equal(to, source)


def test_who_bounces_waits_for_all_threads_also_where_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    bounce, going_on, ended = Bounce(2), threading.Event(), threading.Event()
    caller = threading.get_ident()

    def copy(to: torch.Tensor, source: torch.Tensor) -> None:
        if threading.get_ident() == caller:
            going_on.set()
            raise RuntimeError("no")
        assert going_on.wait(SECONDS)
        ended.set()

    monkeypatch.setattr("async_cache.integrations.paged.lanes._copy", copy)
    with pytest.raises(RuntimeError, match="no"):
        bounce.copy(*torch.zeros(2, 2 << 20, dtype=torch.uint8))
    assert ended.is_set()
    bounce.close()


def test_what_is_pinned_already_is_not_pinned_again() -> None:
    runtime, view = FakeRuntime(), memoryview(bytearray(4096))
    pins = Pins(runtime, CPU)
    first = pins.add(view, writable=True)
    assert pins.add(view, writable=True) is first
    first.join(SECONDS)
    assert list(runtime.registered.values()) == [4096]
    pins.close()


def test_what_a_worker_with_such_a_device_saves_one_on_a_cpu_loads(server: Served) -> None:
    where = geometry(windows=(None, 1))
    tokens, blocks, others = list(range(3 * CHUNK)), [3, 4, 7, 2, 9, 11], [12, 2, 5, 6, 1, 8]
    ours, theirs = caches(where, filled=True), caches(where, filled=False)
    runtime = FakeRuntime()
    devices = [
        CudaDevice(where, ours, runtime=runtime, pinned=False, slot_bytes=64, pin_bytes=2**20),
        HostDevice(where, theirs),
    ]
    first, second = (PagedWorker(lambda: connect(server.url), where, device) for device in devices)
    try:
        prompt = where.layout.prompt(tokens)
        first.save([SaveOrder("a", prompt, 0, (blocks, blocks))])
        first.finish(["a"])
        assert until(first.sent) == {"a"}
        until(lambda: server.stats().l1_chunks == 3)
        with BlockingClient(server.url) as client:
            client.prefetch(prompt, request_id="r")
            second.load([LoadOrder("b", "r", 0, len(tokens), (others, others))])
            assert until(lambda: (received := second.received()).request_ids and received).short == set()
        for layer, pages in ours.items():
            last = slice(len(blocks)) if layer.startswith("0") else slice(-CHUNK // BLOCK, None)
            assert torch.equal(pages[blocks[last]], theirs[layer][others[last]])
        assert list(runtime.registered.values()) == [2**20]
    finally:
        first.close()
        second.close()
    assert not runtime.registered
