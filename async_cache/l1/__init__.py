"""L1, the chunks in host memory.

entry    the records: what is resident, what is reserved
store    find and lease, reserve and commit, evict and remove
shares   whose chunks leave for whom: what one does not use of its share is lent
victims  which entries leave for a block
"""
