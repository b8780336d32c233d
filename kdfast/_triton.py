"""Triton kernels where they are asked for first: ``import kdfast`` imports no Triton."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch

__all__ = ["kernel", "launcher"]

# Where each launcher is defined.
MODULES: Mapping[str, str] = MappingProxyType(
    {
        "decode_blocks": "kdfast.kernels.decode_blocks",
        "decode_rows": "kdfast.kernels.decode_rows",
        "dense_rows": "kdfast.kernels.dense",
        "scale_": "kdfast.kernels.scale",
        "select_threshold": "kdfast.kernels.select_threshold",
        "select_top": "kdfast.kernels.select_top",
        "sparse_rows": "kdfast.kernels.sparse",
    }
)


@cache
def launcher(name: str) -> Callable[..., Any] | None:
    """The launcher ``name`` of its module in ``MODULES``; None without Triton."""
    if find_spec("triton") is None:
        return None
    launch: Callable[..., Any] = getattr(import_module(MODULES[name]), name)
    return launch


@cache
def kernel(name: str) -> Callable[..., Any] | None:
    """The launcher ``name``, run on the device of its first argument; None without Triton."""
    launch = launcher(name)
    if launch is None:
        return None

    @wraps(launch)
    def on_its_device(first: torch.Tensor, *arguments: Any) -> Any:
        device = first.device.index if first.device.type == "cuda" else -1  # -1, in the interpreter: leave it alone
        with torch.cuda.device(device):
            return launch(first, *arguments)

    return on_its_device
