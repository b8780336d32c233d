"""Modules as output layers: which one a model has, and its weight and bias if it computes nothing else."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models import unwrap

__all__ = [
    "check_linear",
    "check_no_backward_hooks",
    "find_output_module",
    "is_distributed",
    "weight_and_bias",
    "weight_in_use",
]

_MEND = "take the logits, or merge the adapter into the layer first (merge_and_unload(), merge_lora())"


def weight_and_bias(weight: object, bias: object) -> tuple[Tensor, Tensor | None]:
    """The tensors of an output layer that is given as a module, or as a weight and a bias.

    Raises:
        TypeError: neither; or a module that does more than multiply by its weight and add its bias.
    """
    if isinstance(weight, nn.Module):
        if bias is not None:
            raise TypeError(f"a {type(weight).__name__} brings its own bias: leave bias out")
        layer = check_linear(weight)
        _check_no_forward_hooks(layer)
        check_no_backward_hooks(layer)
        return weight_in_use(layer), layer.bias
    if not isinstance(weight, Tensor):
        raise TypeError(
            "weight must be a (vocab, d) tensor or the nn.Linear that it belongs to, such as model.lm_head, got "
            f"{type(weight).__name__}"
        )
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a (vocab,) tensor or None, got {type(bias).__name__}")
    return weight, bias


def weight_in_use(layer: nn.Linear) -> Tensor:
    """What a linear layer multiplies by: its weight, or that rounded, where ``recipes.fake_quantize`` makes it so."""
    rounds = hasattr(type(layer), "rounded_weight")
    return layer.rounded_weight if rounds else layer.weight  # type: ignore[return-value]


def check_linear(module: nn.Module) -> nn.Linear:
    """``module``, if it is a linear layer whose ``weight_in_use`` and ``bias`` are all that its ``forward`` uses.

    Raises:
        TypeError: an adapter (its ``weight`` is that of the frozen base), a quantised layer, or a module of another
            kind.
    """
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if hasattr(module, "base_layer") or any(name.startswith("lora_") for name, _ in module.named_children()):
        raise TypeError(f"the output layer is adapted (a {kind}), and its weight is the base's alone: {_MEND}")
    if not isinstance(module, nn.Linear):
        raise TypeError(
            f"the output layer is a {kind}, not an nn.Linear: {_MEND}; or give the (vocab, d) weight that it "
            "multiplies by, if that is all it does"
        )
    replaced = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")  # accelerate's only moves weights
    derived = type(module).forward is not nn.Linear.forward and not hasattr(type(module), "rounded_weight")
    if derived or replaced:
        raise TypeError(f"the output layer is a {kind} with a forward of its own: {_MEND}")
    weight = module.weight
    plain = type(weight) in (Tensor, nn.Parameter) or is_distributed(weight) or torch.compiler.is_compiling()
    if not plain or not weight.is_floating_point():
        raise TypeError(
            f"the output layer's weight is quantised (a {type(weight).__name__} of {weight.dtype}): take the logits, "
            "or leave the output layer out of the quantisation"
        )
    return module


def _check_no_forward_hooks(module: nn.Module) -> None:
    if names := _names_of([*module._forward_hooks.values(), *module._forward_pre_hooks.values()]):
        raise TypeError(
            f"the output layer has forward hooks ({names}), which a loss of its weight would not run: remove them, "
            "take the logits, or let Head.of(model, **inputs) run the model"
        )


def check_no_backward_hooks(module: nn.Module) -> None:
    """Raise ``TypeError`` for a layer with backward hooks: they see, and change, gradients that nobody computes."""
    if names := _names_of([*module._backward_hooks.values(), *module._backward_pre_hooks.values()]):
        raise TypeError(
            f"the output layer has backward hooks ({names}), which a fused loss would not run: remove them, or take "
            "the logits"
        )


def _names_of(hooks: list[Any]) -> str:
    return ", ".join(getattr(hook, "__name__", type(hook).__name__) for hook in hooks)


def find_output_module(model: Any, layer: nn.Module | str | None = None) -> nn.Module | None:
    """The module that makes a model's logits; of one that adapters replace, the one in use. None: it does not say.

    Args:
        model: a module, wrapped or not.
        layer: the module, or its name within ``model``. By default ``model.get_output_embeddings()``.
    """
    inner = unwrap(model)
    if isinstance(layer, str):
        found = inner.get_submodule(layer)
    elif layer is None:
        found = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    else:
        found = layer
    copies = getattr(found, "modules_to_save", None)  # PEFT trains a copy of the whole layer
    if not isinstance(copies, nn.ModuleDict):
        return found
    active = [name for name in _names(getattr(found, "active_adapter", ())) if name in copies]
    disabled = getattr(found, "disable_adapters", False)
    return copies[active[0]] if active and not disabled else getattr(found, "original_module", found)


def _names(active: Any) -> list[str]:
    return [active] if isinstance(active, str) else list(active)


def is_distributed(x: object) -> bool:
    """Whether a tensor is a DTensor, as FSDP2 makes of parameters."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and there if it is one
    return module is not None and isinstance(x, module.DTensor)
