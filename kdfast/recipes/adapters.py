"""Low-rank adapters: a student that shares a large model's weights and trains a few of its own."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from kdfast.labels.output_module import weight_in_use

__all__ = ["LoRALinear", "add_lora", "merge_lora"]


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained update of low rank, ``base(x) + (alpha / rank) * x A^T B^T``.

    Source: LoRA, Hu et al. 2021. B is zero at first, so that the function is that of ``base``.

    Args:
        base: the layer that is adapted, and frozen.
        rank: of B A, where A is (rank, in) and B is (out, rank).
        alpha: the scale of the update is alpha / rank.

    Attributes:
        down, up: A and B.

    Raises:
        ValueError: ``rank`` is less than 1, or exceeds the layer's inputs or outputs.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        _check_rank(base, rank)
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.down, a=5**0.5)  # as nn.Linear begins

    @property
    def weight(self) -> Tensor:
        """The (out, in) weight that the layer multiplies by, update included, for modules that read their layers'."""
        return weight_in_use(self.base) + self.scale * (self.up @ self.down)

    @property
    def bias(self) -> Tensor | None:
        """The bias of ``base``, if it has one."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        low: Tensor = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return self.base(x) + self.scale * low

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer that computes the same function."""
        layer = nn.Linear(self.base.in_features, self.base.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.weight)
        layer.bias = self.base.bias
        return layer


def add_lora(model: nn.Module, patterns: str | Sequence[str] = "*", *, rank: int = 8, alpha: float = 16.0) -> list[str]:
    """Put a ``LoRALinear`` in place of every ``nn.Linear`` whose name matches, and freeze everything else::

        student = copy.deepcopy(model)
        add_lora(student, ["*.q_proj", "*.v_proj"], rank=8)
        Distiller(student, teacher).fit(loader, epochs=3)
        merge_lora(student)

    The model computes the same function until it is trained.

    Args:
        model: is changed in place.
        patterns: one or several globs over the layers' names, as ``fnmatch`` takes them.
        rank, alpha: ``LoRALinear``'s.

    Returns:
        The names of the adapted layers.

    Raises:
        ValueError: a pattern matches no layer, or ``rank`` is out of range. The model is then unchanged.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    # Only the class itself: owners of derived classes read their weights in ways of their own.
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Linear and name}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(f"no nn.Linear within the model fits {pattern!r}; there are {', '.join(layers) or 'none'}")
    chosen = {name: m for name, m in layers.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    for layer in chosen.values():
        _check_rank(layer, rank)
    adapted = {layer: LoRALinear(layer, rank, alpha) for layer in dict.fromkeys(chosen.values())}
    model.requires_grad_(False)
    for name, layer in chosen.items():
        adapter = adapted[layer]  # one for a layer that the model has in several places
        adapter.down.requires_grad_(), adapter.up.requires_grad_()
        model.set_submodule(name, adapter)
    return list(chosen)


def merge_lora(model: nn.Module) -> None:
    """Replace every ``LoRALinear`` by a plain layer of the same function, and unfreeze the whole model.

    A weight that an adapted layer shared with another module is then no longer shared.

    Args:
        model: is changed in place.

    Raises:
        ValueError: the model has no ``LoRALinear``.
    """
    adapters = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, LoRALinear)}
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no LoRALinear: add_lora puts them in")
    merged = {adapter: adapter.merged() for adapter in dict.fromkeys(adapters.values())}
    for name, adapter in adapters.items():
        model.set_submodule(name, merged[adapter])
    model.requires_grad_()


def _check_rank(layer: nn.Linear, rank: int) -> None:
    highest = min(layer.in_features, layer.out_features)
    if not 1 <= rank <= highest:
        raise ValueError(f"rank must lie in 1 ... {highest} for {layer}, got {rank}")
