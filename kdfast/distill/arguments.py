"""The arguments of ``Distiller`` and of ``Distiller.fit``, and checks of their values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kdfast.distill.metrics import Metrics, is_function
from kdfast.distill.state import Record

__all__ = ["FitOptions", "check_arguments", "check_device", "check_inputs", "check_loader"]


def check_arguments(
    student: object, objective: object, amp: object, accumulate: int, clip_norm: float | None, options: dict[str, Any]
) -> None:
    """Check arguments of ``Distiller``. Raises ``TypeError`` or ``ValueError`` with what was passed and wanted."""
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a torch.nn.Module, got {type(student).__name__}")
    if objective is not None and not callable(objective):
        raise TypeError(f"objective must be a function of a Step, got {type(objective).__name__}")
    if objective is not None and options:
        raise TypeError(f"{', '.join(sorted(options))}: KD's options do not go with another objective")
    if amp not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"amp must be torch.bfloat16 or torch.float16, got {amp}")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if clip_norm is not None and clip_norm <= 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}")


def check_device(device: object) -> None:
    """Check the argument ``device``. Raises ``TypeError`` or ``ValueError``, with what names a device."""
    if device is None or isinstance(device, (torch.device, int)):
        return
    if not isinstance(device, str):
        raise TypeError(f'device must be a torch.device or its name, such as "cuda", got {type(device).__name__}')
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'device must be "cpu", "cuda" (a GPU), "cuda:1" or alike, got {device!r}') from error


def check_inputs(arguments: Any, error: TypeError) -> None:
    """Raise ``TypeError`` if a model's arguments, on which it has raised ``error``, are NumPy arrays or not its own."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown and isinstance(arguments, Mapping) and unknown[1] in arguments:
        raise TypeError(
            f"{error}; a batch that is a mapping is given to the models by keyword, but for labels and key: say by "
            "inputs=(lambda batch: ...) what they take, and by labels=(lambda batch: ...) where the labels are"
        ) from error
    values = arguments.values() if isinstance(arguments, Mapping) else arguments
    values = values if isinstance(arguments, (Mapping, tuple, list)) else (arguments,)
    if any(isinstance(x, np.ndarray) for x in values):
        raise TypeError(
            "a batch's inputs are NumPy arrays, and the student takes tensors: torch.from_numpy(x).float(), or a "
            "DataLoader, which makes tensors of a dataset's arrays"
        ) from error


def check_loader(name: str, loader: Any) -> None:
    """Check that ``loader`` gives batches. Raises ``TypeError`` for the data themselves, with the line that is wanted.

    Args:
        name: what it is called in the message.
        loader: an iterable of batches.
    """
    arrays = (Tensor, np.ndarray)
    single = isinstance(loader, arrays)
    pair = isinstance(loader, (tuple, list)) and len(loader) == 2 and all(isinstance(x, arrays) for x in loader)
    if pair:
        inputs, labels = loader
        floats = labels.is_floating_point() if isinstance(labels, Tensor) else labels.dtype.kind == "f"
        pair = len(inputs.shape) > len(labels.shape) == 1 and len(inputs) == len(labels) and not floats
    if single or pair or isinstance(loader, TensorDataset):
        got = "a TensorDataset" if isinstance(loader, TensorDataset) else "inputs and labels" if pair else "one array"
        data = "dataset" if isinstance(loader, TensorDataset) else f"TensorDataset(x{', y' if pair else ''})"
        raise TypeError(
            f"{name} takes batches, got {got}: torch.utils.data.DataLoader({data}, batch_size=64, shuffle=True), with "
            "tensors" + (", or [(x, y)] for a single batch" if pair else "")
        )
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise TypeError(f"{name} takes an iterable of batches, such as a DataLoader, got {type(loader).__name__}")


@dataclass(frozen=True)
class FitOptions:
    """The options of ``Distiller.fit``, which describes them."""

    epochs: int
    eval_every: int
    patience: int | None
    monitor: str
    metrics: Any
    checkpoint_every: int | None
    log_every: int
    resume: bool
    progress: bool
    on_epoch: Callable[[Record], object] | None

    def check(self, evaluates: bool) -> None:
        """Check the options of a run that ``evaluates`` its student, or does not.

        Raises:
            ValueError: a number that is not positive, patience without anything to monitor, or an unknown metric.
        """
        for name in ("epochs", "eval_every", "checkpoint_every", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.patience is not None and not evaluates and self.monitor != "loss":
            raise ValueError('patience needs an eval_loader, or monitor="loss", the loss of training')
        if evaluates and not is_function(self.metrics):
            Metrics(self.metrics)
