"""Triton kernels where they are asked for first: ``import kdfast`` imports no Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

__all__ = ["kernel", "launchers"]


@cache
def launchers(name: str) -> Any:
    """The module ``kdfast.kernels.<name>``; None without Triton."""
    return import_module(f"kdfast.kernels.{name}") if find_spec("triton") is not None else None


@cache
def kernel(name: str) -> Callable[..., Any] | None:
    """``kdfast.kernels.<name>.<name>``, launched on the device of its first argument; None without Triton."""
    module = launchers(name)
    if module is None:
        return None
    launch = getattr(module, name)

    @wraps(launch)
    def on_its_device(first: torch.Tensor, *arguments: Any) -> Any:
        device = first.device.index if first.device.type == "cuda" else -1  # -1, in the interpreter: leave it alone
        with torch.cuda.device(device):
            return launch(first, *arguments)

    return on_its_device
