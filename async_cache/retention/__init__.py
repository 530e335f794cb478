"""What is kept, and what leaves first.

policy  what a policy is told, and what it is asked
lru     the default: least recently used first
ring    an order of use, as links through the things themselves
sketch  how often digests were seen of late, in little memory
"""
