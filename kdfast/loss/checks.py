"""Argument checks: a named error that says what was passed and what was wanted, before any kernel runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast._checks import LARGEST, can_look, check_flags, check_integer, check_number, values_are_checked
from kdfast._names import did_you_mean
from kdfast.labels import Head, Prototype, Ragged, SoftLabels, TopK
from kdfast.labels.ragged import Tailed
from kdfast.labels.repeats import check_ids, check_offsets, check_prototype_ids
from kdfast.loss.first_look import ROUNDING, look_closely, not_log_probs, not_log_tails
from kdfast.loss.option_names import REDUCTION_TERMS
from kdfast.masks import check_zeros_and_ones, is_mask
from kdfast.models import check_logits, check_plain

__all__ = [
    "check_backward",
    "check_eager",
    "check_effects",
    "check_group",
    "check_labels",
    "check_numbers",
    "check_options",
    "check_smoothing",
    "check_student",
    "check_teacher",
    "check_values",
    "check_vocabularies",
    "check_weight_values",
    "check_whole",
    "values_are_checked",
]

Number = float | Tensor

BACKWARDS = ("fused", "recompute", "inplace", "eager")


# Each model pads a vocabulary to a multiple of its own. Few classes that differ in number are of other tasks.
_MANY, _PADDING, _SHARE, _MULTIPLE = 1000, 64, 0.01, 8
_INDICES = (torch.int64, torch.int32, torch.uint8, torch.int8, torch.int16)
_PADDED = (
    ": a cache has rows for real tokens alone. Take the student's rows and labels by the mask, as in "
    "student[attention_mask.bool()], or pad the teacher's: cache.gather of kdfast.cache.mask_spans(key, mask)"
)


def check_student(student: object) -> Tensor | Head:
    """``student``. Raise ``TypeError`` or ``ValueError`` unless it is logits or a ``Head``."""
    return student if isinstance(student, Head) else check_logits("student", student)


def check_teacher(student: Tensor | Head, teacher: Tensor | Head | SoftLabels, rows: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless the teacher fits the student's ``rows`` rows and is not trained."""
    if isinstance(teacher, SoftLabels):
        if len(teacher) != rows:
            raise ValueError(
                f"teacher has {len(teacher)} rows of soft labels, student {tuple(student.shape)} has {rows}"
                + _PADDED * (len(teacher) < rows and len(student.shape) > 2)
            )
        if torch.is_grad_enabled() and any(x.requires_grad for x in vars(teacher).values() if isinstance(x, Tensor)):
            raise ValueError("soft labels of the teacher require grad, but only the student is trained: detach them")
    else:
        logits = teacher if isinstance(teacher, Head) else check_logits("teacher", teacher)
        if torch.is_grad_enabled() and _is_trained(logits):
            raise ValueError("teacher requires grad, but only the student is trained: compute it under torch.no_grad()")
        if logits.shape[:-1] != student.shape[:-1]:
            raise ValueError(
                f"student and teacher must have the same leading dimensions, got {tuple(student.shape)} and "
                f"{tuple(logits.shape)}"
            )
    if teacher.device != student.device:
        raise ValueError(f"student is on {student.device}, teacher on {teacher.device}")


def _is_trained(teacher: Tensor | Head) -> bool:
    if isinstance(teacher, Tensor):
        return teacher.requires_grad
    # The weight of a frozen model often requires grad, as a parameter does by default. Nothing computed it.
    layer = [x for x in (teacher.weight, teacher.bias) if x is not None and not x.is_leaf]
    return any(x.requires_grad for x in (teacher.hidden, *layer))


def check_vocabularies(student: int, teacher: int, vocab: str) -> None:
    """Check that two numbers of columns are of one vocabulary.

    Args:
        student, teacher: their columns.
        vocab: "same": the numbers may differ by padding, of which vocabularies of 1000 and more have up to 64 columns
            or 1 %; "shared": by anything.

    Raises:
        TypeError, ValueError: another ``vocab``, or numbers that differ by more.
    """
    if not isinstance(vocab, str):
        raise TypeError(f'vocab must be "same" or "shared", got {type(vocab).__name__}')
    if vocab not in ("same", "shared"):
        raise ValueError(f'vocab must be "same" or "shared", got {vocab!r}')
    if student == teacher or vocab == "shared":
        return
    if not _is_padding(min(student, teacher), max(student, teacher)):
        raise ValueError(
            f"the student has {student} classes, the teacher {teacher}: more than the padding of one vocabulary. If "
            f'the first {min(student, teacher)} are the same classes, vocab="shared" compares these'
        )


