"""The command line: `async-cache serve | ping | status | config | backend | copy | top`, and `async-cache --version`.

app       the commands, and how what goes wrong is told
backends  those that change the backends of a server, or move what a backend holds
top       what a server does, live
web       what a server says over HTTP
drawing   how numbers and shares are drawn
terminal  what commands share: the console, a client of the server, how sizes are written
"""

from async_cache.cli.app import main

__all__ = ["main"]
