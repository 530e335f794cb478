"""The command line, `async-cache`: a server, and what one asks and tells it.

app       which commands there are, each imported when it is asked for, and how what goes wrong is told
serving   to serve, and the settings that this would be with
asking    those that ask a server about itself
backends  those that change the backends of a server, or move what a backend holds
prompts   those about prompts and chunks: why one is not cached, what there is
keeping   those about what is kept, and loaded beforehand
replay    what would have been found of a trace, under which policy and with how much memory
timed     how long a server takes for the requests of a trace
size      how much memory a model and its requests want
bench     what a server does under a mix of requests
doctor    whether a machine can do what the settings want
top       what a server does, live
web       what a server says over HTTP
drawing   how numbers and shares are drawn
terminal  what commands share: the console, a client of the server, how sizes are written
"""

import sys
from importlib.metadata import EntryPoint

_EXTRA = {"aiofiles", "prometheus_client", "rich", "starlette", "typer", "uvicorn"}


def main() -> None:
    """Run a command, or say which extra it lacks, and exit."""
    try:
        EntryPoint("main", "async_cache.cli.app:main", "").load()()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        needs = "the commands need the extra server: pip install 'async-kv-cache[server]'"
        sys.exit(f"async-cache: {missing} is not installed; {needs}")


__all__ = ["main"]
