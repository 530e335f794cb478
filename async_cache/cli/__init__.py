"""The command line, `async-cache`: a server, and what one asks and tells it.

app       the commands, and how what goes wrong is told
backends  those that change the backends of a server, or move what a backend holds
prompts   those about prompts and chunks: why one is not cached, what there is
bench     what a server does under a mix of requests
doctor    whether a machine can do what the settings want
top       what a server does, live
web       what a server says over HTTP
drawing   how numbers and shares are drawn
terminal  what commands share: the console, a client of the server, how sizes are written
"""

from async_cache.cli.app import main

__all__ = ["main"]
