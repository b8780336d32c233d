"""Quantisation-aware distillation: layers that multiply by rounded weights, and train the weights behind them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.labels.output_module import find_output_module

__all__ = ["FakeQuantizedEmbedding", "FakeQuantizedLinear", "bake", "fake_quantize"]

_EXPONENT_BITS = -(1 << 23)  # of float32, and its sign
_BLOCK = 32  # numbers that share a scale, of MX formats by their definition and of INT4 by custom


# ---- formats: (..., groups, size) float32 to the nearest numbers that the format has ---------------------------------


def _integers(bits: int) -> Callable[[Tensor], Tensor]:
    """Signed integers times a scale per group: amax / (2^bits - 1) / 2, with which torchao prepares for training."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def rounded(groups: Tensor) -> Tensor:
        scale = groups.abs().amax(-1, keepdim=True) / ((high - low) / 2)
        scale = scale.clamp(min=torch.finfo(scale.dtype).smallest_normal)  # of a group of zeros
        return (groups * (1 / scale)).round_().clamp_(low, high).mul_(scale)

    return rounded


def _mxfp4(groups: Tensor) -> Tensor:
    """OCP Microscaling v1.0, section 6.3: E2M1 elements, and per block the power of two that brings amax below 8.

    A block that has an infinity or NaN is NaN, as the scale then is.
    """
    size = groups.abs()
    amax = size.amax(-1, keepdim=True)
    exponent = ((amax.view(torch.int32) >> 23) - 127 - 2).clamp_(min=-127)  # E2M1's largest power of two is 4 = 2^2
    size.mul_(_power_of_two(-exponent)).clamp_(max=6)
    # Numbers from 2^i on are apart by 2^(i - 1), and those below 1 as those above. In multiples of that, ties to even
    # are ties to an even mantissa.
    power = size.clamp(min=1)
    power.view(torch.int32).bitwise_and_(_EXPONENT_BITS)
    doubled = size.div_(power).mul_(2).round_().mul_(power)
    # A quarter of 2^(e + 1), as 2^-127 is no normal number.
    return doubled.copysign_(groups).mul_(0.25).mul_(_power_of_two(exponent + 1) + amax * 0)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


# Each format's rounding, and how many numbers share a scale if nothing else is asked for; None: the whole row.
_FORMATS: dict[str, tuple[Callable[[Tensor], Tensor], int | None]] = {
    "int8": (_integers(8), None),
    "int4": (_integers(4), _BLOCK),
    "mxfp4": (_mxfp4, _BLOCK),
}


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, format: str, group_size: int) -> Tensor:
        groups = weight.float().reshape(*weight.shape[:-1], -1, group_size)
        return _FORMATS[format][0](groups).flatten(-2).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None


# ---- layers --------------------------------------------------------------------------------------------------------


class _FakeQuantized:
    """A layer that computes with its rounded weight. Its parameter, which it trains and saves, is the unrounded one."""

    format: str
    group_size: int
    weight: Tensor

    @property
    def rounded_weight(self) -> Tensor:
        """The weight that the layer computes with. Its gradient goes to ``weight`` unchanged."""
        return self._round(self.weight)

    def _round(self, weight: Tensor) -> Tensor:
        return cast(Tensor, _StraightThrough.apply(weight, self.format, self.group_size))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        plain: str = super().extra_repr()  # type: ignore[misc]
        return f"{plain}, format={self.format!r}, group_size={self.group_size}"


class FakeQuantizedLinear(_FakeQuantized, nn.Linear):
    """An ``nn.Linear`` that multiplies by its rounded weight: see ``fake_quantize``, which makes them.

    Attributes:
        weight: the parameter, which is trained and saved, not rounded.
        rounded_weight: what the layer multiplies by.
        format, group_size: as ``fake_quantize`` was given them.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.rounded_weight, self.bias)


class FakeQuantizedEmbedding(_FakeQuantized, nn.Embedding):
    """An ``nn.Embedding`` whose vectors are rounded: see ``fake_quantize``, which makes them.

    Attributes:
        weight: the parameter, which is trained and saved, not rounded.
        rounded_weight: the rounded table, of which the layer's vectors are rows.
        format, group_size: as ``fake_quantize`` was given them.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self._round(super().forward(input))  # no scale is shared between rows: those in use are enough


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FakeQuantizedLinear,
    nn.Embedding: FakeQuantizedEmbedding,
}
_BACK: dict[type[Any], type[nn.Module]] = {fake: plain for plain, fake in _PLAIN.items()}


