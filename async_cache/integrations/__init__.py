"""Serving engines that use the cache; each module imports its engine, and is imported by it only."""
