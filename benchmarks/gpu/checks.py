"""Whether all bytes are right: held to the bytes of the pages themselves, and to what the device of a CPU makes."""

import mmap
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from async_cache import ConfigError, ModelLayout
from async_cache.integrations.paged import Geometry, HostDevice, Pages
from async_cache.integrations.paged.device import DeviceError
from async_cache.integrations.paged.orders import NO_BLOCK
from async_cache.integrations.paged.rows import rows_of
from tests.integrations.layouts import ARRANGEMENTS, LAYERS, REFUSED, Arrangement, bytes_of, object_of, raw

from .machine import Machine

BLOCKS, OTHERS = [3, 8, 1, 6], [7, 2, 4, 5]
SECONDS = 30.0
PLAIN = ARRANGEMENTS["LBHNC"]


def _host(machine: Machine, arrangement: Arrangement, *, pinned: bool = False) -> torch.Tensor:
    group = arrangement.group()
    return machine.host(group.size_bytes, pinned=pinned).view(group.shape)


def round_trip(machine: Machine, name: str, slot_bytes: int, *, direct: bool) -> None:
    """Blocks out, and into other blocks of other pages."""
    arrangement = ARRANGEMENTS[name]
    ours, theirs = (arrangement.caches(machine.name, filled=filled) for filled in (True, False))
    size = arrangement.group().size_bytes
    with mmap.mmap(-1, -(-size // 4096) * 4096) as own:  # shared, as a segment is
        memory = memoryview(own)
        host = torch.frombuffer(memory, dtype=torch.uint8)[:size].view(arrangement.group().shape)
        devices = [machine.device(arrangement, pages, slot_bytes=slot_bytes) for pages in (ours, theirs)]
        if direct:
            for device in devices[:1]:  # memory can be pinned once
                device._pins.add(memory, writable=True).join()
                assert device._pins.whole(host.data_ptr(), size), "it cannot be pinned"
        devices[0].save(0, BLOCKS, host, devices[0].mark()).done.result(SECONDS)
        assert bytes_of(host) == object_of(ours, BLOCKS)
        blocks = [NO_BLOCK, *OTHERS[1:3], NO_BLOCK]
        devices[1].load(0, blocks, host, devices[1].mark()).done.result(SECONDS)
        machine.wait()
        for one, other in zip(ours, theirs, strict=True):
            assert [raw(one, block) for block in BLOCKS[1:3]] == [raw(other, block) for block in OTHERS[1:3]]
            assert not any(any(raw(other, block)) for block in (NO_BLOCK, OTHERS[0], OTHERS[3]))
        for device in devices:
            device.close()
        del host, device, devices
        memory.release()


def as_a_cpu(machine: Machine, name: str) -> None:
    """The object that a CPU makes of the same pages."""
    arrangement = ARRANGEMENTS[name]
    pages = arrangement.caches(machine.name)
    device, host, theirs = machine.device(arrangement, pages), _host(machine, arrangement), _host(machine, arrangement)
    device.save(0, BLOCKS, host, device.mark()).done.result(SECONDS)
    device.close()
    layout = ModelLayout("measured", (arrangement.group(),), chunk_tokens=4 * arrangement.tokens)
    where = Geometry(layout, (Pages(0, arrangement.tokens, tuple(map(str, range(LAYERS)))),))
    bytes_of = {
        str(layer): cache.cpu().contiguous().view(torch.uint8).view(cache.shape[0], -1)
        for layer, cache in enumerate(pages)
    }
    cpu = HostDevice(where, bytes_of)
    cpu.save(0, BLOCKS, theirs, cpu.mark()).done.result(SECONDS)
    cpu.close()
    assert torch.equal(host, theirs)


def refused(machine: Machine, name: str) -> None:
    """Pages in which something else lies."""
    try:
        rows_of(REFUSED[name].caches(machine.name), REFUSED[name].group())
    except ConfigError:
        return
    raise AssertionError("they are no rows")


def reused_blocks(machine: Machine) -> None:
    """Blocks that the engine writes to as soon as it was told to wait for those who read them, again and again."""
    pages = PLAIN.caches(machine.name)
    expected = object_of(pages, BLOCKS)
    device, before = machine.device(PLAIN, pages), [page.clone() for page in pages]
    for _ in range(20):
        host = _host(machine, PLAIN)
        copy = device.save(0, BLOCKS, host, device.mark())
        try:
            device.hold([copy])
            for page in pages:
                page.view(torch.uint8).fill_(0xEE)
            copy.done.result(SECONDS)
            assert bytes_of(host) == expected, "the engine did not wait"
        except DeviceError:
            pass  # it was given up in time
        for page, kept in zip(pages, before, strict=True):
            page.copy_(kept)
    device.close()


def after_the_engine(machine: Machine) -> None:
    """Loads into blocks that the engine zeroes at that time, and saves of blocks that it writes at that time."""
    pages = PLAIN.caches(machine.name, filled=False)
    device, host = machine.device(PLAIN, pages), _host(machine, PLAIN)
    source = PLAIN.caches(machine.name)
    busy = torch.randn(512 if machine.is_real else 8, 512 if machine.is_real else 8, device=machine.name)
    for _ in range(10):
        for _ in range(20):
            busy = (busy @ busy).clamp_(-1, 1)
        for page, written in zip(pages, source, strict=True):
            page.copy_(written)
        device.save(0, BLOCKS, host, device.mark()).done.result(SECONDS)
        assert bytes_of(host) == object_of(source, BLOCKS)
        for _ in range(20):
            busy = (busy @ busy).clamp_(-1, 1)
        for page in pages:
            page.view(torch.uint8).zero_()
        device.load(0, OTHERS, host, device.mark()).done.result(SECONDS)
        assert object_of(pages, OTHERS) == object_of(source, BLOCKS)
    device.close()


def beside_a_graph(machine: Machine) -> None:
    """Copies beside the replays of a graph: both are right."""
    pages = PLAIN.caches(machine.name)
    device = machine.device(PLAIN, pages)
    if machine.is_real:
        x = torch.randn(512, 512, device=machine.name)
        out = torch.empty_like(x)
        graph = torch.cuda.CUDAGraph()
        torch.mm(x, x, out=out)
        machine.wait()
        with torch.cuda.graph(graph):  # there is a device already, and it calls nothing meanwhile
            torch.mm(x, x, out=out)
        expected = torch.mm(x, x)
    for _ in range(20):
        host = _host(machine, PLAIN)
        copies = [device.save(0, BLOCKS, host, device.mark())]
        if machine.is_real:
            for _ in range(10):
                graph.replay()
        copies[0].done.result(SECONDS)
        assert bytes_of(host) == object_of(pages, BLOCKS)
    if machine.is_real:
        assert torch.equal(out, expected)
    device.close()


def a_failed_pin(machine: Machine) -> None:
    """Memory that cannot be pinned: nothing of it comes up in the engine's thread."""
    device = machine.device(PLAIN, PLAIN.caches(machine.name))
    thread = device._pins.add(memoryview(bytearray(3)), writable=False)  # no page of its own
    thread.join()
    torch.ones(8, device=machine.name).add_(1)
    machine.wait()
    device.close()


def cases() -> Iterator[tuple[str, Callable[[Machine], None]]]:
    """All checks, by name."""
    for name in ARRANGEMENTS:
        for slot_bytes, slots in ((1, "a layer a slot"), (32 << 20, "one slot")):
            for direct in (False, True):
                way = "direct" if direct else "bounced"
                yield f"{name}, {slots}, {way}", partial(round_trip, name=name, slot_bytes=slot_bytes, direct=direct)
    for name in ("a tensor for each layer", "LBHNC", "fp16", "latent", "latent with scales"):
        yield f"{name}, as a CPU", partial(as_a_cpu, name=name)
    for name in REFUSED:
        yield f"{name} is refused", partial(refused, name=name)
    for check in (reused_blocks, after_the_engine, beside_a_graph, a_failed_pin):
        yield check.__name__.replace("_", " "), check


CASES = dict(cases())


def run(machine: Machine) -> dict[str, Any]:
    """All of them; which have failed, and why."""
    failed = {}
    for name, check in CASES.items():
        try:
            check(machine)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    return {"checks": len(CASES), "failed": failed}
