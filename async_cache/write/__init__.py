"""The way of a store, and of a deletion.

writing    opens writers: reserve, and publish what is committed
writeback  L1 -> L2, behind the requests
removal    delete and clear
"""
