"""A student that grows during training and keeps the function that it has learned: Net2Net, and a loop around it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdfast._paths import local_folder
from kdfast.distill.distiller import Distiller
from kdfast.distill.fields import split, to_device
from kdfast.models import apply, evaluating, logits_of
from kdfast.recipes._plan import keep_to_plan
from kdfast.recipes.rounds import History, check_options

__all__ = ["Growing", "deepen", "widen"]


class Growing:
    """Distillation in two phases: of a small student, and of the larger one that it grows into::

        growing = Growing(small, teacher, grow=lambda model: deepen(widen(model, 0, 64), 0))
        growing.fit(loader, epochs=20, at=0.5)
        growing.student  # the large one

    The article swaps in a fresh large model at half time, which throws the first half away. Here growth must keep the
    function, as ``widen`` and ``deepen`` do (Net2Net, Chen et al. 2016), and ``fit`` checks that it does.

    Args:
        student: the small model.
        teacher: as ``Distiller`` takes it.
        grow: a function from the trained small model to the larger one.
        folder: where checkpoints are kept: those of the phases in ``small`` and ``large``.
        options: ``Distiller``'s and ``KD``'s, for both phases.

    Attributes:
        student: the small model, and the large one once ``fit`` has grown it.

    Raises:
        TypeError: ``optimizer`` is an optimizer, and not a function that makes one.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        *,
        grow: Callable[[Any], nn.Module],
        folder: str | Path | None = None,
        **options: Any,
    ) -> None:
        check_options(options)
        self.student, self.teacher, self.grow = student, teacher, grow
        self._folder, self._options = local_folder(folder), options

    def fit(self, loader: Iterable[Any], *, epochs: int, at: float = 0.5, **plan: Any) -> tuple[History, History]:
        """Train the small student, let it grow, and train the large one.

        Args:
            loader: as ``Distiller.fit`` takes it.
            epochs: of both phases together.
            at: the share of them before growth, rounded to whole epochs.
            plan: ``Distiller.fit``'s other options, for each phase.

        Returns:
            The histories of the small and the large student.

        Raises:
            ValueError: a phase has no epoch, growth has changed the student's output for a batch, or the folder is of
                other epochs or another growth.
        """
        first = round(epochs * at)
        if not 0 < first < epochs:
            raise ValueError(f"both phases need an epoch, got {first} and {epochs - first} of {epochs} at {at}")
        keep_to_plan(self._folder, plan.get("resume", True), epochs=epochs, at=at, grow=self.grow)
        small = self._distiller(self.student, "small")
        before = small.fit(loader, epochs=first, **plan)
        self.student = self.grow(self.student)
        large = self._distiller(self.student, "large")
        _check_function(small, large, next(iter(loader)))
        return before, large.fit(loader, epochs=epochs - first, **plan)

    def _distiller(self, student: nn.Module, phase: str) -> Distiller:
        folder = None if self._folder is None else self._folder / phase
        return Distiller(student, self.teacher, folder=folder, **self._options)


@torch.no_grad()
def _check_function(small: Distiller, large: Distiller, batch: Any) -> None:
    arguments = small.fields.arguments(split(to_device(batch, small.device))[0])
    with evaluating(small.student), evaluating(large.student):
        # Without the distillers' autocast, whose rounding alone is larger than what is allowed here.
        old, new = (logits_of(apply(x.student, arguments)) for x in (small, large))
    # What remains is rounding: sums of other lengths, in another order.
    if old.shape != new.shape or not bool((old - new).abs().amax() <= 1e-3 * old.abs().amax()):
        raise ValueError("growth changed what the student has learned: grow it by widen and deepen, or alike")


# ---- Net2Net --------------------------------------------------------------------------------------------------------


