"""The service: one cache for all the processes of a machine.

process     the server as a process, which runs until a signal
garbage     what the collector of garbage looks at
logs        the log, written by a thread
server      accepts connections, and ends them
reload      settings that are read anew while the server runs
listener    sockets to listen at: Unix and TCP
door        before a token is known: how many may knock, and what is told of a flood
access      who may connect, which salts it may use, and which request ids are its own
accounts    what each tenant holds, against its limits
costs       what a message costs
roles       which messages each role may send
apart       what a cache tells apart by tenants
partials    frames of one tenant that have begun, bounded
probe       how long the event loop is held, and by what
turns       whose messages are carried out next
session     one connection: who answers its messages, and the table of what it holds
shared      what all of them have in common
requests    what it asks of requests: begun, claimed, renewed, ended
queries     what it asks of prompts and models beside: what is cached, to keep it, to remove it
making      the prompts and layouts of messages, made in their turn
held        what is in that table: the common part, and messages that wait for their answer
layouts     layouts that clients register, and the prompts that name them
prefetches  prefetches that are held: pushes, and which connections hold a request together
reads       reads that are held: leases, and their bytes in frames
writers     writers that are held: bytes from a segment or from frames, until they are committed
deletions   deletes whole models, for each tenant one at a time
events      events that are pushed, as fast as their client takes them
administration  what operators ask over a connection: backends, settings, what is held of whom
stats       the statistics of a cache, for whom they are
segment     memory that a client writes to, and the server only reads
http        what is wrong, what is counted, and a page to look at
"""

from async_cache.server.server import Server

__all__ = ["Server"]
