"""When the values inside a tensor may be looked at: never where that waits for a device, or breaks a trace."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

__all__ = ["can_look", "values_are_checked"]

_PLAIN = (Tensor, nn.Parameter)  # no FakeTensor, no DTensor


def values_are_checked() -> bool:
    """Whether KDFAST_CHECK=1 asks for checks of the values inside tensors, which wait for the device."""
    return os.environ.get("KDFAST_CHECK", "") == "1"


def can_look(x: Tensor) -> bool:
    """Whether the values of ``x`` are at hand: it is an ordinary CPU tensor, and nothing traces or transforms calls."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and type(x) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and not torch._C._is_tracing()
    )
