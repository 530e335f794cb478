"""Objects in segments of a local directory: the default backend.

backend    `FileSystemBackend`: decides in a catalog, and lets threads do what blocks
catalog    what is known of the directory: the objects, and the segments that they lie in
directory  the directory: what it is, who writes in it, what is recorded and cleared
journal    index files: our own, and those of others
bodies     the bodies in segments: written, read and verified, cleared
files      open files, holes and locks
format     names and records, without I/O
faults     which objects could not be read
"""

from async_cache.l2.filesystem.backend import FileSystemBackend

__all__ = ["FileSystemBackend"]
