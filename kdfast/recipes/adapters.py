"""Low-rank adapters: a student that shares a large model's weights and trains a few of its own."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

__all__ = ["LoRALinear", "add_lora", "merge_lora"]


class LoRALinear(nn.Module):
    """``base(x) + (alpha / rank) * x A^T B^T``, with ``base`` frozen and B zero at first (LoRA, Hu et al. 2021).

    Args:
        base: the layer that is adapted.
        rank: of B A: A is (rank, in), B is (out, rank).
        alpha: its size; the step of training depends on the ratio alone.

    Raises:
        ValueError: a rank that no product of this shape can have.
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
        """(out, in): what the layer multiplies by. Modules that look into their layers find it here."""
        return self.base.weight + self.scale * (self.up @ self.down)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        low: Tensor = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return self.base(x) + self.scale * low

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer of the same function."""
        layer = nn.Linear(self.base.in_features, self.base.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.weight)
        layer.bias = self.base.bias
        return layer


def add_lora(model: nn.Module, patterns: str | Sequence[str] = "*", *, rank: int = 8, alpha: float = 16.0) -> list[str]:
    """Put an adapter on every ``nn.Linear`` whose name fits, and freeze everything else. The function stays the same.

        student = copy.deepcopy(model)
        add_lora(student, ["*.q_proj", "*.v_proj"], rank=8)
        Distiller(student, teacher).fit(loader, epochs=3)
        merge_lora(student)

    Args:
        patterns: of names, as ``fnmatch`` has them.
        rank, alpha: as ``LoRALinear`` takes them.

    Returns:
        The names of the layers that have one.

    Raises:
        ValueError: a pattern that fits no layer, or a rank out of range. The model is then as it was.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    # Only the class itself: those derived from it are looked into by their owners in ways of their own.
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
    """Replace every adapter by a plain layer of the same function, and let everything be trained again.

    A weight that an adapted layer shared with another module is shared no longer.

    Raises:
        ValueError: the model has no adapter.
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
