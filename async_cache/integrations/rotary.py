"""Rotary positions: keys that were computed at one position, as the model would have computed them at another.

A rotary model turns the dimensions of a key in pairs, by angles in proportion to its position. So a key at position p
is one at q, turned by the difference. Both turns are the model's own: its cosines and sines at either end, from which
those of the difference follow, in float32. That is nearer to the model than an angle of its own for the difference, and
carries whatever fixed scaling its frequencies have.

Not every model is like that, and none says so: `Rotary` measures it, and refuses the others.
"""

from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

_TOKENS = 64  # that are computed to measure a model
_OFFSETS = (37, 1024)
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The most that keys or values of a layer may differ by, relative to their size: to be off by one is 0.2 and more."""


class Turn(NamedTuple):
    """By how much to turn each of some keys: cosines and sines, of shape (keys, dimensions that turn)."""

    cos: torch.Tensor
    sin: torch.Tensor

    def of(self, keys: slice) -> "Turn":
        """That of some of the keys."""
        return Turn(self.cos[keys], self.sin[keys])


class Rotary:
    """The rotary positions of a model."""

    def __init__(self, model: PreTrainedModel):
        """The model computes some tokens three times. Raises ValueError where its keys cannot be moved by turning."""
        self._name = model.config.name_or_path or type(model).__name__
        found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
        if not found:
            raise self._refusal("it has no rotary positions")
        self._embedding, self._device = found[0], model.device
        self._check(model)

    def turn(self, start: int, to: int, tokens: int) -> Turn:
        """By how much to turn the keys of consecutive tokens, from `start` on, to be those of tokens from `to` on."""
        (cos_to, sin_to), (cos, sin) = self._at(to, tokens), self._at(start, tokens)
        scale = cos * cos + sin * sin  # 1, unless the model scales them
        return Turn((cos_to * cos + sin_to * sin) / scale, (sin_to * cos - cos_to * sin) / scale)

    @torch.no_grad()
    def _at(self, start: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(start, start + tokens, device=self._device)[None]
        cos, sin = self._embedding(torch.zeros(1, device=self._device), positions)
        return cos[0].float().cpu(), sin[0].float().cpu()

    # Whether it is so.

    def _check(self, model: PreTrainedModel) -> None:
        embeddings = model.get_input_embeddings().num_embeddings
        ids = torch.arange(1, _TOKENS + 1) * 7919 % embeddings
        try:
            stored = _compute(model, ids, 0)
            turns = [self.turn(0, offset, _TOKENS) for offset in _OFFSETS]
        except Exception as error:
            raise self._refusal("its positions are not those of a plain rotary model") from error
        tolerance = _TOLERANCE.get(model.dtype, 1e-3)
        for offset, turn in zip(_OFFSETS, turns, strict=True):
            if turn.cos.shape[-1] > stored.layers[0].keys.shape[-1] or turn.cos.shape[-1] % 2:
                raise self._refusal("its keys do not have the dimensions that turn")
            there = _compute(model, ids, offset)
            for number, (layer, moved) in enumerate(zip(stored.layers, there.layers, strict=True)):
                keys = torch.empty_like(layer.keys, device="cpu")
                turned(layer.keys.cpu(), turn, keys)
                differ = max(_difference(keys, moved.keys.cpu()), _difference(layer.values, moved.values))
                if not differ <= tolerance:
                    raise self._refusal(f"layer {number} at another position is not the same, turned: by {differ:.1%}")

    def _refusal(self, why: str) -> ValueError:
        return ValueError(f"{self._name!r} cannot have its KV moved: {why}")


@torch.no_grad()
def turned(keys: torch.Tensor, turn: Turn, out: torch.Tensor) -> None:
    """Turn keys of shape (..., tokens, width) into `out`, which is other memory, in float32.

    What is beyond the turn's dimensions stays.
    """
    cos, sin = turn
    width, half = cos.shape[-1], cos.shape[-1] // 2
    exact, there = keys[..., :width].float(), out[..., :width]
    moved = there if out.dtype == torch.float32 else torch.empty_like(exact)
    torch.mul(exact, cos, out=moved)  # whole rows at a time, and nothing is made for a part of the sum
    moved[..., :half].addcmul_(exact[..., half:], sin[..., :half], value=-1)
    moved[..., half:].addcmul_(exact[..., :half], sin[..., half:])
    if moved is not there:
        there.copy_(moved)
    if width < keys.shape[-1]:
        out[..., width:] = keys[..., width:]


@torch.no_grad()
def _compute(model: PreTrainedModel, ids: torch.Tensor, offset: int) -> DynamicCache:
    kv = DynamicCache(config=model.config)
    positions = torch.arange(offset, offset + len(ids), device=model.device)[None]
    extra: dict[str, Any] = {"position_ids": positions, "cache": kv, "use_cache": True, "logits_to_keep": 1}
    with torch.autocast(model.device.type, enabled=False):
        model(ids[None].to(model.device), **extra)
    return kv


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """How far apart two tensors are, relative to the size of one."""
    exact = theirs.float()
    return float((ours.float() - exact).norm() / exact.norm())
