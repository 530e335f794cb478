"""A cache that a server keeps: the same members as `AsyncCache`.

memory    the arena, mapped read-only; a segment to write into
dial      from an address to a connection whose server has said welcome
claims    who waits for results: each is handed out once
link      one connection: what is under way on it, and breaks with it
writing   a writer of chunks, into the client's segment
client    `CacheClient`: one link after the other
blocking  `BlockingClient`: a client for engines that are not asynchronous
"""

from async_cache.client.blocking import BlockingClient
from async_cache.client.client import CacheClient, connect

__all__ = ["BlockingClient", "CacheClient", "connect"]
