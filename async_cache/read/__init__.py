"""The way of a prefetch: find in L1, ask L2, promise (`lookup_done`), load, hand over (`load_done`).

request   the record of a request: what it asks for, what it was promised, what it holds
requests  who knows a request: ids, claims, readers, and how requests end
lookup    ask every backend what it holds, and keep its pins
search    how far a prompt is found, in time that follows what is found
plan      which prefix can be promised, and the room for it
load      the record of a load: all that is on its way for one chunk, a single flight
batches   calls to the backends, by the bytes in flight
loads     L2 -> L1: each object is loaded once, however many requests want it
misses    why a chunk is missing
decision  the steps to a promise
prefetch  the whole way of a request
hits      how much is cached, for those who only want to know
explain   where each chunk of a prompt is, or why it is not there
"""
