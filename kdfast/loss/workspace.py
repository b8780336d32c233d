"""The memory of a chunk's logits: on the CPU what one loss has used, the next one uses again."""

from __future__ import annotations

import os
import re
from threading import Lock

import torch
from torch import Tensor

__all__ = ["Workspace", "release", "workspace_bytes"]

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def workspace_bytes() -> int:
    """The bytes that a chunk's logits may take: KDFAST_WORKSPACE, such as "256MiB" or a number; else 512 MiB.

    Raises:
        ValueError: KDFAST_WORKSPACE is no size.
    """
    text = os.environ.get("KDFAST_WORKSPACE", "512MiB")
    match = re.fullmatch(r"(\d+)\s*([KMG]?i?B)?", text.strip(), re.IGNORECASE)
    unit = None if match is None else _UNITS.get((match[2] or "").upper())
    if match is None or unit is None or int(match[1]) < 1:
        raise ValueError(f'KDFAST_WORKSPACE must be a size such as "512MiB", got {text!r}')
    return int(match[1]) * unit


class Workspace:
    """Gives uninitialised memory for a while: it is taken back at the end of the ``with`` block.

    The pages of fresh logits take a training step longer than a sweep over them does. On the CPU up to
    ``workspace_bytes`` of what is taken back is kept; on other devices PyTorch's allocator does the same.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[Tensor] = []

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *error: object) -> None:
        _POOL.give_back(self._blocks)
        self._blocks = []

    def empty(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised (rows, columns) tensor, to be used inside the ``with`` block."""
        if self._device.type != "cpu":
            return torch.empty(rows, columns, dtype=dtype, device=self._device)
        nbytes = rows * columns * dtype.itemsize
        block = _POOL.take(nbytes)
        self._blocks.append(block)
        return block[:nbytes].view(dtype).view(rows, columns)


def release() -> None:
    """Give the memory that is kept for the next loss back to the system."""
    _POOL.release()


class _Pool:
    """Blocks that nobody uses, the latest first. Losses of several threads may ask at once."""

    def __init__(self) -> None:
        self._lock, self._kept = Lock(), list[Tensor]()

    def take(self, nbytes: int) -> Tensor:
        with self._lock:
            for i, block in enumerate(self._kept):
                if nbytes <= block.numel() <= 2 * nbytes:
                    return self._kept.pop(i)
        return torch.empty(nbytes, dtype=torch.uint8)

    def give_back(self, blocks: list[Tensor]) -> None:
        most = workspace_bytes()
        with self._lock:
            kept, self._kept = [*blocks, *self._kept], []
            for block in kept:
                most -= block.numel()
                if most < 0:
                    break
                self._kept.append(block)

    def release(self) -> None:
        with self._lock:
            self._kept = []


_POOL = _Pool()