def fake_quantize(
    model: nn.Module,
    format: str = "int4",
    *,
    group_size: int | None = None,
    modules: str | Sequence[str] | None = None,
) -> list[str]:
    """Let layers of a model compute with rounded weights, so that training finds weights that bear the rounding::

        labels = cache.open(folder)  # which cache.capture(teacher, ..., codec="sample", draws=23) has written
        student = copy.deepcopy(teacher)
        fake_quantize(student, "mxfp4")
        options = {"temperature": 1.0, "kd_weight": 1.0, "ce_weight": 0.0, "divergence": "soft_ce"}
        Distiller(student, labels, lr=1e-4, **options).fit(loader, epochs=1)
        bake(student)

    Weights are rounded in every forward pass, to float32's nearest number of the format (ties to even), and gradients
    pass the rounding as if it were not there (the straight-through estimator). Names of parameters, ``state_dict`` and
    optimizers stay as they are: what is saved before ``bake`` are the weights before rounding, which any quantiser of
    the same format can take. A ``kdfast.Head`` of an output layer has its rounded weight. Calls with other ``modules``
    give other layers other formats. Do it before ``torch.compile`` and before FSDP wraps the model.

    The formats:

    * ``"int8"``: integers of -128 ... 127, a scale per row, or per ``group_size`` numbers of it.
    * ``"int4"``: integers of -8 ... 7, a scale per 32 or ``group_size`` numbers. The scale of both is float32,
      amax / 127.5 or amax / 7.5, as torchao's ``IntxFakeQuantizeConfig`` has it.
    * ``"mxfp4"``: the OCP Microscaling format: E2M1 numbers, 0, ±.5, 1, 1.5, 2, 3, 4, 6, and a power of two per 32.

    Args:
        model: is changed in place.
        format: "int8", "int4" or "mxfp4".
        group_size: how many neighbouring inputs share a scale. It must divide the layers' inputs.
        modules: one or several globs over layers' names, as ``fnmatch`` takes them: ``nn.Linear`` and ``nn.Embedding``.
            By default every ``nn.Linear`` but the output layer (``get_output_embeddings()``), those that share a weight
            with an embedding, and those whose weight the module around them reads, past the layer and its rounding.

    Returns:
        The names of the layers that round. Other weights stay as they are, such as experts that are slices of one
        parameter.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: another format; a group size that does not divide a layer's inputs, or that the format does not
            have; a pattern that matches no layer; a layer whose weight the module around it reads; or a weight that is
            shared with a layer that is not to round. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if format not in _FORMATS:
        raise ValueError(f"format must be one of {', '.join(map(repr, _FORMATS))}, got {format!r}")
    chosen = _choose(model, modules)
    _check_shared(model, chosen)
    sizes = {name: _group_size(name, layer, format, group_size) for name, layer in chosen.items()}
    for name, layer in chosen.items():
        # In place, so that hooks, other holders of the layer, and holders of its parameter all keep what they have.
        layer.__class__ = _PLAIN.get(type(layer), type(layer))
        layer.format, layer.group_size = format, sizes[name]
    return list(chosen)


def bake(model: nn.Module, *, rounded: bool = True) -> list[str]:
    """Make fake-quantised layers plain ones that compute the same: their rounded weights become the weights.

    Args:
        model: is changed in place, and its parameters are, so that what shares them still does.
        rounded: False leaves the weights as they were before rounding, for another quantiser to round.

    Returns:
        The names of the layers.

    Raises:
        ValueError: the model has no fake-quantised layer.
        TypeError: a wrapper such as FSDP has changed a layer's class. The model is then unchanged.
    """
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, _FakeQuantized)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no fake-quantised layer: fake_quantize makes them")
    for name, layer in layers.items():
        if type(layer) not in _BACK:
            raise TypeError(
                f"{name} is a {type(layer).__name__}, a wrapped layer: bake a plain copy with its state_dict"
            )
    if rounded:
        # One that is shared is rounded once: what is rounded twice may be another number.
        once = {id(layer.weight): layer for layer in layers.values()}
        with torch.no_grad():
            for layer in once.values():
                layer.weight.copy_(layer.rounded_weight)
    for module in dict.fromkeys(cast("Iterable[Any]", layers.values())):
        module.__class__ = _BACK[type(module)]
        del module.format, module.group_size
    return list(layers)


def _choose(model: nn.Module, modules: str | Sequence[str] | None) -> dict[str, Any]:
    """The layers to round by name. Only PyTorch's own classes: owners of derived ones read weights in other ways."""
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if type(m) in _PLAIN and name}
    if modules is None:
        output = find_output_module(model)
        embedded = {id(m.weight) for m in layers.values() if isinstance(m, nn.Embedding)}
        chosen = {name: m for name, m in layers.items() if isinstance(m, nn.Linear) and m is not output}
        chosen = {name: m for name, m in chosen.items() if id(m.weight) not in embedded and not _reader(model, name)}
        if not chosen:
            raise ValueError(
                f"{type(model).__name__} has no nn.Linear to round, of that class itself, but its output layer and "
                "layers whose weights others read: name modules=..."
            )
        return chosen
    patterns = [modules] if isinstance(modules, str) else list(modules)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(
                f"no nn.Linear or nn.Embedding within the model fits {pattern!r}; there are "
                f"{', '.join(layers) or 'none'}"
            )
    chosen = {name: m for name, m in layers.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    for name in chosen:
        if reader := _reader(model, name):
            raise ValueError(
                f"{reader} reads the weight of {name} itself, past the layer and its rounding: leave it out"
            )
    return chosen


def _reader(model: nn.Module, name: str) -> str | None:
    """The class of a module around a layer whose code reads the layer's weight, as Mamba's does."""
    path = name.split(".")
    for i in range(len(path) - 1, -1, -1):
        kind = type(model.get_submodule(".".join(path[:i])))
        if ".".join(path[i:]) in _read_weights(kind):  # type: ignore[arg-type]
            return kind.__name__
    return None


@cache
def _read_weights(kind: Any) -> frozenset[str]:
    """Of which attributes a class's code reads the weight, other than its dtype, device or shape."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # made where there is no file
        return frozenset()
    return frozenset(re.findall(r"\bself\.([\w.]+)\.weight\b(?!\.(?:dtype|device|shape|size)\b)", source))


def _check_shared(model: nn.Module, chosen: dict[str, Any]) -> None:
    """Raise ``ValueError`` where a weight would be rounded in one place and not in another, as tied embeddings are."""
    names = {id(layer.weight): name for name, layer in chosen.items()}
    places = set(map(id, chosen.values()))
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if id(parameter) in names and id(module) not in places:
                raise ValueError(
                    f"{names[id(parameter)]} shares its weight with {name}, which would not be rounded: name both, "
                    f"modules=[{names[id(parameter)]!r}, {name!r}], or neither"
                )


def _group_size(name: str, layer: Any, format: str, asked: int | None) -> int:
    usual = _FORMATS[format][1]
    inputs = layer.weight.shape[-1]
    size = (usual or inputs) if asked is None else asked
    if format == "mxfp4" and size != _BLOCK:
        raise ValueError(f"a block of mxfp4 has {_BLOCK} numbers, got group_size={size}: leave it out")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"group_size must be a whole number of inputs, 1 or more, got {size!r}")
    if inputs % size:
        raise ValueError(
            f"{name} has {inputs} inputs, which are no whole groups of {size}: give a group_size that divides them, or "
            "modules=... without it"
        )
    return size
