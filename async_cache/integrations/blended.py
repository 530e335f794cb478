"""KV that was not computed in one go: parts of it were, each somewhere else, and stand beside what is computed here."""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class BlendedCache(DynamicCache):  # type: ignore[misc]  # transformers is not typed
    """A model's KV, made from parts. It goes on as any other, and is never stored: it is exact for no prompt."""

    def __init__(self, config: PreTrainedConfig, keys: torch.Tensor, values: torch.Tensor):
        """`keys` and `values` of all tokens, of shape (layers, heads, tokens, width), which it takes over."""
        super().__init__(config=config)
        self.layers = [_Layer(*parts) for parts in zip(keys[:, None], values[:, None], strict=True)]

    def fill(self, places: torch.Tensor | None) -> None:
        """Let what the model computes next be that of tokens at these places, and None: of those behind all others."""
        for layer in self.layers:
            layer.places = places


class _Layer(DynamicLayer):  # type: ignore[misc]
    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.places: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put what was computed where it belongs; returns all that there is."""
        if self.places is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        self.keys[:, :, self.places] = key_states
        self.values[:, :, self.places] = value_states
        return self.keys, self.values
