"""A server that counts nothing, to be measured beside one that does; the arguments are those of `async-cache`."""

from async_cache.cli import main
from async_cache.metrics import Watch

Watch.open = lambda self: None

if __name__ == "__main__":
    main()
