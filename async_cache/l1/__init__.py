"""L1, the chunks in host memory.

entry    the records: what is resident, what is reserved
store    find and commit, evict and remove
uses     what keeps entries in memory: leases, pins, retention
rooms    their memory: reserved, within quotas, by eviction
shares   whose chunks leave for whom: what one does not use of its share is lent
victims  which entries leave for a block
"""
