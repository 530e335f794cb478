"""The commands, and how what goes wrong is told: one line, and an exit code."""

import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import uvloop

from async_cache import __version__
from async_cache.cli.backends import backend_app, copy
from async_cache.cli.bench import bench
from async_cache.cli.doctor import examine
from async_cache.cli.doctor import show as show_findings
from async_cache.cli.keeping import retain, retained, warm
from async_cache.cli.prompts import clear, delete, delete_model, explain, list_chunks, prefetch
from async_cache.cli.replay import replay
from async_cache.cli.size import size
from async_cache.cli.terminal import Json, TokenFile, Url, console, grid, print_json, show_bytes, table, with_client
from async_cache.cli.top import top
from async_cache.client.client import CacheClient
from async_cache.config import CacheConfig, Given, ServerConfig, hide_password, told_where
from async_cache.errors import AsyncCacheError, ConfigError
from async_cache.l2.urls.registry import from_urls
from async_cache.memory.room import check_limits
from async_cache.protocol.address import Address
from async_cache.server.logs import log_to, say, tell
from async_cache.server.process import serve as serve_until_signal
from async_cache.server.reload import Source
from async_cache.values import CacheStats

app = typer.Typer(
    help="A KV cache for language-model servers, shared by the processes of a machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(backend_app, name="backend")
_STANDARD_OUTPUT, _STANDARD_ERROR = 1, 2
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="Settings in TOML; see docs/configuration.md.")
]
Listen = Annotated[
    list[str] | None,
    typer.Option(
        "--listen",
        metavar="URL",
        help="unix:///path, tcp://host:port, or tls://host:port?cert=FILE&key=FILE; may be given more than once.",
    ),
]
L1Bytes = Annotated[str | None, typer.Option("--l1-bytes", metavar="SIZE", help="Memory for the cache, such as 64GiB.")]
L2 = Annotated[
    list[str] | None,
    typer.Option("--l2", metavar="URL", help="A storage backend, the fastest first; may be given more than once."),
]


def main() -> None:
    """Run a command; what goes wrong is one line and an exit code."""
    open_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names need not fit the encoding of the terminal
    with errors_in_one_line():
        app()


