"""The denominator of a mean over what several processes hold."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["global_items"]


def global_items(
    *labels: Tensor,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``num_items`` for ``kd_loss`` under DDP or FSDP, which average the processes' gradients::

        count = (labels != ignore_index).sum()      # on the device: nobody waits
        dist.all_reduce(count, group=group)
        return count / dist.get_world_size(group)

    With it the averaged gradient is that of the mean over all counted rows of all processes, however unevenly they are
    spread. For gradient accumulation, give the labels of all micro-batches of a step, and the result to each loss.

    Args:
        labels: (...,) class indices of one or several micro-batches.
        mask: the ``row_weight`` of a single micro-batch, where that is a bool mask.
        ignore_index, shift: as ``kd_loss`` is given them.
        group: of the data parallelism; None: all processes. Without ``torch.distributed`` it is this one alone.

    Raises:
        ValueError: no labels, a mask for several, or of another shape or dtype.
    """
    if not labels:
        raise ValueError("global_items needs the labels of at least one micro-batch")
    if mask is not None and (len(labels) > 1 or mask.shape != labels[0].shape or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be bool {tuple(labels[0].shape)} for one micro-batch, got {mask.dtype} {tuple(mask.shape)} for "
            f"{len(labels)}"
        )
    count = torch.stack([_count(x, mask, ignore_index, shift) for x in labels]).sum().float()
    if not dist.is_initialized():
        return count
    dist.all_reduce(count, group=group)
    return count / dist.get_world_size(group)


def _count(labels: Tensor, mask: Tensor | None, ignore_index: int, shift: bool) -> Tensor:
    counted = (labels[..., 1:] if shift else labels) != ignore_index
    if mask is not None:
        counted = counted & (mask[..., :-1] if shift else mask)
    return counted.sum()
