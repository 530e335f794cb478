"""The commands, and how what goes wrong is told: one line, and an exit code."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from async_cache import __version__
from async_cache.errors import AsyncCacheError
from async_cache.server.logs import tell

_STANDARD_ERROR = 2
_COMMANDS = {
    "serve": "async_cache.cli.serving",
    "ping": "async_cache.cli.asking",
    "status": "async_cache.cli.asking",
    "reload": "async_cache.cli.asking",
    "config": "async_cache.cli.serving",
    "copy": "async_cache.cli.backends",
    "replay": "async_cache.cli.replay",
    "size": "async_cache.cli.size",
    "top": "async_cache.cli.top",
    "explain": "async_cache.cli.prompts",
    "prefetch": "async_cache.cli.prompts",
    "retain": "async_cache.cli.keeping",
    "retained": "async_cache.cli.keeping",
    "warm": "async_cache.cli.keeping",
    "list": "async_cache.cli.prompts",
    "delete": "async_cache.cli.prompts",
    "delete-model": "async_cache.cli.prompts",
    "clear": "async_cache.cli.prompts",
    "bench": "async_cache.cli.bench",
    "doctor": "async_cache.cli.doctor",
    "backend": "async_cache.cli.backends",
}
"""The commands in the order of the help, each with its module: a function or a `Typer`, called as the command is."""
_OTHERWISE = {"config": "show_config", "list": "list_chunks", "reload": "reload_settings", "backend": "backend_app"}
"""The names of those that are not: where that would be a word of Python, or of something else."""


class Commands(TyperGroup):
    """Imports the module of a command when it is asked for: a `ping` does without what a server needs."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.commands: Any = dict.fromkeys(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """One of them, None where there is none of that name."""
        if cmd_name not in _COMMANDS:
            return None
        attribute = _OTHERWISE.get(cmd_name, cmd_name.replace("-", "_"))
        found = EntryPoint(cmd_name, f"{_COMMANDS[cmd_name]}:{attribute}", "").load()
        alone = typer.Typer(add_completion=False)
        if isinstance(found, typer.Typer):
            alone.add_typer(found, name=cmd_name)
            return get_group(alone).commands[cmd_name]
        alone.command(cmd_name)(found)
        return get_command(alone)


app = typer.Typer(
    cls=Commands,
    help="A KV cache for language-model servers, shared by the processes of a machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


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
        typer.echo(f"async-cache {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    """The options that stand before a command."""
