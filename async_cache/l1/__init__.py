"""L1, the chunks in host memory, in the order the data flows.

- `arena`: the shared memory, and which parts of it are free
- `entry`: the records: what is resident, what is reserved
- `eviction`: which chunk leaves first
- `store`: find and lease, reserve and commit, evict and remove
"""