# Modules that act on each unit alone.
_FUNCTIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.Identity)
_UNITWISE = (*_FUNCTIONS, nn.Flatten, nn.Dropout)
# Modules that pool the map of each unit. A Linear's units have no map: they are the last dimension.
_POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def widen(model: nn.Sequential, layer: int, width: int, *, generator: torch.Generator | None = None) -> nn.Sequential:
    """Copy a model with more units in one layer, so that the copy computes the same function.

    Net2WiderNet (Chen et al. 2016): of n units, unit j >= n repeats a random unit g(j) < n, and the outgoing weight of
    g(j) is divided among its copies: v'_j = s_j v_g(j), where the s_j of one unit sum to 1. Net2Net divides evenly;
    then copies have equal gradients and stay equal. Here the shares are random, so that copies differ after the first
    step, without noise, which would change the function.

    Args:
        model: ``Linear`` and ``Conv2d`` layers, with batch norm, pooling and functions of single units between them.
        layer: the layer's position in ``model``, not its last.
        width: how many outputs it gets, at least as many as it has.
        generator: for g and s.

    Returns:
        The wider copy; ``model`` stays as it is.

    Raises:
        ValueError: there is no such layer; ``width`` is fewer than its outputs; a convolution is grouped; a module
            between it and the next layer mixes units or normalises something else; or a layer is in ``model`` twice.
    """
    old, following = _weighted(model, layer), _next(model, layer)
    units = old.weight.shape[0]
    _check_between(model, layer, following, units)
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
    _set_inputs(grown[following], copied, share, last=isinstance(old, nn.Linear))
    return grown


def deepen(model: nn.Sequential, layer: int) -> nn.Sequential:
    """Copy a model with one more layer and ReLU after a layer's ReLU, so that the copy computes the same function.

    Net2DeeperNet (Chen et al. 2016): the new layer is the identity, and ReLU leaves values that are not negative as
    they are. No other common activation does that, so others are refused.

    Args:
        model: ``Linear`` and ``Conv2d`` layers, with batch norm, pooling and functions of single units between them.
        layer: the layer's position in ``model``.

    Returns:
        The deeper copy; ``model`` stays as it is.

    Raises:
        ValueError: there is no such layer, or no ReLU after it and its batch norm.
    """
    old = _weighted(model, layer)
    place = layer + 1
    while place < len(model) and _is_norm(model[place]):
        place += 1
    if place == len(model) or not isinstance(model[place], nn.ReLU):
        raise ValueError(f"layer {layer} has no ReLU right after it, which alone is the same when it is applied again")
    new = _identity(old)
    modules = list(copy.deepcopy(model))  # as one, so that a layer in two places stays one
    added = [module.train(model.training) for module in (new, nn.ReLU())]
    grown = nn.Sequential(*modules[: place + 1], *added, *modules[place + 1 :])
    grown.training = model.training  # not train(), which would forget which parts are in another mode
    return grown


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
    unitwise = _UNITWISE if isinstance(model[layer], nn.Linear) else (*_UNITWISE, *_POOLING)
    for i in range(layer + 1, len(model)):
        if isinstance(model[i], nn.Linear | nn.Conv2d):
            _weighted(model, i)
            return i
        if not (isinstance(model[i], unitwise) or _is_norm(model[i])):
            raise ValueError(
                f"module {i}, a {type(model[i]).__name__}, may mix units: widening would change the function"
            )
    raise ValueError(f"layer {layer} is the last: its outputs are the classes")


def _check_between(model: nn.Sequential, layer: int, following: int, units: int) -> None:
    for i in range(layer, following + 1):
        module: Any = model[i]
        if module.state_dict() and sum(other is module for other in model) > 1:
            raise ValueError(f"module {i}, a {type(module).__name__}, is in two places: widening would change both")
        if _is_norm(module) and module.num_features != units:
            raise ValueError(f"module {i} normalises {module.num_features} features, not layer {layer}'s {units} units")


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
def _set_inputs(module: Any, copied: Tensor, share: Tensor, *, last: bool) -> None:
    """Make the layer take the copies' outputs, each with its share of the weight.

    After a Flatten a unit has several inputs: side by side, or interleaved where units were the ``last`` dimension.
    """
    weight, units = module.weight, int(copied.max()) + 1
    copied, share = copied.to(weight.device), share.to(weight)
    if isinstance(module, nn.Linear):
        apart = weight.unflatten(1, (-1, units)).mT if last else weight.unflatten(1, (units, -1))
        wide = apart[:, copied] * share[:, None]
        wide = (wide.mT if last else wide).flatten(1)
    else:
        wide = weight[:, copied] * share[:, None, None]
    module.weight = nn.Parameter(wide, weight.requires_grad)
    name = "in_features" if isinstance(module, nn.Linear) else "in_channels"
    setattr(module, name, module.weight.shape[1])
