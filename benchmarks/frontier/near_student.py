"""Students that start from their teacher's weights: layers cut out, weights rounded, adapters beside frozen weights."""

from __future__ import annotations

import math
from copy import copy, deepcopy
from typing import Any

import torch
from distances import Distance
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast import Head

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
            self.trained = [p for layer in self.upper.layers for p in _adapt(layer, distance.rank)]
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


class Adapted(nn.Module):
    """A frozen linear layer plus a product of two thin matrices, at first of zeros."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up)


def _adapt(layer: nn.Module, rank: int) -> list[nn.Parameter]:
    """Put adapters beside all linear layers of ``layer``. Returns their parameters."""
    parameters = []
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                adapted = Adapted(child, rank)
                setattr(module, name, adapted)
                parameters += [adapted.down, adapted.up]
    return parameters
