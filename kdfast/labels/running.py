"""Running a model up to its output layer: the hidden states, the layer's live weight, and what comes after it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdfast.labels.circumstances import circumstances, path_of
from kdfast.labels.output_module import (
    check_linear,
    check_no_backward_hooks,
    find_output_module,
    is_distributed,
    weight_in_use,
)
from kdfast.labels.tail import PROBES, Tail, measure, probe
from kdfast.models import autocast_dtype, unwrap, with_decoder_inputs

__all__ = ["Run", "run_to_output_layer"]


@dataclass(frozen=True)
class _Measured:
    """What a call has shown of what a model does to its logits."""

    tail: Tail
    about: Any  # the circumstances that it was measured in
    trains: bool  # whether that was with gradients
    path: str | None  # the output layer's within the model


# Per model.
_TAILS: WeakKeyDictionary[nn.Module, _Measured] = WeakKeyDictionary()


@dataclass(frozen=True)
class Run:
    """One call of a model that stopped short of its output layer."""

    hidden: Tensor  # (..., d), what went into the layer, in autocast's dtype where that is on
    weight: Tensor  # (vocab, d), live
    bias: Tensor | None  # (vocab,), live; with what the model adds afterwards
    scale: float
    softcap: float | None
    output: Any  # what the model returned; its logits are not the model's


def run_to_output_layer(
    model: nn.Module, layer: nn.Module | str | None, args: tuple[Any, ...], inputs: dict[str, Any]
) -> Run:
    """Call ``model(*args, **inputs)``, but multiply out a single row of its logits.

    The model runs through whatever wraps it. Its output layer is called with one row, and returns a probe in place of
    logits; what the model makes of the probe is what it does to logits. That is measured at a model's first call.

    Raises:
        TypeError: no module, or an output layer that is more than a weight and a bias.
        ValueError: a model that does not call its output layer once, or does to its logits what a ``Head`` cannot say.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is a torch.nn.Module, got {type(model).__name__}")
    found = find_output_module(model, layer)
    if found is None:
        raise TypeError(
            f"a {type(unwrap(model)).__name__} does not say what its output layer is: give layer=, the module that "
            "makes its logits or that module's name"
        )
    module = check_linear(found)
    check_no_backward_hooks(module)
    labels = inputs.pop("labels", None)  # for the model's own loss, which there are no logits for
    known = _TAILS.get(model)
    path = known.path if known is not None and _lies_at(model, known.path, module) else path_of(model, module)
    catch = _Catch(module, known, circumstances(model, path, (*args, *inputs.items())), path)
    inputs = with_decoder_inputs(model, inputs, labels)
    before = module.register_forward_pre_hook(catch.before, with_kwargs=True)
    after = module.register_forward_hook(catch.after)
    try:
        with _uncompiled():
            output = model(*args, **inputs)
    except RuntimeError as error:
        if catch.has_probed and any(word in str(error) for word in ("shape", "size")):
            raise ValueError(
                f"{type(unwrap(model)).__name__} cannot go on with {PROBES} rows or 1 in the place of its logits' "
                f"({error}): take its logits instead"
            ) from error
        raise
    finally:
        before.remove()
        after.remove()
    run = catch.run(model, output)
    if catch.measured is not None:
        _TAILS[model] = catch.measured
    return run


def _lies_at(model: nn.Module, path: str | None, module: nn.Module) -> bool:
    if path is None:
        return False
    try:
        return model.get_submodule(path) is module
    except AttributeError:
        return False


def _uncompiled() -> AbstractContextManager[Any]:
    """A context in which compiled modules run eagerly: their graphs do not run hooks, and new ones would keep them."""
    if "torch._dynamo" not in sys.modules:  # slow to import, and there if anything is compiled
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


