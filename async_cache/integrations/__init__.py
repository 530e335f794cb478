"""Serving engines that use the cache; each module imports its engine, and is imported when it is used."""
