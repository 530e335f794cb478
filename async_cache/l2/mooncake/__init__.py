"""Objects in Mooncake Store, the pool of memory that hosts share over RDMA or TCP.

    backend  `MooncakeBackend`: a helper does what the library blocks for
    process  the helper as this process sees it: calls, answers, and its end
    calls    what the two tell each other
    helper   the process that has Mooncake's client, and maps L1
    views    where the bytes of a view lie in memory
    pool     records in the pool: read, write, find, remove

The library is in a process of its own because its `setup` and `close` hold the interpreter's lock for seconds, where
the master is dead for half a minute, and because nothing that it does can be cancelled but by ending the process.
"""
