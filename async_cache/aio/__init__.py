"""The small asynchronous tools.

backlog    work on very many items, so much of it in each turn of the loop
clock      the loop's clock, to the microsecond
countdown  time that counts only while a loop runs
forks      whether a process was forked since something was made
home       the event loop that something was opened in
life       what is opened once and closed once, to its end
ending     waiting for what must not be left behind, however often whoever waits is cancelled
promise    a value that comes once, and the futures of those who wait for it
slices     very many items in slices, between which the loop has its turn
sweeper    time to live: what nobody comes back for expires, by one task that sleeps until the next deadline
worker     a thread of one's own
"""
