"""`async-cache top`: the page, in a terminal."""

import asyncio
import os
import signal
import sys
import termios
import tty
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import log10
from typing import Annotated

import typer
import uvloop
from rich.console import Console, Group, RenderableType
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from async_cache.cli.drawing import bar, count, percent, seconds
from async_cache.cli.terminal import TokenFile, show_bytes
from async_cache.cli.web import Http, StatusPage
from async_cache.errors import ServiceError
from async_cache.server.http.status import BackendView, Flight, Status

_KEPT = 31  # statuses: what lies between the first and the last of them is "lately"
_SAMPLES, _FEW = 31, 6  # of the server's: the last minute, and the last ten seconds
_HELD_SECONDS = 0.05  # beyond this, it is said of the event loop
_SMALL = 100  # columns
_WORD = 15  # columns, for a reason
_ENDING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # after which the terminal is as it was
_FIRST, _LAST = -6, 2  # powers of ten, of a second


def top(
    http: Http = "",
    token_file: TokenFile = None,
    json: Annotated[bool, typer.Option("--json", help="Print the status once, as JSON, and exit.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.2, max=60, metavar="SECONDS", help="Between looks.")] = 2.0,
) -> None:
    """Watch a running server: its tiers, hit rate, requests on their way, and what misses. Press q to leave.

    It asks the server's HTTP port. Without a terminal, or on one that cannot be drawn on, it prints what there is
    once.
    """
    page = StatusPage(http, token_file)
    if json:
        sys.stdout.buffer.write(page.raw())
    elif sys.stdin.isatty() and sys.stdout.isatty() and not Console().is_dumb_terminal:
        uvloop.run(_watch(page, every))
    else:
        past: Past = deque([page.read()])
        plain = Console(width=120, markup=False, emoji=False)
        plain.print(Group(_head(past), _tiles(past), *(part for _, part in _parts(past, 20))))


Past = deque[Status]
"""What was seen before, the last at the end."""


async def _watch(page: StatusPage, every: float) -> None:
    """Look again and again, until somebody presses q."""
    past: Past = deque([await asyncio.to_thread(page.read)], _KEPT)
    left = asyncio.Event()
    with _keys(left), Live(console=Console(markup=False, emoji=False), screen=True, auto_refresh=False) as live:
        lost = ""
        while not left.is_set():
            live.update(_screen(past, lost, live.console.width), refresh=True)
            try:
                await asyncio.wait_for(left.wait(), every)
            except TimeoutError:
                try:
                    status = await asyncio.to_thread(page.read)
                except ServiceError as error:
                    lost = str(error)
                    continue
                lost = ""
                if status.uptime_seconds < past[-1].uptime_seconds:
                    past.clear()  # another server
                past.append(status)


@contextmanager
def _keys(left: asyncio.Event) -> Iterator[None]:
    """Have single keys read: q, Ctrl-C, the end of the input and a signal that ends processes set the event."""
    loop, stdin = asyncio.get_running_loop(), sys.stdin.fileno()
    before = termios.tcgetattr(stdin)

    def pressed() -> None:
        if os.read(stdin, 64).lower() in (b"q", b"", b"\x03", b"\x1b"):
            left.set()

    tty.setcbreak(stdin)
    loop.add_reader(stdin, pressed)
    for number in _ENDING:
        loop.add_signal_handler(number, left.set)
    try:
        yield
    finally:
        for number in _ENDING:
            loop.remove_signal_handler(number)
        loop.remove_reader(stdin)
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def _screen(past: Past, lost: str, width: int) -> RenderableType:
    """All of it, as large as the terminal."""
    screen, small = Layout(), width < _SMALL
    head = _head(past, lost)
    parts = dict(_parts(past, 60, small=small))
    screen.split_column(
        Layout(head, size=1 + _is_held(past[-1]) + len(past[-1].problems) + bool(lost)),
        Layout(_tiles(past, small=small), size=4),
        Layout(Panel(parts["requests"], title="requests", title_align="left"), ratio=3, minimum_size=5),
        Layout(name="below", ratio=3 if small else 2, minimum_size=6),
    )
    tiers = Panel(parts["tiers"], title="tiers", title_align="left")
    missed = Panel(parts["misses"], title="what misses, and why", title_align="left")
    tenants = Panel(parts["tenants"], title="tenants and models", title_align="left")
    below = [Layout(tiers), Layout(missed)] if small else [Layout(tiers), Layout(missed), Layout(tenants)]
    screen["below"].split_row(*below)
    return screen


def _parts(past: Past, rows: int, *, small: bool = False) -> Sequence[tuple[str, RenderableType]]:
    status = past[-1]
    return (
        ("requests", _requests(status, rows, small=small)),
        ("tiers", _tiers(past)),
        ("misses", _misses(status)),
        ("tenants", _tenants(status)),
    )


def _head(past: Past, lost: str = "") -> RenderableType:
    status = past[-1]
    state = Text.assemble(("● no answer", "bold red")) if lost else Text.assemble(("● healthy", "bold green"))
    if status.problems and not lost:
        state = Text(f"● {len(status.problems)} problem" + "s" * (len(status.problems) > 1), "bold red")
    clients = f"{status.connections:,} client" + "s" * (status.connections != 1)
    about = f"  {status.version}, up {seconds(status.uptime_seconds)}, {clients}   q: leave"
    lines = [Text.assemble(("async_cache  ", "bold"), state, (about, "dim"))]
    if _is_held(status) and status.hold is not None:
        held = f"  the loop was held for {seconds(status.hold.busy_seconds)} by {status.hold.where}"
        lines.append(Text(held, "yellow", no_wrap=True, overflow="ellipsis"))
    lines += [Text(f"  {problem.detail}", "red") for problem in status.problems]
    return Group(*lines, *([Text(f"  {lost}", "red")] if lost else []))


def _is_held(status: Status) -> bool:
    return status.hold is not None and status.hold.busy_seconds > _HELD_SECONDS


def _tiles(past: Past, *, small: bool = False) -> RenderableType:
    status = past[-1]
    now, then, before = status.history[-1], status.history[-_SAMPLES:][0], status.history[-_FEW:][0]
    asked = now.asked - then.asked
    hits = now.l1_hits + now.l2_hits - then.l1_hits - then.l2_hits
    if not asked:  # nothing lately: since the beginning
        asked, hits = now.asked, now.l1_hits + now.l2_hits
    span = now.seconds - before.seconds
    speed = (now.requests - before.requests) / span if span > 0 else 0.0
    tiles = Table.grid(expand=True, padding=(0, 1))
    for _ in range(4):
        tiles.add_column(ratio=1)
    known, loaded, most = "until hits known", "then, until loaded", "99 %: "
    if small:
        known, loaded, most = "known 50, 99 %", "loaded 50, 99 %", ""
    tiles.add_row(
        _tile("hit rate", percent(hits, asked), "" if small else "of tokens"),
        _tile("requests/s", f"{speed:,.1f}", f"+{status.pending:,}" if small else f"{status.pending:,} on their way"),
        _tile(known, seconds(status.lookup.median), f"{most}{seconds(status.lookup.p99)}"),
        _tile(loaded, seconds(status.gap.median), f"{most}{seconds(status.gap.p99)}"),
    )
    return tiles


def _tile(title: str, value: str, note: str = "") -> Panel:
    text = Text.assemble((value, "bold"), (f"  {note}", "dim"), no_wrap=True, overflow="ellipsis")
    return Panel(text, title=title, title_align="left")


def _requests(status: Status, rows: int, *, small: bool) -> RenderableType:
    """Those on their way, and the last ones, each with its two futures on a scale of powers of ten."""
    width = 24 if small else 40
    scale = "1 µs" + " " * (width - 9) + "100 s"
    table = Table("request", scale, "took", box=None, pad_edge=False, expand=True)
    if not small:
        table.add_column("chunks")
        table.add_column("tenant · model")
    table.columns[2].justify = "right"
    for flight in [*status.flights, *status.recent][:rows]:
        row: list[RenderableType] = [Text(flight.request_id, no_wrap=True, overflow="ellipsis")]
        took = flight.seconds if flight.seconds is not None else flight.ago_seconds
        row += [_timeline(flight, width), flight.shortfall or seconds(took)]
        row += [] if small else [_chunks(flight), Text(_whose(flight.tenant, flight.model), no_wrap=True)]
        table.add_row(*row)
    return table


def _timeline(flight: Flight, width: int) -> Text:
    """A request from its beginning: until the hits are known (●), and until they are in memory (■), or still waits."""
    known, done, now = flight.lookup_seconds, flight.seconds, flight.ago_seconds
    line, styles = [" "] * width, [""] * width

    def draw(begin: int, end: int, sign: str, style: str) -> None:
        for at in range(begin, min(end, width)):
            line[at], styles[at] = sign, style

    if known is None:
        draw(0, _place(now, width), "╌", "blue")
    else:
        middle = _place(known, width)
        draw(0, middle, "━", "blue")
        if done is None:
            draw(middle, _place(now, width), "╌", "yellow")
        elif flight.l2_chunks or flight.shortfall:
            style = "red" if flight.shortfall else "yellow"
            end = _place(done, width)
            draw(middle, end, "━", style)
            draw(end, end + 1, "■", style)
        draw(middle, middle + 1, "●", "blue")
    return Text.assemble(*zip(line, styles, strict=True), no_wrap=True)


def _place(value: float, width: int) -> int:
    part = (log10(max(value, 10.0**_FIRST)) - _FIRST) / (_LAST - _FIRST)
    return min(width - 1, int(part * width))


def _chunks(flight: Flight) -> Text:
    missing = max(0, flight.asked_chunks - flight.l1_chunks - flight.l2_chunks)
    return bar([(flight.l1_chunks, "blue"), (flight.l2_chunks, "yellow"), (missing, "bright_black")], 12)


def _tiers(past: Past) -> RenderableType:
    stats = past[-1].stats
    capacity, leased, reserved = stats.l1_capacity_bytes, stats.leased_bytes, stats.reserved_bytes
    aside = stats.quarantined_bytes
    idle = max(0, stats.l1_used_bytes - leased - reserved - aside)
    free = capacity - stats.l1_used_bytes
    parts = [(leased, "blue"), (idle, "bright_blue"), (reserved, "magenta"), (aside, "red"), (free, "bright_black")]
    legend = Text.assemble(
        *(("■ ", "blue"), f"leased {show_bytes(leased)} "),
        *(("■ ", "bright_blue"), f"idle {show_bytes(idle)} "),
        *((("■ ", "red"), f"set aside {show_bytes(aside)} ") if aside else ()),
        *(("■ ", "bright_black"), f"free {show_bytes(free)}"),
    )
    lines: list[RenderableType] = [
        Text.assemble(("memory ", "bold"), f"{show_bytes(capacity)}, {stats.l1_chunks:,} chunks"),
        bar(parts, 30),
        legend,
    ]
    before = {view.status.name: view for view in past[0].backends}
    span = past[-1].uptime_seconds - past[0].uptime_seconds
    for view in past[-1].backends:
        lines += _backend(view, before.get(view.status.name, view), span)
    return Group(*lines)


def _backend(view: BackendView, before: BackendView, span: float) -> Iterator[RenderableType]:
    status, usage = view.status, view.status.usage
    well = status.breaker == "closed"
    state = (f" {status.state.value}", "dim") if well else (f" left alone ({status.breaker})", "bold red")
    yield Text.assemble("\n", (status.name, "bold"), state)
    if usage is not None and usage.capacity_bytes:
        free = max(0, usage.capacity_bytes - usage.used_bytes)
        yield bar([(usage.used_bytes, "yellow"), (free, "bright_black")], 30)
    held = f"{show_bytes(usage.used_bytes)}, {usage.objects:,} objects" if usage is not None else "cannot say"
    loads, stores = (
        f"{show_bytes(int((now - then) / span))}/s" if span > 0 else "-"
        for now, then in ((view.loaded_bytes, before.loaded_bytes), (view.stored_bytes, before.stored_bytes))
    )
    yield Text.assemble(held, (f"  loads {loads}  stores {stores}", "dim"))


def _misses(status: Status) -> RenderableType:
    groups = (
        ("first missing chunk", status.missed, "bright_black"),
        ("promised less", status.trimmed, "yellow"),
        ("promises broken", status.broken, "red"),
        ("chunks left memory", status.removed, "blue"),
    )
    lines: list[RenderableType] = []
    for title, counts, color in groups:
        found = sorted(((n, word) for word, n in counts.items() if n), reverse=True)
        table = Table.grid(padding=(0, 1))
        table.add_column(width=_WORD, no_wrap=True)
        for n, word in found:
            table.add_row(f"  {word.replace('_', ' ')}", bar([(n, color), (found[0][0] - n, "")], 12), count(n))
        lines += [Text(title, "dim", no_wrap=True), table] if found else []
    return Group(*lines) if lines else Text("nothing yet", "dim")


def _tenants(status: Status) -> RenderableType:
    table = Table("tenant · model", "found", "hits", "tokens", box=None, pad_edge=False, expand=True)
    for row in status.tokens:
        missed = max(0, row.asked - row.l1_hits - row.l2_hits)
        parts = bar([(row.l1_hits, "blue"), (row.l2_hits, "yellow"), (missed, "bright_black")], 12)
        hits = percent(row.l1_hits + row.l2_hits, row.asked)
        table.add_row(Text(_whose(row.tenant, row.model), no_wrap=True), parts, hits, count(row.asked))
    return table


def _whose(tenant: str, model: str) -> str:
    return " · ".join(filter(None, (tenant, model)))
