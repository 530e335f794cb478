"""The way of a store, and of a deletion; and backends that come and go.

writing    opens writers: reserve room, publish what is committed, give back the rest
writeback  L1 -> L2, behind the requests: what waits, and who waits for it
queue      the chunks that wait for one backend: batches, calls, attempts
admission  what was asked for often enough to be written to a slow backend
carrier    carries out what nobody's cancelling may stop in the middle
removal    delete and clear
backends   add, drain and remove a backend
"""
