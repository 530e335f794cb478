"""The commands that ask a server about itself: whether it is there, what it holds, and to read its settings anew."""

from typing import Annotated

import msgspec
import typer

from async_cache.cli.terminal import Json, TokenFile, Url, console, grid, print_json, show_bytes, with_client
from async_cache.client.client import CacheClient
from async_cache.values import CacheStats


def ping(
    url: Url = "",
    token_file: TokenFile = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=100_000, help="How often.")] = 3,
    json: Json = False,
) -> None:
    """Ask a server whether it is there, and how long it takes to say so."""

    async def ask(client: CacheClient) -> None:
        times = sorted([await client.ping() for _ in range(count)])
        told = {"fastest": times[0], "median": times[count // 2], "slowest": times[-1]}
        if json:
            print_json({"answers": count} | {f"{which}_seconds": seconds for which, seconds in told.items()})
            return
        shown = ", ".join(f"{which} {seconds * 1e6:.0f} us" for which, seconds in told.items())
        console.print(f"{count} answers: {shown}", highlight=False)

    with_client(url, token_file, ask)


def status(
    url: Url = "",
    token_file: TokenFile = None,
    json: Json = False,
) -> None:
    """Show what a server holds."""

    async def show(client: CacheClient) -> None:
        stats = await client.stats()
        if json:
            print_json(msgspec.structs.asdict(stats))
        else:
            print_status(stats)

    with_client(url, token_file, show)


def reload_settings(
    url: Url = "",
    token_file: TokenFile = None,
    json: Json = False,
) -> None:
    """Have a running server read the file of its settings anew, and say what has changed. As SIGHUP does."""

    async def ask(client: CacheClient) -> None:
        changed, waiting = await client.reload()
        if json:
            print_json({"changed": changed, "waiting": waiting})
            return
        console.print(f"changed: {', '.join(changed) or 'nothing'}")
        if waiting:
            console.print(f"wait for a restart: {', '.join(waiting)}")

    with_client(url, token_file, ask)


def print_status(stats: CacheStats) -> None:
    """A table: L1 and the requests, then the backends of L2."""
    rows = grid(2)
    used, capacity = stats.l1_used_bytes, stats.l1_capacity_bytes
    share = f"{used / capacity:.0%}" if capacity else ""
    rows.add_row("L1", f"{show_bytes(used)} of {show_bytes(capacity)} ({share}), {stats.l1_chunks:,} chunks")
    rows.add_row("", f"leased {show_bytes(stats.leased_bytes)}, reserved {show_bytes(stats.reserved_bytes)},")
    rows.add_row("", f"quarantined {show_bytes(stats.quarantined_bytes)}")
    rows.add_row("requests", f"{stats.requests:,}, which hold {stats.leases:,} leases")
    rows.add_row("loads", f"{stats.loads:,} objects, {stats.shared_loads:,} shared")
    rows.add_row("write-back", f"{stats.writebacks_pending:,} chunks pending, {stats.writebacks_dropped:,} dropped")
    rows.add_row(
        "swept",
        f"{stats.swept_results:,} results, {stats.swept_leases:,} leases, {stats.swept_reservations:,} reservations",
    )
    for name, usage in stats.backends.items():
        bound = show_bytes(usage.capacity_bytes) if usage.capacity_bytes is not None else "no bound"
        rows.add_row(f"L2 {name}", f"{show_bytes(usage.used_bytes)} of {bound}, {usage.objects:,} objects")
    if stats.hold is not None:
        by = f", by {stats.hold.where}" if stats.hold.where else ""
        rows.add_row("loop held", f"{stats.hold.busy_seconds * 1e3:.1f} ms at most in the last minute{by}")
    for name, use in stats.limits.items():
        most = f"{use.most:,}" if use.most is not None else "no limit"
        rows.add_row(f"limit {name}", f"{use.used:,} of {most}")
    console.print(rows, highlight=False)
