"""The service: one cache for all the processes of a machine.

access    who may connect, and which salts it may use
listener  sockets to listen at: Unix and TCP
registry  what the connections share: which of them hold a request, equal layouts
session   one connection: what it asks for, what it holds, and what is given back when it ends
server    accepts connections, and ends them
process   runs a server until a signal
"""

from async_cache.server.server import Server

__all__ = ["Server"]
