"""Output layers: what turns a model's last hidden states into logits."""

from __future__ import annotations

import json
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import torch
from torch import Tensor

from kdfast._digest import TensorDigest

__all__ = ["Head", "OutputLayer"]


@dataclass(frozen=True, eq=False)
class OutputLayer:
    """``softcap * tanh(x / softcap)`` of ``x = scale * (hidden @ weight.T + bias)``; without ``softcap`` x itself.

    Args:
        weight: (vocab, d), any float type.
        bias: (vocab,), or None.
        scale: of the logits (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        softcap: Gemma 2's ``final_logit_softcapping``.

    Raises:
        ValueError: shapes that do not fit, a scale or softcap that is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or not self.weight.is_floating_point():
            raise ValueError(
                f"weight must be floating-point (vocab, d), got {self.weight.dtype} {tuple(self.weight.shape)}"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"bias must be {tuple(self.weight.shape[:1])}, got {tuple(self.bias.shape)}")
        if not self.scale > 0 or (self.softcap is not None and not self.softcap > 0):
            raise ValueError(f"scale and softcap must be positive, got {self.scale} and {self.softcap}")

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

    Args:
        hidden: (..., d).
        weight, bias, scale, softcap: the layer, as ``OutputLayer`` takes them.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None

    def logits(self) -> Tensor:
        """(..., vocab) in float32."""
        return OutputLayer(self.weight, self.bias, scale=self.scale, softcap=self.softcap).logits(self.hidden)
