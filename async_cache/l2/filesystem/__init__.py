"""Objects in segments of a local directory: the default backend. The modules, in the order of the way of the data:

backend    `FileSystemBackend`: the verbs, in the directory that has the path
log        one open directory, and the parts that work on it
ahead      what was found is announced to the kernel
loading    from keys to bytes in buffers: who reads what, and what is told of it
storing    from buffers to places, bodies and records
room       the bound: what is evicted or given up, and when its bytes are gone
following  what others record, the living and the dead
recovery   what is there at the start
sweep      what dead writers left beside what they recorded
rewriting  our index files, written anew
catalog    what is known to be stored, and where
segments   what is known of the files that bodies lie in
work       threads, and tasks of the loop

What blocks, in threads:

directory  what it is, and what is recorded in it
writers    whose index files are in it
journal    an index file: our own, which grows, or that of others, which is followed
bodies     written and cleared
runs       read and verified
transfers  bytes between memory and files
files      open files, holes and locks
clearing   what was given up: holes, and segments that are removed
origins    what chunks are of: small files, too
notes      small files beside the objects: what is retained
marker     whether a directory is a store
format     names and records, without I/O
"""

from async_cache.l2.filesystem.backend import FileSystemBackend

__all__ = ["FileSystemBackend"]
