"""The service: one cache for all the processes of a machine.

process     the server as a process, which runs until a signal
logs        the log, written by a thread
server      accepts connections, and ends them
reload      settings that are read anew while the server runs
listener    sockets to listen at: Unix and TCP
access      who may connect, which salts it may use, and which request ids are its own
session     one connection: what it asks for, and the table of what it holds
held        what is in that table: the common part, and messages that wait for their answer
layouts     layouts that clients register, and the prompts that name them
prefetches  prefetches that are held: pushes, and which connections hold a request together
reads       reads that are held: leases, and their bytes in frames
writers     writers that are held: bytes from a segment or from frames, until they are committed
events      events that are pushed, as fast as their client takes them
segment     memory that a client writes to, and the server only reads
http        what is wrong, what is counted, and a page to look at
"""

from async_cache.server.server import Server

__all__ = ["Server"]
