"""The teachers' outputs for a batch: of modules, functions or a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.cache import CacheError, CacheReader, PackedLabels
from kdfast.distill.fields import Fields, split, tensors, to_device
from kdfast.models import call, call_outputs, device_of, evaluating, logits_of, row_mask

__all__ = ["Teachers", "look_up", "owner"]


class Teachers:
    """Runs one teacher, several, or none.

    A module, or the modules that a method or function uses, run in evaluation mode and without gradients at every
    call, whatever mode they are in; the mode of each of their submodules is restored afterwards. A cache looks the
    batch's keys up. A batch that brings labels from a cache, as ``CacheDataset`` collates it, goes with a cache or no
    teacher: its labels are the output.

    Args:
        teacher: a module, a function, a ``CacheReader``, a tuple or list of these, or None.
        student: the student, which must not be among the teachers.
        fields: finds the batch's parts.

    Raises:
        TypeError: a teacher of another kind, naming its type.
        ValueError: the student is its own teacher.
    """

    def __init__(self, teacher: Any, student: nn.Module, fields: Fields) -> None:
        self.several = isinstance(teacher, (tuple, list))
        self.members: list[Any] = list(teacher) if self.several else [] if teacher is None else [teacher]
        self._fields = fields
        for member in self.members:
            if member is student:
                raise ValueError(
                    "the teacher is the student itself: give it copy.deepcopy(student), which stays as it is"
                )
            if not (isinstance(member, CacheReader) or callable(member)):
                raise TypeError(
                    "a teacher is a module, a function or a CacheReader (kdfast.cache.open), got "
                    f"{type(member).__name__}"
                )

    def __call__(self, batch: Any, student: Any, device: torch.device | None, strict: bool = True) -> Any:
        """Teacher outputs for ``batch``: one, a tuple for several teachers, None for none.

        Args:
            batch: a batch, as ``to_device`` makes it.
            student: the student's output for it. A cache's labels are laid out as its rows are.
            device: where the outputs are moved; None leaves them where they are.
            strict: with False, a cache that lacks the batch's records, or a batch without keys, yields None.

        Raises:
            KeyError: a record is not in the cache.
            ValueError: an output requires grad, or a batch brings labels from a cache besides a teacher.
        """
        inner, cached = split(batch)
        if cached is not None:
            if not all(isinstance(member, CacheReader) for member in self.members):
                raise ValueError("the batch brings labels from a cache, and there is a teacher besides: give only one")
            return cached
        outputs = [self._output(member, inner, student, device, strict) for member in self.members]
        return tuple(outputs) if self.several else outputs[0] if outputs else None

    def _output(self, member: Any, batch: Any, student: Any, device: torch.device | None, strict: bool) -> Any:
        if isinstance(member, CacheReader):
            try:
                rows = logits_of(student, "the student").shape[:-1]
                labels = look_up(member, self._fields.keys(batch), batch, rows, self._fields.mask)
            except CacheError:
                raise
            except (LookupError, ValueError):
                if strict:
                    raise
                return None
            return labels if device is None else labels.to(device)
        own = device_of(owner(member)) or device
        with evaluating(member):
            output = call(member, to_device(self._fields.arguments(batch, member), own))
            if self._fields.outputs is not None:
                output = call_outputs(self._fields.outputs, output, batch)
        if any(x.requires_grad for x in tensors(output)):
            raise ValueError("the teacher's output requires grad: detach it, for only the student is trained")
        return output if own == device else to_device(output, device)


def owner(teacher: Any) -> Any:
    """The module that a bound method belongs to; any other teacher is returned as it is."""
    module = getattr(teacher, "__self__", None)
    return module if isinstance(module, nn.Module) else teacher


def look_up(
    cache: CacheReader,
    keys: Sequence[Any],
    batch: Any,
    rows: torch.Size,
    mask: str | Callable[[Any], Any] | None = None,
) -> PackedLabels:
    """Look a batch's keys up in a cache, with the labels laid out as the student's rows.

    There is one row per record, or (records, length) with an absent row for each padding token. Padding is where the
    batch's ``attention_mask`` (or ``mask``) is 0, on either side. Without a mask every row of a record is used.

    Args:
        cache: the cache.
        keys: a key per record.
        batch: the batch, for its ``attention_mask``.
        rows: the shape of the student's rows.
        mask: another mask of the batch, as ``Distiller`` takes it.

    Raises:
        KeyError: a key is not in the cache.
        ValueError: a record has fewer rows than the batch has tokens of it.
    """
    real = row_mask(batch, rows, mask)
    if len(rows) < 2 or real is None:
        return cache.pack(keys)
    return cache.pack([span for key, row in zip(keys, real, strict=True) for span in _spans(key, row)])


def _spans(key: Any, real: Tensor) -> Iterator[tuple[Any, int, int]]:
    start = 0
    for kept, run in groupby(real.tolist()):
        count = len(list(run))
        yield (key, start, count) if kept else (None, 0, count)
        start += count if kept else 0
