"""Students that grow while they learn, and lose nothing by it: Net2Net."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["deepen", "widen"]

# What acts on each unit alone, whatever its place.
_FUNCTIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.Identity)
_POOLING = (nn.Flatten, nn.Dropout, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
UNITWISE = (*_FUNCTIONS, *_POOLING)


def widen(model: nn.Sequential, layer: int, width: int, *, generator: torch.Generator | None = None) -> nn.Sequential:
    """A copy of ``model`` whose weight layer ``layer`` has ``width`` outputs, and which computes the same function.

    Net2WiderNet (Chen et al. 2016): unit j >= n repeats a random unit g(j) < n, and the next layer shares g(j)'s
    outgoing weight out among its copies: v'_j = s_j v_g(j), where the s_j of one unit sum to 1. Net2Net divides evenly,
    which leaves copies alike for ever: they have one gradient. Here the shares are drawn, so they part at the first
    step, and no noise need be added, which would change the function.

    Args:
        model: ``Linear`` and ``Conv2d`` layers, with batch norm, pooling and functions of single units between them.
        layer: the layer's position in ``model``, not its last.
        width: its outputs afterwards, at least as many as now.
        generator: of g and s.

    Raises:
        ValueError: no such layer, less outputs than it has, grouped convolutions, or a module in between that mixes
            units.
    """
    old, following = _weighted(model, layer), _next(model, layer)
    units = old.weight.shape[0]
    if width < units:
        raise ValueError(f"layer {layer} has {units} outputs: widening to {width} would lose some")
    copied = torch.cat([torch.arange(units), torch.randint(units, (width - units,), generator=generator)])
    raw = torch.rand(width, generator=generator, dtype=torch.float64) + 0.5
    share = raw / torch.zeros(units, dtype=torch.float64).index_add(0, copied, raw)[copied]

    grown = copy.deepcopy(model)
    _set_units(grown[layer], copied)
    for between in range(layer + 1, following):
        if _is_norm(grown[between]):
            _set_units(grown[between], copied)
    _set_inputs(grown[following], units, copied, share)
    return grown


def deepen(model: nn.Sequential, layer: int) -> nn.Sequential:
    """A copy of ``model`` with one more layer and ReLU after ``layer``'s ReLU, which computes the same function.

    Net2DeeperNet (Chen et al. 2016): the new layer is the identity, and ReLU of what is not negative is the same again.
    That holds of no other common function, so others are refused.

    Raises:
        ValueError: no such layer, or one without a ReLU after it and its batch norm.
    """
    old = _weighted(model, layer)
    place = layer + 1
    while place < len(model) and _is_norm(model[place]):
        place += 1
    if place == len(model) or not isinstance(model[place], nn.ReLU):
        raise ValueError(f"layer {layer} has no ReLU right after it, which alone is the same when it is applied again")
    new = _identity(old)
    modules = [copy.deepcopy(module) for module in model]
    return nn.Sequential(*modules[: place + 1], new, nn.ReLU(), *modules[place + 1 :]).train(model.training)


def _identity(like: Any) -> nn.Module:
    units, options = like.weight.shape[0], {"dtype": like.weight.dtype, "device": like.weight.device}
    if isinstance(like, nn.Linear):
        new: Any = nn.Linear(units, units, **options)
        nn.init.eye_(new.weight)
    else:
        new = nn.Conv2d(units, units, 3, padding=1, **options)
        nn.init.dirac_(new.weight)
    nn.init.zeros_(new.bias)
    return new  # type: ignore[no-any-return]


def _weighted(model: nn.Sequential, layer: int) -> Any:
    if not isinstance(model, nn.Sequential):
        raise ValueError(f"growth needs an nn.Sequential, got {type(model).__name__}")
    if not 0 <= layer < len(model) or not isinstance(model[layer], nn.Linear | nn.Conv2d):
        found = [i for i, x in enumerate(model) if isinstance(x, nn.Linear | nn.Conv2d)]
        raise ValueError(f"layer must be one of the weight layers {found}, got {layer}")
    if getattr(model[layer], "groups", 1) != 1:
        raise ValueError(f"layer {layer} is a grouped convolution, whose units belong to their groups")
    return model[layer]


def _next(model: nn.Sequential, layer: int) -> int:
    for i in range(layer + 1, len(model)):
        if isinstance(model[i], nn.Linear | nn.Conv2d):
            _weighted(model, i)
            return i
        if not (isinstance(model[i], UNITWISE) or _is_norm(model[i])):
            raise ValueError(
                f"module {i}, a {type(model[i]).__name__}, may mix units: widening would change the function"
            )
    raise ValueError(f"layer {layer} is the last: its outputs are the classes")


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm)


@torch.no_grad()
def _set_units(module: Any, copied: Tensor) -> None:
    """Make unit j what unit ``copied[j]`` was, in parameters and statistics alike."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.dim():
            new = tensor[copied.to(tensor.device)].clone()
            setattr(module, name, nn.Parameter(new, tensor.requires_grad) if name in module._parameters else new)
    for name in ("out_features", "out_channels", "num_features"):
        if hasattr(module, name):
            setattr(module, name, len(copied))


@torch.no_grad()
def _set_inputs(module: Any, units: int, copied: Tensor, share: Tensor) -> None:
    """Take the copies' outputs. A unit may be several inputs, which a Flatten has put side by side."""
    weight = module.weight
    apart = weight.unflatten(1, (units, -1)) if isinstance(module, nn.Linear) else weight
    copied, share = copied.to(weight.device), share.to(weight)
    wide = apart[:, copied] * share.view(1, -1, *[1] * (apart.dim() - 2))
    module.weight = nn.Parameter(wide.flatten(1) if isinstance(module, nn.Linear) else wide, weight.requires_grad)
    name = "in_features" if isinstance(module, nn.Linear) else "in_channels"
    setattr(module, name, module.weight.shape[1])
