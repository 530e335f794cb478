"""What a local store must stand, asked through its contract alone: whatever its files look like.

tracing    a program under a tracer, which stops it at each system call that changes a directory
disk       what a disk may have of such calls after a power failure
story      a store's life in steps, and what must be true whichever of them was the last
"""
