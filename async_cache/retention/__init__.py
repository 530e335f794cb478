"""What is kept, and what leaves first.

policy    what a policy is told, and what it is asked
policies  those that there are, by name
lru       the default: least recently used first
prefix    what is least worth its memory, by what was learned from the paths of requests
branches  what is left of these paths
ages      the branches in order, and by how long ago they were used
worths    the leaves among them, the least worth first
recall    what it has learned, over a restart, and branches in little memory
duel      whether `lru` would have found more
reuse     how soon will a chunk be asked for again?
fifo, s3fifo, arc, tinylfu  of the literature
leaves    what the last three need so that no chunk leaves before those that build on it
ghosts    what has left, for a while
allowance how much of a tier may be kept on demand, and by whom
quotas    how much of a tier an owner may have
bound     what one of them bounds
lending   who gives way where they allow more than there is
ring      an order of use, as links through the things themselves
sketch    how often digests were seen of late, in little memory
"""
