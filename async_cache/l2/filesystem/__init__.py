"""Objects as files of a local directory: the default backend.

backend    `FileSystemBackend`: decides in an index, and lets threads do what blocks
directory  records in a directory: read, write, list, remove
faults     which objects could not be read
"""

from async_cache.l2.filesystem.backend import FileSystemBackend

__all__ = ["FileSystemBackend"]