def open_standard_streams() -> None:
    """Have those that are closed lead nowhere: else what is opened next would be written to, or end the process."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STANDARD_ERROR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115 - they stay open
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Exit with code 1 and a line on standard error."""
    try:
        yield
    except (AsyncCacheError, OSError) as error:
        if not tell(f"async-cache: {' '.join(str(error).split())}\n"):
            os._exit(1)  # to exit as usual is to wait for who reads standard error
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def print_version(wanted: bool) -> None:
    """Print the version, and exit."""
    if wanted:
        console.print(f"async-cache {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    """The options that stand before a command."""


@app.command()
def serve(
    config: ConfigFile = None,
    listen: Listen = None,
    l1_bytes: L1Bytes = None,
    l2: L2 = None,
    quota: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QUOTA", help='What a salt may have, such as "acme?l1=2GiB&l2=20GiB"; any number of them.'
        ),
    ] = None,
    record: Annotated[
        str | None, typer.Option(metavar="FILE", help="Record requests as a trace, without tokens; see docs/traces.md.")
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="The least that is logged: debug, info, warning or error.")
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="How it is logged: text, or json, an object in each line.")
    ] = None,
) -> None:
    """Serve a cache until SIGTERM or SIGINT. A flag comes before the environment, and that before the file.

    SIGHUP has the file of --config read anew; without one, it ends the server, too.
    """
    for flag, name, value in (("--log-level", "log_level", log_level), ("--log-format", "log_format", log_format)):
        if value is not None:
            try:
                ServerConfig.check(name, value)
            except ConfigError as error:
                raise typer.BadParameter(str(error), param_hint=flag) from error

    def read_given() -> tuple[dict[str, Given], dict[str, Given]]:
        others = {"record": record and os.path.abspath(record), "log_level": log_level, "log_format": log_format}
        cache_given, server_given = given(config, listen, l1_bytes, l2, **others)
        if quota:
            cache_given["quotas"] = Given(tuple(quota), "--quota")
        return cache_given, server_given

    def read() -> tuple[CacheConfig, ServerConfig]:
        return checked(*read_given())

    cache_given, server_given = read_given()
    cache_config, server_config = checked(cache_given, server_given)
    size, where = show_bytes(cache_config.l1_bytes), hide_password(" ".join(cache_config.l2)) or "no storage"

    def ready(addresses: Sequence[Address]) -> None:
        said = f"async-cache with {size} of memory and {where}\nserving at {' '.join(map(str, addresses))}\n"
        say(_STANDARD_OUTPUT, said.encode(sys.stdout.encoding, "backslashreplace"))

    log_as = server_config.log_level.upper(), server_config.log_format
    with log_to(_STANDARD_ERROR, *log_as), told_where(cache_given | server_given):
        uvloop.run(
            serve_until_signal(cache_config, server_config, ready, Source(config, read) if config is not None else None)
        )


@app.command()
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


@app.command()
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


@app.command("reload")
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


@app.command("config")
def show_config(
    config: ConfigFile = None,
    listen: Listen = None,
    l1_bytes: L1Bytes = None,
    l2: L2 = None,
    json: Json = False,
) -> None:
    """Show the settings that `serve` would use with the same flags, and where each comes from.

    A server that runs takes over those that are live when it reads its file anew: by SIGHUP, or `async-cache reload`.
    """
    cache_given, server_given = given(config, listen, l1_bytes, l2)
    if json:
        settings = [
            {"setting": label, "value": value, "from": origin, "live": live}
            for label, value, origin, live in _shown(cache_given, server_given)
        ]
        print_json(settings)
        return
    rows = table("setting", "value", "from", "live")
    for label, value, origin, live in _shown(cache_given, server_given):
        rows.add_row(label, value, origin, "yes" if live else "")
    console.print(rows)


def _shown(cache_given: Mapping[str, Given], server_given: Mapping[str, Given]) -> Iterator[tuple[str, str, str, bool]]:
    """Each setting, its value, where it comes from, and whether a server that runs takes it over."""
    for made, origins in zip(checked(cache_given, server_given), (cache_given, server_given), strict=True):
        for name in made.__struct_fields__:
            label = f"{made.SECTION}.{name}" if made.SECTION else name
            origin = origins[name].origin if name in origins else "default"
            yield label, show_value(name, getattr(made, name)), origin, name not in made.AT_START


app.command()(copy)
app.command()(replay)
app.command()(size)
app.command()(top)
app.command()(explain)
app.command()(prefetch)
app.command()(retain)
app.command()(retained)
app.command()(warm)
app.command("list")(list_chunks)
app.command()(delete)
app.command()(delete_model)
app.command()(clear)
app.command()(bench)


@app.command()
def doctor(
    config: ConfigFile = None,
    listen: Listen = None,
    l1_bytes: L1Bytes = None,
    l2: L2 = None,
    json: Json = False,
) -> None:
    """Look whether this machine can do what the settings want: memory, limits, disks, sockets; say what to change.

    It takes the flags of `serve`. The exit code is 1 where something would not work.
    """
    cache_given, server_given = given(config, listen, l1_bytes, l2)
    cache_config, server_config = CacheConfig.of(cache_given), ServerConfig.of(server_given)
    if not show_findings(list(examine(cache_config, server_config)), json=json):
        raise typer.Exit(1)


def given(
    path: Path | None,
    listen: Sequence[str] | None,
    l1_bytes: str | None,
    l2: Sequence[str] | None,
    **others: str | None,
) -> tuple[dict[str, Given], dict[str, Given]]:
    """What the file, the environment and the flags say, each before the one before it."""
    cache, server = CacheConfig.given(path), ServerConfig.given(path)
    if l1_bytes is not None:
        cache["l1_bytes"] = Given(l1_bytes, "--l1-bytes")
    if l2:
        cache["l2"] = Given(tuple(l2), "--l2")
    if listen:
        server["listen"] = Given(tuple(listen), "--listen")
    for name, value in others.items():
        if value is not None:
            server[name] = Given(value, f"--{name.replace('_', '-')}")
    return cache, server


def checked(cache_given: Mapping[str, Given], server_given: Mapping[str, Given]) -> tuple[CacheConfig, ServerConfig]:
    """The settings that were given, if a server can use them; nothing is opened for that. Raises ConfigError."""
    cache_config, server_config = CacheConfig.of(cache_given), ServerConfig.of(server_given)
    with told_where(cache_given):
        check_limits(cache_config.l1_bytes)
        from_urls(cache_config.l2)
    return cache_config, server_config


def show_value(name: str, value: Any) -> str:
    """A setting as one would write it; a tenant without its tokens."""
    if name == "tenants":
        return "\n".join(
            f"{tenant}: {len(config.tokens)} token(s), salts: {'all' if config.salts is None else list(config.salts)}"
            + (f", may only {config.role}" if config.role != "all" else "")
            + (f", limits: {config.limits}" if config.limits else "")
            for tenant, config in value.items()
        )
    if isinstance(value, msgspec.Struct):
        fields = msgspec.structs.asdict(value)
        return "\n".join(f"{field} {show_value(field, it)}" for field, it in fields.items() if it is not None)
    if name.endswith("_bytes"):
        return show_bytes(value)
    return "\n".join(map(hide_password, value)) if isinstance(value, tuple) else str(value)


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
