"""Commands that change the backends of a server while it runs, or move what a backend holds to another one."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from async_cache.cli.terminal import (
    Json,
    TokenFile,
    Url,
    busy,
    console,
    directory_of,
    print_json,
    show_bytes,
    table,
    with_client,
)
from async_cache.client.client import CacheClient
from async_cache.errors import BackendError, ConfigError
from async_cache.l2.copy import copy_all
from async_cache.l2.urls.registry import from_url
from async_cache.values import BackendState, BackendStatus, Copied

_SHOWN_SECONDS = 0.2  # between two looks at how far a server is

backend_app = typer.Typer(
    help="Add, drain, remove and list the storage backends of a running server.", no_args_is_help=True
)
Name = Annotated[str, typer.Argument(metavar="NAME", help="The backend, as `backend list` shows it.")]


@backend_app.command("add")
def add(
    backend_url: Annotated[str, typer.Argument(metavar="URL", help="The backend, such as fs:///path?capacity=10GiB.")],
    position: Annotated[
        int | None, typer.Option("--position", min=0, help="Before the backend of this number, from 0; or the slowest.")
    ] = None,
    url: Url = "",
    token_file: TokenFile = None,
    json: Json = False,
) -> None:
    """Have a running server open one more backend, and use it. With --json, those that there are then are listed."""

    async def ask(client: CacheClient) -> None:
        try:
            await client.add_backend(backend_url, position=position)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"--position: {error}") from error
        if json:
            print_json(await client.backends())

    with_client(url, token_file, ask)


@backend_app.command("drain")
def drain(name: Name, url: Url = "", token_file: TokenFile = None, json: Json = False) -> None:
    """Write nothing new to a backend, and copy what only it has to the others. The server goes on without this."""

    async def ask(client: CacheClient) -> None:
        waits = asyncio.create_task(client.drain_backend(name))
        with _progress(shown=not json) as show:
            while not (await asyncio.wait((waits,), timeout=_SHOWN_SECONDS))[0]:
                for backend in await client.backends():
                    if backend.name == name and backend.copied is not None:
                        show(backend.copied, backend.usage.objects if backend.usage is not None else None)
            status = await waits
        copied = status.copied or Copied()
        _tell(copied, json=json)
        if status.state is not BackendState.DRAINED:
            raise BackendError(f"{name} is not drained, {_failures(copied)}")

    with_client(url, token_file, ask)


@backend_app.command("remove")
def remove(name: Name, url: Url = "", token_file: TokenFile = None, json: Json = False) -> None:
    """Have a running server use a backend no more, and close it. What only it has is not found then: see `drain`.

    With --json, those that there are then are listed.
    """

    async def ask(client: CacheClient) -> None:
        with busy("waiting for what was promised of it", shown=not json):
            await client.remove_backend(name)
        if json:
            print_json(await client.backends())

    with_client(url, token_file, ask)


@backend_app.command("list")
def list_backends(url: Url = "", token_file: TokenFile = None, json: Json = False) -> None:
    """Show the backends of a running server, the fastest first."""

    async def ask(client: CacheClient) -> None:
        backends = await client.backends()
        if json:
            print_json(backends)
        else:
            console.print(_table(backends) if backends else "no backend")

    with_client(url, token_file, ask)


def copy(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The URL of the backend to copy from.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="The URL of the backend to copy to.")],
    json: Json = False,
) -> None:
    """Copy all that one backend holds, and another one lacks. To break it off does no harm: run it again."""
    of, to = from_url(source), from_url(target)
    if (
        holds := directory_of(source)
    ) is not None and not holds.is_dir():  # to open it would make one, and copy nothing
        raise ConfigError(f"SRC: there is no directory {holds}")

    async def run() -> Copied:
        with _progress(shown=not json) as show:
            return await copy_all(of, to, told=lambda copied: show(copied, of.usage().objects))

    copied = uvloop.run(run())
    _tell(copied, json=json)
    if copied.failed:
        raise BackendError(_failures(copied))


def _failures(copied: Copied) -> str:
    return f"{copied.failed:,} objects could not be read, or were not stored: run it again"


def _tell(copied: Copied, *, json: bool) -> None:
    """Print what was done."""
    if json:
        print_json(copied)
        return
    console.print(
        f"{copied.found:,} objects: {copied.copied:,} copied ({show_bytes(copied.copied_bytes)}),"
        f" {copied.present:,} were there, {copied.gone:,} gone, {copied.corrupt:,} corrupt, {copied.failed:,} failed"
    )


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[Copied, int | None], None]]:
    """A bar on standard error, if that is a terminal: what it gives is told how far it is, and of how many objects."""
    on = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=on, disable=not (shown and on.is_terminal), transient=True) as progress:
        bar = progress.add_task("objects", total=None)

        def show(copied: Copied, total: int | None) -> None:
            text = f"{show_bytes(copied.copied_bytes)} copied"
            progress.update(bar, description=text, completed=copied.found, total=max(total or 0, copied.found))

        yield show


def _table(backends: Sequence[BackendStatus]) -> Table:
    rows = table("backend", "state", "breaker", "used", "of", "objects", "pending", "given")
    for backend in backends:
        usage = backend.usage
        used = show_bytes(usage.used_bytes) if usage is not None else "?"
        bound = show_bytes(usage.capacity_bytes) if usage is not None and usage.capacity_bytes else "no bound"
        given = [backend.write, *["promoted"] * backend.promote, *[f"admit={backend.admit}"] * (backend.admit > 1)]
        if backend.write_budget is not None:
            left = show_bytes(backend.budget_left_bytes or 0)
            given.append(f"{show_bytes(backend.write_budget)} a day, {left} left")
        if backend.refused:
            given.append(f"{sum(backend.refused.values()):,} chunks refused")
        objects = f"{usage.objects:,}" if usage is not None else "?"
        row = backend.name, backend.state.value, backend.breaker, used, bound, objects, f"{backend.pending:,}"
        rows.add_row(*row, ", ".join(given))
    return rows
