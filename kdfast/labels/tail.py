"""What a model does to its logits after its output layer, measured: a scale, a softcap, a bias, or something else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["PROBES", "Tail", "measure", "numbers", "probe"]

PROBES = 5  # rows of a probe
_SMALL, _LARGE = 2.0**-10, 2.0**14  # where any softcap is the identity, and where any has saturated
_WIDTH = 8.0  # of the row whose columns differ


@dataclass(frozen=True)
class Tail:
    """``softcap * tanh(x / softcap)`` of ``x = scale * raw``, plus a bias per column; nothing by default."""

    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None  # (vocab,), added to what is scaled; not with a softcap

    def of(self, raw: Tensor) -> Tensor:
        """The logits of what the output layer returns."""
        logits = raw * self.scale
        if self.bias is not None:
            logits = logits + self.bias
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


def probe(vocab: int, device: torch.device) -> Tensor:
    """(PROBES, vocab) float32: what the output layer is made to return, so that the logits show what comes after."""
    rows = torch.tensor([0.0, _SMALL, 1.0, _LARGE, 0.0], device=device)[:, None].repeat(1, vocab)
    rows[-1] = torch.linspace(-_WIDTH, _WIDTH, vocab, device=device)
    return rows


def measure(raw: Tensor, logits: Tensor, config: Any) -> Tail | None:
    """The tail that makes ``logits`` (..., PROBES, vocab) of a ``probe``; None if there is none. Waits for the device.

    Args:
        raw: the probe.
        logits: what the model returned.
        config: the model's configuration, whose numbers a scale or softcap is taken from where they agree with it.
    """
    if logits.shape[-2:] != raw.shape or not logits.is_floating_point():
        return None
    first, accuracy = logits.reshape(-1, *raw.shape)[0].float(), 16 * torch.finfo(logits.dtype).eps
    zero = first[0]
    small, large = float(first[1, 0] - zero[0]), float(first[3, 0] - zero[0])
    scale, softcap = small / _SMALL, None
    if not scale > 0:
        return None
    if abs(large - scale * _LARGE) > 0.01 * scale * _LARGE:
        softcap = _exact(large, config, accuracy)
    tail = Tail(_exact(scale, config, accuracy), softcap, zero.clone() if softcap is None and zero.any() else None)
    want = tail.of(raw)
    close = (logits - want).abs() <= accuracy * want.abs().clamp(min=1.0)
    return tail if bool(close.all()) else None


def _exact(measured: float, config: Any, accuracy: float) -> float:
    """A number of the configuration, or the inverse of one, that is ``measured`` but for its rounding."""
    for number in (1.0, *numbers(config)):
        for exact in (number, 1.0 / number):
            if abs(exact - measured) <= accuracy * measured:
                return exact
    return measured


def numbers(config: Any, depth: int = 3) -> Iterator[float]:
    """The positive numbers of a configuration and of those inside it."""
    for value in vars(config).values() if hasattr(config, "__dict__") and depth else ():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if 0 < value < float("inf"):
                yield float(value)
        else:
            yield from numbers(value, depth - 1)
