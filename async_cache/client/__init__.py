"""A cache that a server keeps: the same members as `AsyncCache`.

connecting  `connect`: from its arguments to a client
client    `CacheClient`: a member for each thing that a server can be asked
operations  those of them that are not about a prompt: what is held of whom, backends, settings
links     one link after the other: back-off and heartbeat
dial      from an address to a link whose server has said welcome
link      one connection: sends messages, hands their answers to calls
calls     what is under way on a link: questions, prefetches, reads, stores, commits, layouts
claims    who waits for results: each is handed out once
layouts   the indices by which prompts name their layouts
reading   reads of what was loaded, or is loading
writing   writers of chunks, into the client's segment
memory    a segment to write into, its blocks
thread    a client in a thread and loop of its own, and the ways into them
prefetches  prefetches of a blocking client: futures for any thread
handles   what else it gives out: writers, streams, events
blocking  `BlockingClient`: a client for engines that are not asynchronous
"""

from async_cache.client.blocking import BlockingClient
from async_cache.client.client import CacheClient
from async_cache.client.connecting import connect

__all__ = ["BlockingClient", "CacheClient", "connect"]
