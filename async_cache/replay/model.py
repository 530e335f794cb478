"""What a token's keys and values take, by the `config.json` of a model as Hugging Face has it.

Each layer keeps a key and a value for each KV head (grouped-query attention, arXiv:2305.13245), or, with latent
attention, one vector for all heads and its rotary part (DeepSeek-V2, arXiv:2405.04434, section 2.1.2). Layers whose
window slides need it for the last tokens only. Layers without attention (Mamba, linear attention) keep a state that
does not grow with the prompt, and layers that share the KV of others keep none.
"""

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from async_cache.errors import ConfigError
from async_cache.prompt.objects import DTYPE_BYTES

_FULL, _SLIDING, _NONE = "full", "sliding", "none"
_KINDS = {
    "full_attention": _FULL,
    "attention": _FULL,
    "sliding_attention": _SLIDING,
    "chunked_attention": _SLIDING,
    "linear_attention": _NONE,
    "mamba": _NONE,
    "recurrent": _NONE,
    "conv": _NONE,
}
_ALTERNATING = {"gemma2": 2}  # models whose config says that a window slides, and not in which layers
_NAMES = {
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
    "hidden_size": ("n_embd", "d_model"),
    "sliding_window": ("attention_chunk_size",),
}
_MOST = 2**20


class KVModel(Struct, frozen=True):
    """What a model keeps of each token, over all ranks.

    `layers` keep `numbers` values of `dtype` each; so many `window_layers` of them need only the last `window_tokens`.
    `latent`: they keep latent vectors, and no heads.
    """

    name: str
    layers: int
    numbers: int
    dtype: str
    latent: bool = False
    window_layers: int = 0
    window_tokens: int = 0

    @property
    def bytes_per_token(self) -> int:
        """All layers together: that is what is stored of each token, since any prefix may be the one that is asked."""
        return self.layers * self.numbers * DTYPE_BYTES[self.dtype]

    def loaded_bytes(self, tokens: int) -> int:
        """What must be loaded of a prefix: layers whose window slides need its end only."""
        each = self.numbers * DTYPE_BYTES[self.dtype]
        windowed = min(tokens, self.window_tokens)
        return each * ((self.layers - self.window_layers) * tokens + self.window_layers * windowed)


def read_model(path: Path, dtype: str | None = None) -> KVModel:
    """Read a `config.json`, or that of a directory. `dtype`: of the KV, where it is not the model's.

    Raises ConfigError where the file cannot be read, or does not say what is needed.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} is no config of a model: it has no fields")
    try:
        return _model(fields, dtype)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _model(fields: dict[str, Any], dtype: str | None) -> KVModel:
    text = next((fields[name] for name in ("text_config", "llm_config") if isinstance(fields.get(name), dict)), fields)
    if fields.get("is_encoder_decoder") is True:
        raise ValueError("a model with an encoder has no KV that a prefix determines")
    layers = _number(text, "num_hidden_layers")
    kinds = _kinds(text, layers)
    sliding, full = kinds.count(_SLIDING), kinds.count(_FULL)
    if not sliding + full:
        raise ValueError("no layer has attention: there is no KV")
    names = fields.get("architectures")
    latent, numbers = _numbers(text)
    return KVModel(
        name=names[0] if isinstance(names, list) and names and isinstance(names[0], str) else "the model",
        layers=sliding + full,
        numbers=numbers,
        dtype=_dtype(dtype, text, fields),
        latent=latent,
        window_layers=sliding,
        window_tokens=_number(text, "sliding_window") if sliding else 0,
    )


def _numbers(text: dict[str, Any]) -> tuple[bool, int]:
    """Whether a layer keeps a latent vector, and how many numbers it keeps of a token."""
    if text.get("kv_lora_rank") is not None:
        return True, _number(text, "kv_lora_rank") + _number(text, "qk_rope_head_dim")
    heads = _number(text, "num_attention_heads")
    head_size = _number(text, "head_dim") if text.get("head_dim") is not None else None
    if head_size is None:
        hidden = _number(text, "hidden_size")
        if hidden % heads:
            raise ValueError(f"hidden_size {hidden} is no multiple of {heads} heads, and head_dim is missing")
        head_size = hidden // heads
    if text.get("multi_query") is True and text.get("new_decoder_architecture") is not True:
        return False, 2 * head_size
    kv_heads = _number(text, "num_key_value_heads") if _given(text, "num_key_value_heads") is not None else heads
    return False, 2 * kv_heads * head_size


def _kinds(text: dict[str, Any], layers: int) -> list[str]:
    """What each layer that has KV of its own is: full, sliding, or none."""
    own = layers - (_number(text, "num_kv_shared_layers", 0) if text.get("num_kv_shared_layers") is not None else 0)
    types = text.get("layer_types") or text.get("layers_block_type")
    has_window = _given(text, "sliding_window") is not None and text.get("use_sliding_window") is not False
    if isinstance(types, list):
        if len(types) != layers:
            raise ValueError(f"layer_types has {len(types)} layers, and not {layers}")
        if unknown := [kind for kind in types if not isinstance(kind, str) or kind not in _KINDS]:
            raise ValueError(f"there is no layer_types of {unknown[0]!r}: known are {', '.join(_KINDS)}")
        kinds = [_KINDS[kind] for kind in types]
    elif not has_window:
        kinds = [_FULL] * layers
    elif pattern := text.get("sliding_window_pattern") or _ALTERNATING.get(str(text.get("model_type"))):
        every = _checked("sliding_window_pattern", pattern, 1)
        kinds = [_FULL if (layer + 1) % every == 0 else _SLIDING for layer in range(layers)]
    elif text.get("use_sliding_window") is True and text.get("max_window_layers") is not None:
        full = min(_number(text, "max_window_layers", 0), layers)
        kinds = [_FULL] * full + [_SLIDING] * (layers - full)
    else:
        kinds = [_SLIDING] * layers
    if not has_window:
        kinds = [_FULL if kind == _SLIDING else kind for kind in kinds]
    return kinds[: max(own, 0)]


def _dtype(dtype: str | None, *tables: dict[str, Any]) -> str:
    given = dtype or next((t[name] for t in tables for name in ("dtype", "torch_dtype") if t.get(name)), None)
    if given is None:
        raise ValueError("torch_dtype is missing: say --kv-dtype")
    known = str(given).removeprefix("torch.")
    known = {"fp8": "float8_e4m3fn", "bf16": "bfloat16", "fp16": "float16"}.get(known, known)
    if known not in DTYPE_BYTES:
        raise ValueError(f"there is no dtype {given!r}: known are fp8, {', '.join(DTYPE_BYTES)}")
    return known


def _given(text: dict[str, Any], name: str) -> Any:
    return next((text[known] for known in (name, *_NAMES.get(name, ())) if text.get(known) is not None), None)


def _number(text: dict[str, Any], name: str, least: int = 1) -> int:
    value = _given(text, name)
    if value is None:
        raise ValueError(f"{name} is missing")
    return _checked(name, value, least)


def _checked(name: str, value: Any, least: int) -> int:
    if type(value) is not int or not least <= value <= _MOST:
        raise ValueError(f"{name} must be a whole number from {least} to {_MOST}, not {value!r}")
    return value
