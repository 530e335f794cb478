"""The way of a store, and of a deletion; and backends that come and go.

writing    opens writers: reserve room, publish what is committed, give back the rest
writeback  L1 -> L2, behind the requests: what waits, and who waits for it
flushes    who waits until what was committed before is stored
pending    a chunk that waits for a backend, and a batch that is being stored
queue      the chunks that wait for one backend: batches, calls, attempts
tally      what is counted of the write-back of one owner
wear       what is left of what may be written to a backend in a day, over restarts
admission  what was asked for often enough to be written to a slow backend
carrier    carries out what nobody's cancelling may stop in the middle
removal    delete and clear
deletions  what is deleted from one backend
retained   what is kept until a time that somebody named
retention  one prompt that is, the note of that, and a tier that keeps it
backends   add, drain and remove a backend
moves      what observers are told of chunks that come to a backend or leave with it
"""
