"""The denominator of a mean over what several processes hold."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast._checks import check_integer
from kdfast.loss import checks
from kdfast.masks import as_mask

__all__ = ["global_items"]


def global_items(
    *labels: Tensor,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    accumulation_steps: int = 1,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``num_items`` for ``kd_loss`` under DDP or FSDP, which average the processes' gradients::

        count = (labels != ignore_index).sum()      # on the device: nobody waits
        dist.all_reduce(count, group=group)
        return count / dist.get_world_size(group) / accumulation_steps

    With it the gradient of a step is that of the mean over all counted rows of all processes and micro-batches, however
    unevenly they are spread. Give the labels of all micro-batches of a step, and the result to each loss. What divides
    a loss or its gradient afterwards is divided out here, so it must be known:

    ================================================  ===============================================================
    who divides                                       ``num_items``
    ================================================  ===============================================================
    a loop of one process, ``loss.backward()``        ``global_items(*labels)``: nobody divides
    DDP, FSDP: by the number of processes             ``global_items(*labels)``: the count over their number
    ``accelerator.backward(loss)``: also by its       ``global_items(*labels,
    ``gradient_accumulation_steps``                   accumulation_steps=accelerator.gradient_accumulation_steps)``
    Lightning: also by ``accumulate_grad_batches``    ``global_items(*labels, accumulation_steps=...)``
    Hugging Face's ``Trainer`` with ``compute_loss``  ``num_items_in_batch / trainer.accelerator.num_processes``, which
    of your own: DDP alone                            is a count of all processes (``average_tokens_across_devices``)
    ... with ``compute_loss_func=``: it multiplies    ``num_items_in_batch``
    by the number of processes itself
    ================================================  ===============================================================

    Args:
        labels: (...,) class indices of one or several micro-batches.
        mask: the ``row_weight`` of a single micro-batch, where that is a mask: bool, or integers of 0 and 1.
        ignore_index, shift: as ``kd_loss`` is given them. With ``shift`` a mask of the labels' shape is shifted as they
            are; it may also be one shorter.
        accumulation_steps: what each micro-batch's loss is divided by before its backward pass, but by this call.
        group: of the data parallelism; None: all processes. Without ``torch.distributed`` it is this one alone.

    Raises:
        TypeError, ValueError: no labels, labels that are no class indices, a mask for several micro-batches, or of
            another shape or dtype.
    """
    checks.check_options(ignore_index, shift=shift)
    check_integer("accumulation_steps", accumulation_steps, least=1)
    if not labels:
        raise ValueError("global_items needs the labels of at least one micro-batch")
    for x in labels:
        if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool or (shift and not x.dim()):
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"labels must be tensors of class indices, one per micro-batch, got {got}")
    if mask is not None and len(labels) > 1:
        raise ValueError(
            f"a mask is of one micro-batch's labels, got labels of {len(labels)}: set them to ignore_index"
        )
    count = torch.stack([_count(x, mask, ignore_index, shift) for x in labels]).sum().float() / accumulation_steps
    if group is not None:
        checks.check_group(group)
    if not dist.is_available() or not dist.is_initialized():
        return count
    dist.all_reduce(count, group=group)
    return count / dist.get_world_size(group)


def _count(labels: Tensor, mask: Tensor | None, ignore_index: int, shift: bool) -> Tensor:
    labels = labels.long()  # uint8 has no -100
    whole, labels = labels.shape, labels[..., 1:] if shift else labels
    counted = labels != ignore_index
    if mask is not None:
        shortened = shift and isinstance(mask, Tensor) and mask.shape == labels.shape != whole
        real = as_mask("mask", mask, labels.shape if shortened else whole)
        counted = counted & (real[..., 1:] if shift and not shortened else real)
    return counted.sum()
