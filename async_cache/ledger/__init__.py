"""What is remembered of chunks that have left, and of what is there only to explain a miss. No token is kept.

table     records of 40 bytes, found by a digest; the oldest are overwritten
ledger    which chunk left which tier, when, why, and what built on it
expiries  when what is stored expires where nobody tells of it
roots     under which roots there are chunks
"""
