"""The teachers' outputs for a batch: of modules, functions or a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdfast._record_keys import InputsKey
from kdfast.cache import CacheError, CacheMismatchError, CacheReader, PackedLabels, mask_spans
from kdfast.cache.format.keys import describe
from kdfast.cache.read.agreement import check_labels
from kdfast.distill.fields import Fields, split, tensors, to_device
from kdfast.masks import as_mask
from kdfast.models import call, call_outputs, device_of, evaluating, logits_of, row_mask

__all__ = ["Teachers", "look_up", "owner"]

COMPARED_ON_DEVICE = 8  # batches


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
        ignore_index: a label that is none.
        compare_targets: whether labels are compared with the targets that a cache has of the records.

    Raises:
        TypeError: a teacher of another kind, naming its type.
        ValueError: the student is its own teacher.
    """

    def __init__(
        self,
        teacher: Any,
        student: nn.Module,
        fields: Fields,
        *,
        ignore_index: int = -100,
        compare_targets: bool = True,
    ) -> None:
        self._ignore_index, self._compare, self._compared = ignore_index, compare_targets, 0
        self.several = isinstance(teacher, (tuple, list))
        self.members: list[Any] = list(teacher) if self.several else [] if teacher is None else [teacher]
        self._fields, self._student = fields, student
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
            CacheMismatchError: the batch's labels are not the targets with which its records were stored.
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
            stored = self._fields.cache_mask and self._fields.cache_mask(batch)
            try:
                labels = look_up(
                    member,
                    self._fields.keys(batch, self._student),
                    batch,
                    logits_of(student, "the student").shape[:-1],
                    mask=self._fields.mask,
                    stored=stored,
                    labels=self._to_compare(batch),
                    ignore_index=self._ignore_index,
                )
            except CacheMismatchError:  # the records of these keys are other ones
                if strict:
                    raise
                return None
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

    def _to_compare(self, batch: Any) -> Tensor | None:
        """The batch's labels, if they are to be compared with a cache's targets."""
        if not self._compare:
            return None
        labels = self._fields.labels_of(batch)
        if labels is not None and labels.device.type != "cpu":
            self._compared += 1  # fetching labels waits for the device: a run that is amiss shows at its beginning
            return labels if self._compared <= COMPARED_ON_DEVICE else None
        return labels


def owner(teacher: Any) -> Any:
    """The module that a bound method belongs to; any other teacher is returned as it is."""
    module = getattr(teacher, "__self__", None)
    return module if isinstance(module, nn.Module) else teacher


def look_up(
    cache: CacheReader,
    keys: Sequence[Any],
    batch: Any,
    rows: torch.Size,
    *,
    mask: str | Callable[[Any], Any] | None = None,
    stored: Any = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
) -> PackedLabels:
    """Look a batch's keys up in a cache, with the labels laid out as the student's rows.

    There is one row per record, or (records, length) with an absent row for each padding token. Padding is where the
    batch's ``attention_mask`` (or ``mask``) is 0, on either side. Without a mask every row of a record is used.

    Args:
        cache: the cache.
        keys: a key per record.
        batch: the batch, for its ``attention_mask``.
        rows: the shape of the student's rows.
        mask: another mask of the batch's rows, as ``Distiller`` takes it.
        stored: (records, length) which rows the cache has, a bool each; None: all.
        labels: the batch's, to compare with the cache's targets; None compares nothing.
        ignore_index: a label that is none.

    Raises:
        KeyError: a key is not in the cache.
        CacheMismatchError: the labels are not the targets with which the records were stored.
        ValueError: a record has fewer rows than the batch has tokens of it, or other ones than ``stored`` says.
    """
    index = cache.index(keys)
    real = row_mask(batch, rows, mask)
    kept = None if len(rows) < 2 or (real is None and stored is None) else _kept(real, stored)
    if kept is not None:
        _check_rows(cache.row_counts(index), kept.sum(1), keys, stored is not None)
    if labels is not None:
        certain = all(isinstance(key, (Tensor, np.ndarray, InputsKey)) for key in keys)
        check_labels(cache, index, keys, labels, batch, kept, ignore_index, certain)
    if kept is None:
        return cache.pack(index)
    return cache.pack([span for key, row in zip(keys, kept, strict=True) for span in mask_spans(key, row)])


def _kept(real: Tensor | None, stored: Any) -> NDArray[np.bool_]:
    """(records, length) the rows that a batch has labels of: those that are no padding and that are ``stored``."""
    if stored is None:
        assert real is not None
        return np.asarray(real.bool().cpu())
    given = stored.cpu() if isinstance(stored, Tensor) else torch.stack(list(stored)).cpu()
    given = as_mask("cache_mask", given, given.shape if real is None else real.shape)
    return np.asarray(given if real is None else given & real.bool().cpu())


def _check_rows(stored: NDArray[np.int64], wanted: NDArray[np.int64], keys: Sequence[Any], exact: bool) -> None:
    """Raise ``ValueError`` for a record that has not the rows that are ``wanted``, or, unless ``exact``, fewer."""
    for at in np.flatnonzero(stored != wanted if exact else stored < wanted)[:1]:
        cause = (
            "the capture's mask was another"
            if exact
            else "if it was captured with mask=, Distiller(..., cache_mask=...) takes the same function; else its key "
            "names another text, or one that was cut"
        )
        raise ValueError(
            f"the record of {describe(keys[at])} has {stored[at]} rows, the batch {wanted[at]} "
            f"{'that cache_mask keeps' if exact else 'tokens of it'}: {cause}"
        )
