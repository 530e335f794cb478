"""The way of a store, and of a deletion.

writing    opens writers: reserve room, publish what is committed, give back the rest
writeback  L1 -> L2, behind the requests: what waits, and who waits for it
queue      the chunks that wait for one backend: batches, calls, attempts
removal    delete and clear
"""
