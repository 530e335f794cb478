"""L1, the chunks in host memory.

entry  the records: what is resident, what is reserved
store  find and lease, reserve and commit, evict and remove
"""
