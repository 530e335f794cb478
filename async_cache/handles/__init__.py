"""What a caller holds, of an embedded cache and of a server's alike.

prefetch  `Prefetch`: a lookup and a load, each with its future
lease     `ReadLease`: chunks to read, until their release
stream    `ReadStream`: the same while they arrive
writer    `Writer`: chunks to fill and to commit
events    `EventStream`: what was stored and removed, to iterate over
scoped    how leases and writers are entered and left
"""