def _is_padding(least: int, most: int) -> bool:
    if least < _MANY or most - least > max(_PADDING, _SHARE * most):
        return False
    # Added tokens make any number; but 1001 classes are 1000 and a background.
    return most % _MULTIPLE == 0 or least >= 10 * _MANY


def check_labels(labels: Tensor | None, student: Tensor | Head, needed_by: str | None) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless labels fit the student; without any, if something needs them."""
    if labels is None:
        if needed_by is not None:
            raise ValueError(f"labels are required by {needed_by}")
        return
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor of class indices or probabilities, got {type(labels).__name__}")
    check_plain("labels", labels)
    if labels.device != student.device:
        raise ValueError(f"student is on {student.device}, labels on {labels.device}")
    if labels.is_floating_point():
        _check_probabilities(labels, student, needed_by)
    elif labels.dtype not in _INDICES or labels.shape != student.shape[:-1]:
        _refuse_indices(labels, student)


def _check_probabilities(labels: Tensor, student: Tensor | Head, needed_by: str | None) -> None:
    if labels.shape != student.shape:
        indices = "; class indices are integers: labels.long()" if labels.shape == student.shape[:-1] else ""
        raise ValueError(
            f"labels as class probabilities must have the student's shape {tuple(student.shape)}, "
            f"got {tuple(labels.shape)}{indices}{_classes_last(student, labels)}"
        )
    if labels.requires_grad and torch.is_grad_enabled():
        raise ValueError("labels require grad, but only the student is trained")
    if needed_by == "divergence dkd":
        raise ValueError("divergence dkd needs class indices as labels, got class probabilities")


def _refuse_indices(labels: Tensor, student: Tensor | Head) -> None:
    hint = "; one-hot labels are probabilities: labels.float()" if labels.shape == student.shape else ""
    if labels.dtype not in _INDICES:
        raise TypeError(f"labels must be int64 class indices or floating-point probabilities, got {labels.dtype}{hint}")
    hint = hint or _classes_last(student, labels)
    if labels.shape == (*student.shape[:-1], 1):
        hint = "; without the last dimension: labels.squeeze(-1)"
    elif len(student.shape) > 2 and labels.shape == (*student.shape[:-2], student.shape[-2] - 1):
        hint = "; the next tokens go with student[..., :-1, :], and the teacher's alike, without shift"
    raise ValueError(f"labels must be {tuple(student.shape[:-1])} for this student, got {tuple(labels.shape)}{hint}")


def _classes_last(student: Tensor | Head, labels: Tensor) -> str:
    """What to write for (N, C, ...) logits, as ``F.cross_entropy`` takes them."""
    shape = student.shape
    if len(shape) > 2 and labels.shape in ((shape[0], *shape[2:]), (shape[0], *shape[2:], shape[1])):
        return "; classes are the last dimension: student.movedim(1, -1), and the teacher alike"
    return ""


def check_options(ignore_index: object, **flags: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``ignore_index`` is an integer and all flags are bools."""
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        check_integer("ignore_index", ignore_index, hint="; -100 marks no class")
    check_flags(**flags)


def check_effects(
    label_smoothing: float, kd_weight: object, ce_weight: object, z_weight: object, return_parts: bool
) -> None:
    """Warn of smoothed labels that weigh nothing. Raise ``ValueError`` for parts of rows that weigh nothing."""
    if isinstance(ce_weight, Tensor) or ce_weight != 0.0:
        return
    if label_smoothing and not torch.compiler.is_compiling():
        # No error: a schedule's last ce_weight may be 0.
        warnings.warn(f"label_smoothing={label_smoothing} has no effect, because ce_weight is 0", stacklevel=3)
    if return_parts and not any(isinstance(x, Tensor) or x != 0.0 for x in (kd_weight, z_weight)):
        raise ValueError(
            "return_parts gives parts of rows that weigh something, but kd_weight, ce_weight and z_weight are 0"
        )


def check_group(group: object) -> None:
    """Raise ``TypeError`` unless it is a process group of ``torch.distributed``."""
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")


def check_whole(name: str, options: Mapping[str, object]) -> None:
    """Raise ``ValueError`` for ``group`` among the options of ``name``, a loss that needs all classes of a row."""
    if options.get("group") is not None:
        raise ValueError(f"{name} needs all classes of a row: group= shares them out, which kd_loss alone can take")


