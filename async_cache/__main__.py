"""`python -m async_cache` is the command line."""

from async_cache.cli import main

if __name__ == "__main__":
    main()
