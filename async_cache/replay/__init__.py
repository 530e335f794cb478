"""Recorded requests: through the real index of L1, in virtual time and without bytes, or against a server.

foresight  the policy that knows the future: no other can find more
run        one trace, one policy, one capacity
sweep      many policies and capacities
plot       hits against capacity, and times
timed      one trace, a server that runs, real bytes
model      what a token takes, by the config of a model
sizing     how much memory a trace is worth
"""
