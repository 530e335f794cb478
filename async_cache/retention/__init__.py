"""What is kept, and what leaves first.

policy    what a policy is told, and what it is asked
policies  those that there are, by name
lru       the default: least recently used first
prefix    what is least worth its memory, by what was learned from the paths of requests
branches  what is left of these paths
reuse     how soon will a chunk be asked for again?
fifo, s3fifo, arc, tinylfu  of the literature
leaves    what the last three need so that no chunk leaves before those that build on it
ghosts    what has left, for a while
ring      an order of use, as links through the things themselves
sketch    how often digests were seen of late, in little memory
"""
