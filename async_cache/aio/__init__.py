"""The small asynchronous tools.

promise  a value that comes once, and the futures of those who wait for it
sweeper  what nobody comes back for: time-to-live queues, and the one task that sleeps until the next deadline
"""
