"""What commands share: the console and its tables, a client of the server, how sizes are written."""

import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import msgspec
import typer
import uvloop
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from async_cache.client.client import CacheClient
from async_cache.client.connecting import connect
from async_cache.config import ServerConfig, prefixed
from async_cache.errors import ConfigError
from async_cache.protocol.address import Address

console = Console(
    width=None if sys.stdout is not None and sys.stdout.isatty() else 200, markup=False, emoji=False, highlight=False
)

HEARTBEAT_SECONDS = 2.5
"""Who has asked waits for twice as long for a server that is silent."""

Url = Annotated[
    str,
    typer.Option(
        "--url",
        metavar="URL",
        help="Where the server listens; by default, as its settings in the environment say.",
        show_default=False,
    ),
]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", metavar="FILE", help="A file with the token, if the server wants one.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value, and no progress.")]


def print_json(value: Any) -> None:
    """Print a value on one line, for programs."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def read_token(path: Path | None) -> str | None:
    """The token in a file, None without one. Raises ConfigError."""
    if path is None:
        return None
    try:
        return path.read_bytes().decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the token in {path}: {error}") from error


def connected(url: str, token_file: Path | None) -> CacheClient:
    """A client of the server, to enter. Raises ConfigError."""
    token = read_token(token_file)
    if url:
        with prefixed("--url"):
            Address.parse(url)
    return connect(url or ServerConfig.load().listen[0], token=token, heartbeat_seconds=HEARTBEAT_SECONDS)


def with_client(url: str, token_file: Path | None, use: Callable[[CacheClient], Awaitable[None]]) -> None:
    """Connect, and use the client."""

    async def run() -> None:
        async with connected(url, token_file) as client:
            await use(client)

    uvloop.run(run())


def directory_of(url: str) -> Path | None:
    """The directory that a backend of this URL keeps its objects in, None if it has none."""
    parts = urlsplit(url)
    return Path(unquote(parts.path, errors="surrogateescape")) if parts.scheme == "fs" else None


def show_bytes(size_bytes: int) -> str:
    """A size in powers of 1024, as the settings take it."""
    size, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.4g} {unit}"


def table(*headers: str) -> Table:
    """A table without lines, whose cells are as long as they are: what does not fit goes on in the next line."""
    made = Table(box=None, pad_edge=False)
    for header in headers:
        made.add_column(header, overflow="fold")
    return made


def grid(columns: int) -> Table:
    """The same without headers."""
    return Table.grid(*(Column(overflow="fold") for _ in range(columns)), padding=(0, 2))


@contextmanager
def busy(what: str, *, shown: bool) -> Iterator[None]:
    """Say on standard error, if that is a terminal, that something takes its time."""
    on = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=on, disable=not (shown and on.is_terminal), transient=True) as progress:
        progress.add_task(what, total=None)
        yield
