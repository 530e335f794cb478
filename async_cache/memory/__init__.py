"""Memory that processes share.

mapping  memory files: sealing them, and mapping them read-only
arena    L1's memory
room     how much memory there is for it
filled   an arena whose memory is all there
extents  which parts of a memory are free
tensors  tensors over memory, without a copy
"""
