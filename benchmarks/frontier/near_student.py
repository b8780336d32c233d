"""Students that start from their teacher's weights: layers cut out, weights rounded, adapters beside frozen weights."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any

import torch
from distances import Distance
from torch import Tensor, nn

from kdfast import Head
from kdfast.recipes import add_lora

__all__ = ["NearStudent", "rounded"]

GROUP = 32  # weights that share a scale


class NearStudent:
    """A language model in part frozen: its embeddings and output layer are, and the layers below the first cut.

    Attributes:
        trained: what the optimizer steps.
    """

    def __init__(self, model: Any, distance: Distance) -> None:
        self.weight, self.bits = model.lm_head.weight.detach(), distance.bits
        model.requires_grad_(False)
        below = min(distance.cut, default=0)
        kept = [i for i in range(below, len(model.model.layers)) if i not in distance.cut]
        self.lower, self.upper = _part(model.model, list(range(below))), _part(model.model, kept)
        self.lower.norm = nn.Identity()
        linear = [m for m in self.upper.layers.modules() if isinstance(m, nn.Linear)]
        self.rounded = [m.weight for m in linear] if self.bits else []
        self.exact = [weight.clone() for weight in self.rounded] if not distance.rank else []
        for weight in self.rounded:
            weight.copy_(rounded(weight, self.bits))
        if distance.rank:
            add_lora(self.upper.layers, rank=distance.rank, alpha=distance.rank)
            self.trained = [p for p in self.upper.layers.parameters() if p.requires_grad]
            return
        free = [*self.upper.layers.parameters(), *self.upper.norm.parameters()]
        exact = {id(weight): own for weight, own in zip(self.rounded, self.exact, strict=True)}
        self.trained = [exact.get(id(parameter), parameter) for parameter in free]
        for parameter in free:
            parameter.requires_grad_(True)

    @torch.no_grad()
    def inputs(self, ids: Tensor) -> Tensor:
        """(windows, length, width) float32: what the trained layers see, and no step changes."""
        if not len(self.lower.layers):
            return self.lower.embed_tokens(ids)
        return torch.cat([self.lower(part, use_cache=False).last_hidden_state for part in ids.split(4)])

    def head(self, inputs: Tensor) -> Head:
        """The rows over these inputs. Products are in bfloat16, but for logits and for measuring rounded weights."""
        with torch.autocast("cpu", torch.bfloat16, enabled=not self.bits or torch.is_grad_enabled()):
            hidden = self.upper(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return Head(hidden.reshape(-1, hidden.shape[-1]).float(), self.weight)

    def before_step(self) -> None:
        """Hand the rounded weights' gradients to the exact ones: straight through."""
        for exact, weight in zip(self.exact, self.rounded if self.exact else (), strict=True):
            exact.grad, weight.grad = weight.grad, None

    @torch.no_grad()
    def after_step(self) -> None:
        """Round the weights anew."""
        for exact, weight in zip(self.exact, self.rounded if self.exact else (), strict=True):
            weight.copy_(rounded(exact, self.bits))


def rounded(weight: Tensor, bits: int) -> Tensor:
    """The weights, each the nearest of ``2 ** bits - 1`` multiples of a scale that each group of 32 in a row shares."""
    groups, top = weight.reshape(-1, GROUP), 2 ** (bits - 1) - 1
    scale = (groups.abs().amax(1, keepdim=True) / top).clamp_min_(torch.finfo(weight.dtype).tiny)
    return (groups / scale).round_().mul_(scale).view_as(weight)


def _part(decoder: Any, indices: list[int]) -> Any:
    """A decoder of these layers alone, which shares their weights."""
    part = copy(decoder)
    part._modules, part.config = dict(decoder._modules), deepcopy(decoder.config)
    part.layers = nn.ModuleList([decoder.layers[i] for i in indices])
    part.config.num_hidden_layers = len(indices)
    if getattr(part.config, "layer_types", None):
        part.config.layer_types = [part.config.layer_types[i] for i in indices]
    return part
