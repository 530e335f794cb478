"""`async-cache serve` and `async-cache config`, and the flags of those that take a server's settings."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
import uvloop

from async_cache.cli.terminal import Json, console, print_json, show_bytes, table
from async_cache.config import CacheConfig, Given, ServerConfig, hide_password, told_where
from async_cache.errors import ConfigError
from async_cache.l2.urls.registry import from_urls
from async_cache.memory.room import check_limits
from async_cache.protocol.address import Address
from async_cache.server.logs import log_to, say
from async_cache.server.process import serve as serve_until_signal
from async_cache.server.reload import Source

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
