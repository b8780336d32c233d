"""Output layers: what turns a model's last hidden states into logits."""

from __future__ import annotations

import json
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kdfast._checks import check_number
from kdfast.labels.digest import TensorDigest
from kdfast.labels.output_module import is_distributed, weight_and_bias
from kdfast.labels.running import run_to_output_layer
from kdfast.models import FLOATS, autocast_dtype, check_plain

__all__ = ["Head", "OutputLayer"]


@dataclass(frozen=True, eq=False)
class OutputLayer:
    """``softcap * tanh(x / softcap)`` of ``x = scale * (hidden @ weight.T + bias)``; without ``softcap`` x itself.

    Args:
        weight: (vocab, d), any float type; or the ``nn.Linear`` that has weight and bias, as ``Head`` takes it.
        bias: (vocab,), or None.
        scale: of the logits (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        softcap: Gemma 2's ``final_logit_softcapping``.

    Raises:
        TypeError: a weight or bias that is no tensor; a module that is no plain ``nn.Linear``.
        ValueError: shapes that do not fit, a scale or softcap that is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        _take_tensors(self)
        if self.weight.dim() != 2 or not self.weight.is_floating_point():
            raise ValueError(
                f"weight must be floating-point (vocab, d), got {self.weight.dtype} {tuple(self.weight.shape)}"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"bias must be {tuple(self.weight.shape[:1])}, got {tuple(self.bias.shape)}")
        _take_numbers(self)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """d: the width of the hidden states."""
        return self.weight.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any bit of the layer, whatever device it is on."""
        digest = TensorDigest()
        digest.text(json.dumps([self.scale, self.softcap]))
        digest.tensor("weight", self.weight)
        if self.bias is not None:
            digest.tensor("bias", self.bias)
        return digest.hex()

    def shard(self, columns: slice) -> OutputLayer:
        """The layer of some columns of the vocabulary."""
        return replace(self, weight=self.weight[columns], bias=None if self.bias is None else self.bias[columns])

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., vocab) float32 logits of (..., d) hidden states of any float type, without a gradient.

        Raises:
            ValueError: another width, or another device.
        """
        if hidden.shape[-1:] != (self.width,):
            raise ValueError(f"hidden states must be (..., {self.width}) for this head, got {tuple(hidden.shape)}")
        if hidden.device != self.weight.device:
            raise ValueError(f"hidden states are on {hidden.device}, the head on {self.weight.device}")
        with torch.no_grad():
            logits = hidden.float() @ self.weight.float().T
            if self.bias is not None:
                logits += self.bias.float()
            logits *= self.scale
            return logits if self.softcap is None else (logits / self.softcap).tanh_().mul_(self.softcap)


@dataclass(frozen=True, eq=False)
class Head:
    """Logits that have not been multiplied out: hidden states, and the output layer that they go through.

    ``kd_loss`` takes it for the student's logits, the teacher's, or both, and multiplies out some rows at a time::

        kd_loss(Head(hidden, model.lm_head), teacher)   # kd_loss(model.lm_head(hidden), teacher)

    Many models scale or cap their logits after the layer, adapters change the layer, and calling a part of a wrapped
    model leaves out what wraps it: DDP, FSDP, autocast. ``Head.of`` runs the whole model and sees to all of that::

        kd_loss(Head.of(model, **inputs), teacher)             # kd_loss(model(**inputs).logits, teacher)

    Args:
        hidden: (..., d), of the weight's dtype.
        weight: (vocab, d); or the ``nn.Linear`` that has weight and bias. Gradients reach its parameters.
        bias, scale, softcap: of the layer, as ``OutputLayer`` takes them.
        logits_dtype: what the products are summed in and rounded to: float32 (float64 for float64). A narrow one saves
            time where a processor has no products of narrow numbers with wide sums; near the teacher its gradient is
            mostly rounding.
        weight_grad: (vocab, d) float32, which each backward pass of a student's loss adds the weight's gradient to,
            instead of returning it. That multiplies the logits out again, and no sum of the gradient is kept.

    Raises:
        TypeError, ValueError: what does not fit, naming what was passed.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None
    logits_dtype: torch.dtype | None = None
    weight_grad: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.hidden, Tensor):
            raise TypeError(f"hidden must be a tensor of hidden states, got {type(self.hidden).__name__}")
        _take_tensors(self)
        _take_numbers(self)
        for name, x in (("hidden", self.hidden), ("weight", self.weight)):
            if is_distributed(x):
                raise TypeError(
                    f"{name} is a DTensor, which may hold a part of the vocabulary or of the model: use the head "
                    "inside the wrapped module's forward, where it is whole"
                )
            check_plain(name, x)
            if x.dtype not in FLOATS:
                raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {x.dtype}")
        layer = self.layer
        if self.hidden.dim() < 1 or self.hidden.shape[-1] != layer.width:
            raise ValueError(f"hidden must be (..., {layer.width}) for this weight, got {tuple(self.hidden.shape)}")
        if self.hidden.device != self.weight.device:
            raise ValueError(f"hidden is on {self.hidden.device}, weight on {self.weight.device}")
        if self.hidden.dtype != self.weight.dtype and autocast_dtype(self.weight.device) is None:
            raise TypeError(f"hidden is {self.hidden.dtype}, weight {self.weight.dtype}; they must agree")
        if self.logits_dtype not in (None, torch.float32, self.weight.dtype):
            raise TypeError(
                f"logits_dtype must be float32 or the weight's {self.weight.dtype}, got {self.logits_dtype}"
            )
        _check_weight_grad(self.weight, self.weight_grad)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *args: Any,
        layer: nn.Module | str | None = None,
        return_output: bool = False,
        **inputs: Any,
    ) -> Any:
        """Run a model up to its output layer: the ``Head`` that stands for ``model(*args, **inputs).logits``::

            with torch.no_grad():
                large = Head.of(teacher, **inputs)
            loss = kd_loss(Head.of(student, **inputs), large, labels, shift=True)

        The model runs as it is called, through DDP, FSDP, autocast, ``accelerate``, PEFT and checkpointing, so hidden
        states come in the dtype and with the gradients that it gives them. (What ``torch.compile`` has compiled runs
        eagerly.) Its output layer multiplies out one row. A scale (Cohere, Granite, Falcon-H1) and a softcap (Gemma 2)
        that the model applies afterwards are measured at its first call. Gradients reach the output layer's own weight
        and bias, tied ones too.

        Calling ``model.model(**inputs)`` instead, a part of a wrapped model, runs without what wraps it: DDP and FSDP
        then do not reduce its gradients, and ``accelerate`` computes in float32.

        Args:
            model: a module that calls its output layer, an ``nn.Linear``, once. Under DDP and FSDP the wrapped one.
            args, inputs: what it is called with. ``labels`` do not reach it, since its own loss needs logits; an
                encoder-decoder's make its ``decoder_input_ids``.
            layer: the output layer, or its name within the model. By default ``model.get_output_embeddings()``.
            return_output: return the pair (head, output) instead, with what the model returned. In a Hugging Face
                output ``logits`` is the head; the other fields are the model's.

        Returns:
            A ``Head`` whose ``shape`` is that of the model's logits.

        Raises:
            TypeError: a model without a known output layer; a layer that is adapted (LoRA), quantised, sharded or of
                another kind.
            ValueError: an output layer that is not called once, or logits that are not ``softcap * tanh(x / softcap)``
                of ``x = scale * (hidden @ weight.T + bias)``.
        """
        if torch.compiler.is_compiling():  # hooks are no part of a graph
            outside: Any = torch.compiler.disable(cls.of)  # type: ignore[no-untyped-call]
            return outside(model, *args, layer=layer, return_output=return_output, **inputs)
        run = run_to_output_layer(model, layer, args, inputs)
        head = cls(run.hidden, run.weight, run.bias, scale=run.scale, softcap=run.softcap)
        if not return_output:
            return head
        if hasattr(run.output, "logits"):
            run.output.logits = head
        return head, run.output

    @property
    def layer(self) -> OutputLayer:
        """The output layer alone."""
        return OutputLayer(self.weight, self.bias, scale=self.scale, softcap=self.softcap)

    def shard(self, columns: slice) -> Head:
        """Return the hidden states with some columns of the output layer."""
        return replace(self, weight=self.weight[columns], bias=None if self.bias is None else self.bias[columns])

    # Tensor-like attributes of the logits.

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self.logits_dtype or torch.promote_types(self.hidden.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def logits(self) -> Tensor:
        """(..., vocab) float32 logits, all rows' at once and without a gradient."""
        return self.layer.logits(self.hidden)


def _take_tensors(layer: OutputLayer | Head) -> None:
    """Put a module's tensors in the module's place."""
    weight, bias = weight_and_bias(layer.weight, layer.bias)
    if weight is not layer.weight:
        object.__setattr__(layer, "weight", weight)
        object.__setattr__(layer, "bias", bias)


def _take_numbers(layer: OutputLayer | Head) -> None:
    """Put numbers in the place of tensors that hold one. No gradient would reach such a tensor."""
    for name in ("scale", "softcap"):
        value = getattr(layer, name)
        if isinstance(value, Tensor) and value.numel() == 1:
            if value.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name} requires grad, but is a constant of a head: multiply the hidden states by it")
            value = value.item()
        if value is None and name == "softcap":
            continue
        if not check_number(name, value) > 0:
            raise ValueError(f"scale and softcap must be positive, got {name} {value}")
        if type(value) not in (int, float) or value is not getattr(layer, name):
            object.__setattr__(layer, name, float(value))


def _check_weight_grad(weight: Tensor, grad: Tensor | None) -> None:
    if grad is None:
        return
    if not isinstance(grad, Tensor):
        raise TypeError(f"weight_grad must be a tensor or None, got {type(grad).__name__}")
    wide = torch.promote_types(weight.dtype, torch.float32)
    if grad.shape != weight.shape or grad.dtype != wide or grad.device != weight.device or not grad.is_contiguous():
        raise ValueError(
            f"weight_grad must be contiguous {wide} {tuple(weight.shape)} on {weight.device}, got {grad.dtype} "
            f"{tuple(grad.shape)} on {grad.device}"
        )
