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
_CLUSTER = "valkey+cluster://host:6379,host:6379"
_OF_VALKEY = {
    "": "valkey://host:6379/0?namespace=akv&ttl=60&connections=2&connect_timeout=1&usage_every=600&password_file=/path",
    "s": "valkeys://host:6379/0?ca=/path&cert=/path&key=/path&verify=full|ca|none",
    "+unix": "valkey+unix:///path?db=0",
    "+cluster": _CLUSTER,
    "s+cluster": _CLUSTER,
}

OWN = {
    "memory": Scheme("memory://[name]?capacity=1GiB&policy=lru", "async_cache.l2.memory:MemoryBackend.from_url"),
    "fs": Scheme(
        "fs:///path?capacity=10GiB&durability=none|fsync&direct=true|false&threads=4&segment_bytes=128MiB&policy=lru",
        "async_cache.l2.filesystem.backend:FileSystemBackend.from_url",
    ),
    **{
        name + variant: Scheme(form, "async_cache.l2.valkey.backend:ValkeyBackend.from_url")
        for name in ("valkey", "redis")
        for variant, form in _OF_VALKEY.items()
    },
    "mooncake": Scheme(
        "mooncake://host:50051?namespace=akv&segment=0&protocol=tcp|rdma",
        "async_cache.l2.mooncake.backend:MooncakeBackend.from_url",
        "mooncake",
    ),
    "s3": Scheme(
        f"s3://bucket[/prefix]?region=us-east-1&addressing=path|virtual&bulk_delete=true|false&{_OF_BUCKETS}",
        _BUCKET,
        "objects",
    ),
    "gs": Scheme(f"gs://bucket[/prefix]?{_OF_BUCKETS}", _BUCKET, "objects"),
    "az": Scheme(f"az://container[/prefix]?account=name&{_OF_BUCKETS}", _BUCKET, "objects"),
}
