"""Tests of `async_cache.l2.guard`."""
