"""`async-cache bench`: what a server does under a mix of requests, as a table and a plot."""

import asyncio
import itertools
import random
import time
from typing import Annotated, Any

import typer
import uvloop
from msgspec import Struct
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from async_cache.cli.drawing import percent, seconds
from async_cache.cli.terminal import Json, TokenFile, Url, connected, console, print_json, show_bytes, table
from async_cache.client.client import CacheClient
from async_cache.config import parse_bytes, prefixed
from async_cache.errors import AsyncCacheError, ConfigError
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.prompt.objects import ObjectGroup

_CHUNK_TOKENS = 256
_TICKS = 20  # of the progress, in a second
_MODEL = "async-cache bench"


class Mix(Struct, frozen=True):
    """What is asked of a server: how many prompts, how long, how often one is asked for again, and by how many."""

    prompts: int
    chunks: int
    chunk_bytes: int
    hits: float
    clients: int
    seconds: float
    seed: int


class Taken(Struct):
    """The seconds that requests took, and what they found."""

    lookup: list[float]
    load: list[float]
    store: list[float]
    asked: int = 0
    l1: int = 0
    l2: int = 0
    failed: int = 0
    loaded_bytes: int = 0


def bench(
    url: Url = "",
    token_file: TokenFile = None,
    duration: Annotated[float, typer.Option("--seconds", min=0.1, max=3600, help="For how long.")] = 10.0,
    clients: Annotated[int, typer.Option("--clients", min=1, max=256, help="Requests at a time.")] = 8,
    prompts: Annotated[
        int, typer.Option("--prompts", min=1, max=100_000, help="Prompts that are asked for again.")
    ] = 64,
    chunks: Annotated[int, typer.Option("--chunks", min=1, max=4096, help="Chunks of a prompt, of 256 tokens.")] = 16,
    chunk_bytes: Annotated[str, typer.Option("--chunk-bytes", metavar="SIZE", help="Of a chunk.")] = "256KiB",
    hits: Annotated[float, typer.Option("--hits", min=0, max=1, help="The part of requests for a known prompt.")] = 0.9,
    seed: Annotated[int, typer.Option("--seed", help="The same mix again.")] = 1,
    json: Json = False,
) -> None:
    """Drive a server with a mix of requests, and say how long they took. What it stores is removed at the end.

    A request is looked up, loaded and released; what it lacks is stored. Beside other traffic, it slows that down, and
    where a tier is full, what it stores makes chunks of others leave.
    """
    with prefixed("--chunk-bytes"):
        size_bytes = parse_bytes(chunk_bytes)
    mix = Mix(prompts, chunks, size_bytes, hits, clients, duration, seed)
    layout = ModelLayout(_MODEL, (ObjectGroup((mix.chunk_bytes,), "uint8"),), chunk_tokens=_CHUNK_TOKENS)

    async def run() -> Taken:
        async with connected(url, token_file) as client:
            return await _drive(client, layout, mix, shown=not json)

    taken = uvloop.run(run())
    if not taken.lookup:
        raise ConfigError("no request was done: take more --seconds")
    if json:
        print_json(_numbers(taken, mix))
    else:
        _print(taken, mix)


async def _drive(client: CacheClient, layout: ModelLayout, mix: Mix, *, shown: bool) -> Taken:
    taken, chance, fresh = Taken([], [], []), random.Random(mix.seed), itertools.count(mix.prompts)
    stored: dict[int, Prompt] = {}

    def prompt(number: int) -> Prompt:
        made = stored.get(number)
        if made is None:
            body = range(mix.chunks * _CHUNK_TOKENS - 2)
            made = stored[number] = layout.prompt([mix.seed % 2**20, number, *body])
        return made

    async def go() -> None:
        while time.perf_counter() < end:
            known = chance.random() < mix.hits
            try:
                await _request(client, prompt(chance.randrange(mix.prompts) if known else next(fresh)), taken)
            except AsyncCacheError:
                taken.failed += 1
                await asyncio.sleep(0.01)

    end = time.perf_counter() + mix.seconds
    workers = [asyncio.create_task(go()) for _ in range(mix.clients)]
    await _show_progress(end, mix.seconds, workers, shown=shown)
    for made in stored.values():
        await client.delete(made)
    return taken


