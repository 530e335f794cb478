"""Recorded requests through the real index of L1, in virtual time and without bytes: what would be found.

trace      the requests of a recording, as they are in a file
foresight  the policy that knows the future: no other can find more
run        one trace, one policy, one capacity
report     many of them, as a table and a plot
"""
