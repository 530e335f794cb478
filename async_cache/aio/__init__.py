"""The small asynchronous tools.

backlog  work on very many items, so much of it in each turn of the loop
clock    the loop's clock, to the microsecond
home     the event loop that something was opened in
ending   waiting for what must not be left behind, however often whoever waits is cancelled
promise  a value that comes once, and the futures of those who wait for it
sweeper  time to live: what nobody comes back for expires, by one task that sleeps until the next deadline
worker   a thread of one's own
"""