async def _request(client: CacheClient, prompt: Prompt, taken: Taken) -> None:
    began = time.perf_counter()
    prefetch = client.prefetch(prompt)
    hits = await prefetch.lookup_done
    known = time.perf_counter()
    result = await prefetch.load_done
    loaded = time.perf_counter()
    taken.lookup.append(known - began)
    if hits.l2_chunks:
        taken.load.append(loaded - began)
        taken.loaded_bytes += hits.load_bytes
    taken.asked += len(prompt)
    taken.l1, taken.l2 = taken.l1 + hits.l1_chunks, taken.l2 + hits.l2_chunks
    await client.end_request(prefetch.request_id)
    if result.chunks < len(prompt):
        began = time.perf_counter()
        async with client.store(prompt, start_chunk=result.chunks) as writer:
            for chunk in writer:
                chunk.commit()
        taken.store.append(time.perf_counter() - began)


async def _show_progress(end: float, whole: float, workers: list["asyncio.Task[None]"], *, shown: bool) -> None:
    on = Console(stderr=True)
    columns = TextColumn("driving"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=on, disable=not (shown and on.is_terminal), transient=True) as progress:
        task = progress.add_task("", total=whole)
        while not (await asyncio.wait(workers, timeout=1 / _TICKS))[0]:
            progress.update(task, completed=whole - max(0.0, end - time.perf_counter()))
        await asyncio.gather(*workers)


def _numbers(taken: Taken, mix: Mix) -> dict[str, Any]:
    phases = ("lookup", taken.lookup), ("load", taken.load), ("store", taken.store)
    return {
        "mix": {name: getattr(mix, name) for name in mix.__struct_fields__},
        "requests": len(taken.lookup),
        "requests_per_second": len(taken.lookup) / mix.seconds,
        "failed": taken.failed,
        "hit_rate": {"l1": taken.l1 / taken.asked, "l2": taken.l2 / taken.asked},
        "loaded_bytes_per_second": taken.loaded_bytes / mix.seconds,
        **{
            f"{name}_seconds": {"count": len(times)} | {f"p{n}": _quantile(times, n / 100) for n in (50, 90, 99)}
            for name, times in phases
        },
    }


def _quantile(times: list[float], part: float) -> float | None:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else None


def _print(taken: Taken, mix: Mix) -> None:
    told = _numbers(taken, mix)
    console.print(
        f"{told['requests']:,} requests, {told['requests_per_second']:,.0f} a second; {taken.failed:,} failed"
    )
    l1, l2 = percent(taken.l1, taken.asked), percent(taken.l2, taken.asked)
    console.print(
        f"found {l1} in memory, {l2} in storage, from which {show_bytes(int(told['loaded_bytes_per_second']))}/s"
    )
    rows = table("", "count", "median", "90 %", "99 %")
    for name, times in (("lookup", taken.lookup), ("load", taken.load), ("store", taken.store)):
        rows.add_row(name, f"{len(times):,}", *(seconds(_quantile(times, part)) for part in (0.5, 0.9, 0.99)))
    console.print(rows)
    for name, times in (("lookup", taken.lookup), ("load", taken.load)):
        if times:
            console.print(f"\n{name}")
            _plot(times)


def _plot(times: list[float], width: int = 50) -> None:
    """A histogram: a line for each third of a power of ten."""
    bounds = [m * 10.0**e for e in range(-6, 3) for m in (1, 2, 5)]
    counts = [0] * (len(bounds) + 1)
    for value in times:
        counts[next((n for n, bound in enumerate(bounds) if value <= bound), len(bounds))] += 1
    there = [n for n, count in enumerate(counts) if count]
    for n in range(there[0], there[-1] + 1):
        upper = seconds(bounds[min(n, len(bounds) - 1)])
        console.print(f"{upper:>8}  {'█' * round(width * counts[n] / max(counts)):<{width}}  {counts[n]:,}")
