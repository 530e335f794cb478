"""Objects in a Valkey or Redis server, or in a cluster of them, which other hosts share.

backend    `ValkeyBackend`: what is asked, and what the answers mean
settings   what its URL says
names      the key of an object, and its slot
items      one object of a call, and what became of it
router     which server has an object; in a cluster, wherever it moves
node       one server: its connections, and that it is left alone where there is none
values     GET into a buffer, SET out of one, verified as the bytes pass
listing    all objects of a server
usage      what the namespace holds, known without asking
wire       one connection
replies    the protocol
"""

from async_cache.l2.valkey.backend import ValkeyBackend

__all__ = ["ValkeyBackend"]
