"""Serving engines that use the cache; each module imports its engine, and is imported when it is used.

`fp8` is for any of them that has torch: KV in eight bits, which is a layout of its own.
"""
