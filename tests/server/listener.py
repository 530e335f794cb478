"""One who wants to listen, as a program: `python -m server.listener URL`. For each line `listen` it says whether it
does now, and on `close` it listens no more."""

import sys

from async_cache import ConfigError
from async_cache.protocol.address import Address
from async_cache.server.listener import Listener

from .programs import say


def main(url):
    listener = None
    for line in sys.stdin:
        if line.strip() == "close":
            if listener is not None:
                listener.close()
                listener = None
            say("closed")
            continue
        try:
            listener = Listener(Address.parse(url))
            say("listening")
        except ConfigError as error:
            say(error)


if __name__ == "__main__":
    main(sys.argv[1])