class _Catch:
    """The hooks of one call on an output layer, and what they have seen."""

    def __init__(self, module: nn.Linear, known: _Measured | None, about: Any, path: str | None) -> None:
        self._module, self._thread = module, threading.get_ident()
        trains = torch.is_grad_enabled()
        # Other circumstances, or a tail that has only been looked at without gradients: it is measured again.
        hooks = tuple(module._forward_hooks), tuple(module._forward_pre_hooks)
        self._about, self._path = (id(module), type(module), hooks, about), path
        same = known is not None and known.about == self._about and (known.trains or not trains)
        self._known = known.tail if known is not None and same else None
        self._trains = trains
        self.measured: _Measured | None = None
        self._calls = 0
        self._hidden: Tensor | None = None
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._raw: Tensor | None = None
        self._gate: Tensor | None = None
        self._agrees = True

    def before(self, module: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep the hidden states, and let the layer see the last row alone."""
        if threading.get_ident() != self._thread:
            return None
        self._calls += 1
        hidden: Tensor = args[0] if args else kwargs["input"]
        weight: Tensor = weight_in_use(module)
        bias: Tensor | None = module.bias
        self._check_place(hidden, weight)
        if (dtype := autocast_dtype(hidden.device)) is not None:
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        if not torch.is_grad_enabled():
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        self._hidden, self._weight, self._bias = hidden, weight, bias
        return (hidden.detach().reshape(-1, hidden.shape[-1])[-1:],), {}

    def after(self, module: nn.Linear, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Return a probe in place of the logits."""
        if threading.get_ident() != self._thread or self._hidden is None or self._weight is None:
            return None
        if self._known is None and _has_memory(self._weight):
            self._agrees = _agree(output.detach(), args[0], self._weight.detach(), self._bias)
        vocab, hidden = self._weight.shape[0], self._hidden
        if self._known is not None and hidden.device.type == "cpu":
            self._known = None  # looking at values waits for nothing
        self._raw = torch.zeros(1, vocab, device=hidden.device) if self._known else probe(vocab, hidden.device)
        rows = self._raw
        rows = rows.expand(*hidden.shape[:-2], *rows.shape).contiguous()
        self._gate = _Gate.apply(rows, hidden, self._weight, self._bias)  # type: ignore[no-untyped-call]
        return self._gate

    @property
    def has_probed(self) -> bool:
        """Whether the model has got a probe in the place of its logits."""
        return self._gate is not None

    def _check_place(self, hidden: Tensor, weight: Tensor) -> None:
        if hidden.dim() < 2:
            raise ValueError(f"what enters the output layer must be (..., rows, d), got {tuple(hidden.shape)}")
        if is_distributed(weight):
            raise TypeError(
                "the output layer's weight is a DTensor, which may hold a part of the vocabulary: take the logits"
            )
        if weight.is_meta:
            raise ValueError("the output layer's weight is on the meta device (offloaded): take the logits")

    def run(self, model: nn.Module, output: Any) -> Run:
        """What the call has shown."""
        name = type(unwrap(model)).__name__
        if self._calls != 1 or self._hidden is None or self._weight is None or self._raw is None:
            raise ValueError(f"{name} called its output layer {self._calls} times, not once: take its logits instead")
        if not _has_memory(self._weight):
            raise ValueError(
                f"the output layer of {name} is an FSDP unit of its own, which frees its weight after its forward: "
                "leave it to the root's unit, fully_shard(model), or take the logits"
            )
        if not self._agrees:
            raise ValueError(f"the output layer of {name} does not return hidden @ weight.T + bias: take its logits")
        logits = _logits(output, self._weight.shape[0])
        tail = self._known or self._measure(logits, name, getattr(unwrap(model), "config", None))
        hidden, bias = _joined(self._hidden, logits), self._bias
        if tail.bias is not None:
            added = (tail.bias / tail.scale).to(self._weight.dtype)
            bias = added if bias is None else bias + added
        return Run(hidden, self._weight, bias, tail.scale, tail.softcap, output)

    def _measure(self, logits: Tensor | None, name: str, config: Any) -> Tail:
        tail = None
        if logits is not None and self._raw is not None and self._gate is not None:
            with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
                tail = measure(self._raw, logits, config)
            if _is_trained(logits, self._gate):
                tail = None
        if tail is None:
            raise ValueError(
                f"{name} makes its logits of its output layer's in a way that a Head cannot say, which is a positive "
                "scale, a softcap and a bias that are not trained: take its logits instead"
            )
        self.measured = _Measured(tail, self._about, self._trains, self._path)
        return tail


def _logits(output: Any, vocab: int) -> Tensor | None:
    """The logits that a model returned: a tensor, its ``logits``, or the first of a tuple that is as wide."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None:
        items = output if isinstance(output, (tuple, list)) else (output,)
        found = next((x for x in items if isinstance(x, Tensor) and x.dim() and x.shape[-1] == vocab), None)
    return found if isinstance(found, Tensor) else None


def _agree(got: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a layer's own forward is the product with its weight; True where there is no finite row to tell by."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        bias = None if bias is None else bias.to(weight.dtype)
        want = nn.functional.linear(hidden.to(weight.dtype), weight, bias).float()
        accuracy = 16 * torch.finfo(torch.promote_types(got.dtype, weight.dtype)).eps
        accuracy = max(accuracy, 16 * torch.finfo(got.dtype).eps)
        largest = want.abs().amax() if want.numel() else want.new_zeros(())
        close = (got.float() - want).abs() <= accuracy * largest.clamp(min=1e-30)
        return not bool(largest.isfinite()) or bool(close.all())


def _has_memory(weight: Tensor) -> bool:
    return weight.untyped_storage().nbytes() >= weight.numel() * weight.element_size()


def _is_trained(logits: Tensor, gate: Tensor) -> bool:
    """Whether the logits of a gate depend on anything else that takes a gradient."""
    waiting, seen = [logits.grad_fn], {None, gate.grad_fn}
    while waiting:
        node = waiting.pop()
        if node in seen or node is None:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            return True
        waiting += [following for following, _ in node.next_functions]
    return False


def _joined(hidden: Tensor, logits: Tensor | None) -> Tensor:
    """Hidden states whose gradient also passes by the model's output, where DDP and FSDP wait for it."""
    if logits is None or not (hidden.requires_grad and logits.requires_grad):
        return hidden
    return _Join.apply(hidden, logits)  # type: ignore[no-any-return, no-untyped-call]


class _Gate(torch.autograd.Function):
    """A tensor that autograd takes for one that was made of hidden states, weight and bias."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *sources: Tensor | None) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, None, None


class _Join(torch.autograd.Function):
    """The first tensor. The second's graph is walked, too, with a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor) -> Tensor:
        ctx.like = logits.shape, logits.dtype, logits.device
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        shape, dtype, device = ctx.like
        return grad, torch.zeros(shape, dtype=dtype, device=device)
