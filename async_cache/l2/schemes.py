"""The schemes of our own backends: what a URL may say, what makes the backend, and the extra that this needs."""

from typing import NamedTuple


class Scheme(NamedTuple):
    """A scheme. What makes its backend is imported when it is first asked for: it may need what not everybody has."""

    form: str  # shown to whoever wrote a URL that does not fit
    make: str  # of a `BackendURL`, as `module:attribute`
    extra: str = ""


_BUCKET = "async_cache.l2.object_store.backend:ObjectStoreBackend.from_url"
_OF_BUCKETS = (
    "endpoint=https://host:9000&allow_http=true|false&ca=/file.pem&anonymous=true|false&concurrency=32&part=8MiB"
)
_VALKEY = Scheme(
    "valkey://host:6379/0?namespace=akv&ttl=3600&connections=2, valkeys://... (TLS), valkey+unix:///path?..., "
    "valkey+cluster://host:port,host:port?..., valkeys+cluster://... (redis and rediss mean the same)",
    "async_cache.l2.valkey.backend:ValkeyBackend.from_url",
)
_VARIANTS = ("", "s", "+unix", "+cluster", "s+cluster")

OWN = {
    "memory": Scheme("memory://[name]?capacity=1GiB", "async_cache.l2.memory:MemoryBackend.from_url"),
    "fs": Scheme(
        "fs:///path?capacity=10GiB&durability=none|fsync&direct=true|false&threads=4",
        "async_cache.l2.filesystem.backend:FileSystemBackend.from_url",
    ),
    **{name + variant: _VALKEY for name in ("valkey", "redis") for variant in _VARIANTS},
    "s3": Scheme(
        f"s3://bucket[/prefix]?region=us-east-1&addressing=path|virtual&bulk_delete=true|false&{_OF_BUCKETS}",
        _BUCKET,
        "objects",
    ),
    "gs": Scheme(f"gs://bucket[/prefix]?{_OF_BUCKETS}", _BUCKET, "objects"),
    "az": Scheme(f"az://container[/prefix]?account=name&{_OF_BUCKETS}", _BUCKET, "objects"),
}