def check_numbers(
    temperature: object,
    teacher_temperature: object,
    kd_weight: object,
    ce_weight: object,
    z_weight: object,
    row_weight: object,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless temperatures are positive, and weights finite and not negative.

    ``row_weight`` is a tensor or None, and may be negative; the others may be tensors, whose values are looked at where
    it is one, and at hand.
    """
    _check_positive("temperature", temperature)
    if teacher_temperature is not temperature:
        _check_positive("teacher_temperature", teacher_temperature)
    for name, value in (("kd_weight", kd_weight), ("ce_weight", ce_weight), ("z_weight", z_weight)):
        number = value if type(value) is float else _number(name, value)
        if number is not None and not 0.0 <= number <= LARGEST:
            wrong = "not be negative" if number < 0.0 else "be finite"
            raise ValueError(f"{name} must {wrong}, got {value}")
    if row_weight is not None:
        if not isinstance(row_weight, Tensor):
            raise TypeError(
                "row_weight must be a tensor of one weight per row, or a mask of rows that count, got "
                f"{type(row_weight).__name__}; kd_weight and ce_weight are numbers for all rows"
            )
        _check_tensor("row_weight", row_weight)
        check_zeros_and_ones("row_weight", row_weight, "weights are floating-point numbers: row_weight.float()")


def _check_positive(name: str, value: object) -> None:
    number = value if type(value) is float else _number(name, value)
    if number is None and isinstance(value, Tensor) and value.dtype == torch.bool:
        raise TypeError(f"{name} must be a number or numbers per row, got {value.dtype}")
    if number is not None and not 0.0 < number <= LARGEST:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _number(name: str, value: object) -> float | int | None:
    """The number, where it is one and at hand. Raises ``TypeError`` or ``ValueError`` for what is no number."""
    if isinstance(value, (float, int)) and not isinstance(value, bool):
        return value
    if isinstance(value, Tensor):
        _check_tensor(name, value)
        return value.item() if value.dim() == 0 and can_look(value) else None
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{name} must be a number or a tensor of one number per row, got {type(value).__name__}")


def _check_tensor(name: str, value: Tensor) -> None:
    check_plain(name, value)
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but kd_loss differentiates with respect to the student only")
    if not (value.is_floating_point() or is_mask(value)):
        raise TypeError(f"{name} must be real, got {value.dtype}")


def check_smoothing(value: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless a label smoothing is a number in [0, 1]."""
    check_number("label_smoothing", value, least=0.0, most=1.0)


def check_backward(backward: str, reduction: str, num_items: object, student: Tensor | Head) -> None:
    """Raise ``TypeError`` or ``ValueError`` for a backward mode, a reduction or a ``num_items`` that do not fit."""
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise _no_choice("reduction", reduction, ("mean", "sum", "none"), REDUCTION_TERMS)
    if not isinstance(backward, str) or backward not in BACKWARDS:
        raise _no_choice("backward", backward, BACKWARDS, {})
    if num_items is not None:
        if reduction != "mean":
            raise ValueError(f'num_items replaces the denominator of reduction="mean", got reduction={reduction!r}')
        _check_items(num_items)
    if backward == "inplace":
        if isinstance(student, Head):
            raise ValueError('backward="inplace" writes over logits, which a Head does not have: use "fused"')
        _check_inplace(reduction, student)


def check_eager(backward: str, student: Tensor | Head, in_group: bool) -> str:
    """``"eager"``. Raise ``ValueError`` for what it does not serve; ``backward`` is what was asked for."""
    why = 'backward="eager"' if backward == "eager" else 'torch.func and forward mode, which need backward="eager",'
    if in_group:
        raise ValueError(f"{why} cannot be combined with group=: the derivatives of a shared vocabulary are not there")
    if backward == "inplace":
        raise ValueError(f'{why} cannot be combined with backward="inplace": logits would be overwritten')
    if isinstance(student, Head) and student.weight_grad is not None:
        raise ValueError(f"{why} cannot be combined with Head(weight_grad=): the weight's gradient is returned")
    return "eager"


def _check_items(num_items: object) -> None:
    if not isinstance(num_items, Tensor):
        _check_positive("num_items", num_items)
        return
    if num_items.numel() != 1:
        raise ValueError(
            f"num_items must be one number, got a tensor of {tuple(num_items.shape)}: of several counts their sum"
        )
    count = _number("num_items", num_items.reshape(()))
    # A step of which no row counts has a count of 0, and a loss of 0.
    if count is not None and not 0 <= count <= LARGEST:
        raise ValueError(f"num_items must not be negative, and finite, got {count}")


def _no_choice(name: str, got: object, choices: tuple[str, ...], terms: Mapping[str, str]) -> Exception:
    listed = ", ".join(f'"{one}"' for one in choices[:-1]) + f' or "{choices[-1]}"'
    if got is None and "none" in choices:
        return TypeError(f'{name} must be {listed}, got None: did you mean "none"?')
    if not isinstance(got, str):
        return TypeError(f"{name} must be {listed}, got {type(got).__name__}")
    return ValueError(f"{name} must be {listed}, got {got!r}{did_you_mean(got, choices, terms)}")


def _check_inplace(reduction: str, student: Tensor) -> None:
    if reduction == "none":
        raise ValueError('backward="inplace" needs a scalar reduction: per-row upstream gradients are not known yet')
    base = student if student._base is None else student._base
    if base.requires_grad and base.is_leaf:
        raise ValueError('backward="inplace" would overwrite a leaf: pass logits that a model computed')
    if student.dtype == torch.float16:
        raise ValueError(
            'backward="inplace" rounds float16 gradients before GradScaler has scaled them; use "recompute"'
        )
    if not student.is_contiguous():
        raise ValueError(f'backward="inplace" needs contiguous logits, got strides {student.stride()}')


def check_values(
    student: Tensor | Head,
    teacher: Tensor | Head | SoftLabels,
    temperatures: list[Number],
    columns: int,
) -> None:
    """Raise ``ValueError`` for bad values: temperatures, soft labels, and probabilities in logits' place."""
    for tau in temperatures:
        if isinstance(tau, Tensor) and not bool(((tau > 0) & (tau < math.inf)).all()):
            raise ValueError(f"temperatures must be positive and finite, got values down to {float(tau.min())}")
    look_closely(student, teacher)
    if isinstance(teacher, Ragged):
        _check_entries(teacher, columns)


def check_weight_values(**weights: object) -> None:
    """Raise ``ValueError`` for a weight per row that is negative or not finite."""
    for name, value in weights.items():
        if isinstance(value, Tensor) and not bool(((value >= 0) & (value < math.inf)).all()):
            raise ValueError(
                f"{name} must be finite and not negative, got {float(value.min())} to {float(value.max())}"
            )


def _check_entries(labels: Ragged, columns: int) -> None:
    check_offsets(labels.offsets, labels.ids.numel())
    padding = labels.padding
    if labels.present is not None:
        padding = padding | ~labels.present[labels.entry_rows]
    check_ids(labels.ids, labels.offsets, padding, min(columns, labels.vocab_size), once="merge its entries")
    _check_masses(labels)
    if isinstance(labels, Prototype):
        _check_prototypes(labels.prototype_ids, labels.prototypes)


def _check_masses(labels: Ragged) -> None:
    """That log-probabilities, probabilities, weights and tails are some, and no row has more mass than there is."""
    values = labels.values
    if isinstance(labels, TopK):
        if bool((values > ROUNDING).any()) or bool(values.isnan().any()):
            raise not_log_probs(float(values.max()))
        values = values.exp()
    elif not bool(((values >= 0) & (values < math.inf)).all()):
        raise ValueError(f"{labels.kind} soft labels hold values from {float(values.min())} to {float(values.max())}")
    if not isinstance(labels, Tailed):
        return
    tails = labels.tails
    if bool((tails > ROUNDING).any()) or bool(tails.isnan().any()):
        raise not_log_tails(labels)
    mass = values.new_zeros(len(labels)).index_add_(0, labels.entry_rows, values)
    if mass.numel() and float(mass.max()) > 1.0 + 2 * ROUNDING:
        raise ValueError(
            f"the entries of a row of {labels.kind} soft labels have at most the probability 1, got {mass.max():.4g}"
        )


def _check_prototypes(prototype_ids: Tensor, prototypes: Tensor) -> None:
    check_prototype_ids(prototype_ids, len(prototypes))
    if not bool(((prototypes >= 0) & (prototypes < math.inf)).all()):
        raise ValueError(
            f"prototypes must be finite and not negative, got {float(prototypes.min())} to {float(prototypes.max())}"
        )
