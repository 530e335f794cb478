"""Mooncake Store: the backend against a real master and a process that gives memory to its pool."""
