"""The way of a prefetch: find in L1, ask L2, promise (`lookup_done`), load, hand over (`load_done`).

request   the record of a request: what it asks for, what it was promised, what it holds
requests  who knows a request: ids, claims, readers, and how requests end
filling   chunks that writers have announced, and that a lookup may wait for
lookup    ask every backend what it holds, and keep its pins
search    how far a prompt is found, in time that follows what is found
plan      which prefix can be promised, and the room for it
load      the record of a load: all that is on its way for one chunk, a single flight
batches   calls to the backends, by the bytes in flight
progress  what a call has loaded while it goes on
loads     L2 -> L1: each object is loaded once, however many requests want it
misses    why a chunk is missing
answers   what is said of a request
decision  the steps to a promise
prefetch  the whole way of a request
streams   the chunks of a request while they arrive
listing   what is cached: the roots that chunks have, and the chunks of a tier
hits      how much is cached, for those who only want to know
explain   where each chunk of a prompt is, or why it is not there
"""
