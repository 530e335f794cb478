"""What is counted beside the cache, for those who operate it. The cache itself knows nothing of it.

histogram   how often a value was at most so large
names       which tenants and models are shown by their names, and which are "other"
traffic     what was asked for, found, promised and loaded
residence   how long chunks stay in memory, and are not used there, from a sample
watch       all of it for one cache, and how far the event loop lags
families    the same as Prometheus reads it
"""

from async_cache.metrics.families import exposition
from async_cache.metrics.watch import Watch

__all__ = ["Watch", "exposition"]
